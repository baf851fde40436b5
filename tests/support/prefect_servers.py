"""Temporary Prefect servers. Their database is made once in a run of the tests, and copied for each further server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

IDLE = ("SCHEDULER", "LATE_RUNS", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "FOREMAN", "TRIGGERS")
"""Services that look for work every few seconds, and have none where nothing is deployed."""
SECONDS_TO_START = 120


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def make_database(directory: Path) -> None:
    """Make a database with Prefect's tables and no entry, which every further server may copy.

    Args:
        directory: where `prefect.db` is written.
    """
    command = [str(Path(sys.executable).with_name("prefect")), "server", "database", "upgrade", "-y"]
    environment = os.environ | _database(directory / "prefect.db")
    subprocess.run(command, env=environment, check=True, capture_output=True)


@contextmanager
def temporary_server(home: Path, empty_database: Path) -> Iterator[str]:
    """Run a server and give the URL of its API.

    Args:
        home: its directory.
        empty_database: what `make_database` has written.
    """
    database, port = home / "prefect.db", free_port()
    shutil.copyfile(empty_database, database)
    settings = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in IDLE}
    settings |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_ENABLED": "false", **_database(database)}
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    with subprocess.Popen(command, env=os.environ | settings) as server, httpx.Client() as client:
        try:
            api, until = f"http://127.0.0.1:{port}/api", time.monotonic() + SECONDS_TO_START
            while not _answers(client, api):
                assert server.poll() is None and time.monotonic() < until, "Prefect's server does not start"
                time.sleep(0.2)
            yield api
        finally:
            server.terminate()


def _database(file: Path) -> dict[str, str]:
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}"}


def _answers(client: httpx.Client, api: str) -> bool:
    try:
        return client.get(f"{api}/health").is_success
    except httpx.TransportError:
        return False
