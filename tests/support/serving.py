"""`make serve` with a directory and a port of its own, and what tests ask of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tasks.engine.paths import REPOSITORY
from tests.support.prefect_servers import free_port


class Serving:
    """A Prefect server and its worker, as `make serve` starts them.

    Args:
        home: the directory of database, logs and process ids.
        empty_database: what the server's is copied from.
    """

    def __init__(self, home: Path, empty_database: Path) -> None:
        shutil.copyfile(empty_database, home / "prefect.db")
        self.port, self.home = free_port(), home
        self.api = f"http://127.0.0.1:{self.port}/api"
        # `httpx.get` would read the system's certificates each time. The server may be another one at the next call.
        self.client = httpx.Client(base_url=f"{self.api}/", limits=httpx.Limits(max_keepalive_connections=0))
        settings = {"PREFECT_HOME": str(home), "PREFECT_API_URL": self.api, "PREFECT_WORKER_QUERY_SECONDS": "2"}
        self.environment = os.environ | settings | {"PWD": str(REPOSITORY)}

    def make(self, target: str) -> str:
        """Call `make` with the environment that the tests run in, which it must not set up."""
        environment = Path(sys.prefix)
        setup = f"--old-file={environment / '.setup'}"
        return self._call("make", setup, f"VENV={environment}", f"PORT={self.port}", target)

    def prefect(self, *arguments: str) -> str:
        """Call Prefect's command line."""
        return self._call(str(Path(sys.executable).with_name("prefect")), *arguments)

    def _call(self, *command: str) -> str:
        done = subprocess.run(
            command, check=False, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        return "".join(log.read_text() for log in self.home.glob("*.log"))

    def move_worker(self, machine: Path) -> None:
        """Stop the worker, and start another that has nothing in common with it but server and checkout."""
        worker = self.process("worker")
        worker.terminate()
        worker.wait(60)
        self.environment["HOME"] = str(machine)
        self.make("serve")

    def process(self, name: str) -> psutil.Process:
        """`server` or `worker`."""
        return psutil.Process(int((self.home / f"{name}.pid").read_text()))

    def run(self, identity: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        flow_run: dict[str, Any] = self.client.get(f"flow_runs/{identity}").json()
        return flow_run

    def computed(self, flow: str = "finetune") -> list[str]:
        """The stages that the newest run of a flow has computed, and not found cached."""
        asked = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        (run,) = self.client.post("flow_runs/filter", json=asked).json()
        tasks = self.client.post("task_runs/filter", json={"flow_runs": {"id": {"any_": [run["id"]]}}}).json()
        return sorted(task["name"].split()[0] for task in tasks if task["state"]["name"] != "Cached")

    def start(self, deployment: str, **parameters: object) -> str:
        """Ask for a run as `prefect deployment run` does, without waiting for it; return its id."""
        identity = self.client.get(f"deployments/name/{deployment}").json()["id"]
        for _ in range(60):
            asked = self.client.post(f"deployments/{identity}/create_flow_run", json={"parameters": parameters})
            if asked.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is busy
                break
            time.sleep(1)
        return str(asked.raise_for_status().json()["id"])

    def wait(self, what: Callable[[], object], seconds: float = 300) -> None:
        """Wait until something is so."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, self.logs()
            time.sleep(0.2)
