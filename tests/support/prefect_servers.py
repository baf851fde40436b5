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
from filelock import FileLock

IDLE = ("SCHEDULER", "LATE_RUNS", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "FOREMAN", "REPOSSESSOR", "TRIGGERS")
"""Services that look for work every few seconds, and have none where nothing is deployed."""
SECONDS_TO_START = 120


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def place_database(file: Path, template: Path) -> None:
    """Put an empty database with Prefect's tables where a server will look for it.

    Args:
        file: where; the directory is made.
        template: the database that all are copied from, which the first call makes.
    """
    with FileLock(template.with_suffix(".lock")):
        if not template.is_file():
            making = template.with_suffix(".making")
            command = [str(Path(sys.executable).with_name("prefect")), "server", "database", "upgrade", "-y"]
            subprocess.run(command, env=os.environ | _database(making), check=True, capture_output=True)
            making.rename(template)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, file)


@contextmanager
def temporary_server(home: Path, template: Path) -> Iterator[str]:
    """Run a server and give the URL of its API.

    Args:
        home: its directory.
        template: as `place_database` takes it.
    """
    database, port = home / "prefect.db", free_port()
    place_database(database, template)
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
