"""The deployments, as the README sets them up: a local server, a process worker, one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tasks.settings import REPOSITORY

PREFECT = str(Path(sys.executable).with_name("prefect"))


@contextmanager
def background(log: Path, environment: dict[str, str], *arguments: str) -> Iterator[None]:
    """Run a Prefect command beside this block; stop it, and the processes it started, at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PREFECT, *arguments],
            env=environment,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(f"nothing answers at {url}")


@pytest.mark.timeout(600)
def test_a_deployment_runs_with_a_local_server_and_a_process_worker(
    make_preset: Callable[..., str], workplace: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    api = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": api, "PWD": str(REPOSITORY)}

    def prefect(*arguments: str) -> str:
        command = [PREFECT, *arguments]
        done = subprocess.run(
            command, check=False, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, (
            done.stdout + done.stderr + "".join(log.read_text() for log in tmp_path.glob("*.log"))
        )
        return done.stdout

    with background(tmp_path / "server.log", environment, "server", "start", "--host", "127.0.0.1", "--port", port):
        wait_for(f"{api}/health")
        prefect("work-pool", "create", "local", "--type", "process", "--overwrite")
        prefect("--no-prompt", "deploy", "--all")
        with background(tmp_path / "worker.log", environment, "worker", "start", "--pool", "local"):
            prefect("deployment", "run", "finetune/grit", "-p", f"preset={make_preset()}", "--watch")
        (run,) = httpx.post(f"{api}/flow_runs/filter", json={}).json()
        schedules = httpx.get(f"{api}/deployments/name/finetune/grit").json()["schedules"]
    assert run["state"]["type"] == "COMPLETED"
    assert [schedule["active"] for schedule in schedules] == [False]
    manifest = workplace / "ollama/manifests/registry.ollama.ai/library/tiny-grit/latest"
    assert json.loads(manifest.read_text())["layers"]
