"""Where the checkout's own Prefect server is, and what it is set to."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tasks.engine.paths import REPOSITORY

PORT = 4200
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Leases kept in memory would end with the server, and leave their slots taken."""


def home() -> Path:
    """Database, logs and process ids of the server: `PREFECT_HOME`, or `.prefect` in the checkout."""
    return Path(os.environ.get("PREFECT_HOME") or REPOSITORY / ".prefect").expanduser().absolute()


def address_file(directory: Path) -> Path:
    """The file with the address of the server that was started and has not been stopped.

    Args:
        directory: as `home` gives it.
    """
    return directory / "server.url"


def address(directory: Path) -> str | None:
    """The API of that server, if there is one and its file can be read.

    Args:
        directory: as `home` gives it.
    """
    with suppress(OSError):
        return address_file(directory).read_text(encoding="utf-8").strip()
    return None


def environment(port: int | None) -> dict[str, str]:
    """What Prefect reads of the server in its environment, once, when it is imported.

    Args:
        port: none for that of the server that was started, or else the usual one.
    """
    api = f"http://127.0.0.1:{port}/api" if port else address(home()) or f"http://127.0.0.1:{PORT}/api"
    return {
        "PREFECT_HOME": str(home()),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_API_PORT": api.removesuffix("/api").rpartition(":")[2],
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
    }
