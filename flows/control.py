"""A Prefect server and a worker in the background of this machine, as `serve` and `down` ask for them.

The environment says where: `PREFECT_HOME` takes database, logs and process ids, and `PREFECT_API_URL` has the port.
What is to go on after a reboot is set up with docs/operations.md, which uses `python -m flows.control register`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.recover import recover
from flows.support.command_line import exit_status
from flows.support.database import check_database
from flows.support.own_server import address, address_file
from flows.support.pasting import as_typed, beside_python, typed
from flows.support.terminal import terminal_with
from tasks.engine.errors import UserError
from tasks.engine.locks import SLOT
from tasks.engine.paths import REPOSITORY

HOME = get_current_settings().home
API = str(get_current_settings().api.url)
PREFECT = beside_python("prefect")
POOL = "local"
SERVER = ["server", "start", "--host", "127.0.0.1"]
WORKER = ["worker", "start", "--pool", POOL]
SECONDS_TO_START = 120
SECONDS_TO_STOP = 120
"""A training that is stopped ends its step and writes a checkpoint."""


def up() -> None:
    """Start what does not run, register what it needs, and repeat lost runs."""
    HOME.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker that inherits its being ignored never stops
    with get_client(sync_client=True) as client:
        _serve(client)
        print("Registering the deployments of prefect.yaml ...", flush=True)
        register(client)
        if _running(WORKER) is None:
            with terminal_with(HOME / "recover.log"):
                recover()
            client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
            _start(WORKER)
    print(f"""
Pages:  {API.removesuffix("/api")}
Logs:   {HOME}/server.log, worker.log and recover.log
Run:
  export PREFECT_API_URL={API}
  {shlex.join([as_typed(PREFECT), "deployment", "run", "finetune/demo", "--watch"])}
Stop:
  {typed("down")}""")


def down() -> None:
    """Stop the runs, the worker, and the server. The next `up` goes on with the runs."""
    worker, server = _running(WORKER), _running(SERVER)
    if worker is None and server is None:
        print(f"Neither server nor worker runs that was started from {HOME}.")
    if worker:
        with get_client(sync_client=True) as client, suppress(httpx.HTTPError):
            client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))  # or the worker would start further runs
        if runs := worker.children():
            number = f"{len(runs)} run{'s' * (len(runs) > 1)}"
            print(f"Stopping {number}; a training ends its step and keeps a checkpoint ...")
        for run in runs:
            with suppress(psutil.NoSuchProcess):
                run.terminate()
        # The worker last: it kills runs that it finds alive when it ends, and nobody would mark them as Crashed.
        for late in psutil.wait_procs(runs, timeout=SECONDS_TO_STOP)[1]:
            late.kill()
        _stop(worker, WORKER)
    if server:
        _stop(server, SERVER)
    address_file(HOME).unlink(missing_ok=True)


def register(client: SyncPrefectClient) -> None:
    """Make work pool and slot where they are missing, and register the deployments of prefect.yaml.

    What the user has changed stays: the size of pool and slot, and which schedules are switched on.
    """
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        _prefect("work-pool", "create", POOL, "--type", "process")
    try:
        client.read_global_concurrency_limit_by_name(SLOT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=SLOT, limit=1))
    before = [schedule for deployment in client.read_deployments() for schedule in deployment.schedules]
    _prefect("--no-prompt", "deploy", "--all")
    switch_on(client, {schedule.id for schedule in before if schedule.active})


def switch_on(client: SyncPrefectClient, schedules: Container[UUID]) -> None:
    """Switch schedules on, and leave all else of them as it is.

    Args:
        client: of the server that has them.
        schedules: their ids; what the server does not have is passed over.
    """
    for deployment in client.read_deployments():
        for schedule in deployment.schedules:
            if schedule.id in schedules:  # the server forgets parameters that do not come along
                client.update_deployment_schedule(
                    deployment.id, schedule.id, active=True, parameters=schedule.parameters
                )


def _stop(process: psutil.Process, command: list[str]) -> None:
    process.terminate()
    if psutil.wait_procs([process], timeout=SECONDS_TO_STOP)[1]:
        process.kill()
    _pid_file(command).unlink(missing_ok=True)
    print(f"Stopped the {command[0]}.")


def _serve(client: SyncPrefectClient) -> None:
    if _running(SERVER) is None:
        if _is_taken(urlsplit(API).port):
            fix = f"Use another port: {typed('serve', ['--port', '4300'])}"
            raise UserError("another program serves this address", where=API, fix=fix)
        check_database()
        print(f"Starting a Prefect server at {API.removesuffix('/api')} ...", flush=True)
        _start(SERVER)
        address_file(HOME).write_text(API, encoding="utf-8")
    elif (own := address(HOME)) not in (None, API):
        raise UserError("the server runs already, here", where=own, fix=f"Use it, or stop it first: {typed('down')}")
    until = time.monotonic() + SECONDS_TO_START
    while client.api_healthcheck() is not None:
        time.sleep(0.5)  # first: a process that is just starting has no command line yet, and would count as gone
        if _running(SERVER) is None or time.monotonic() > until:
            if _running(SERVER) is None:
                address_file(HOME).unlink(missing_ok=True)
            raise UserError("the server does not start", where=API, fix=f"See {HOME}/server.log")


def _is_taken(port: int | None) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port or 80)) == 0


def _prefect(*arguments: str) -> None:
    done = subprocess.run(
        [str(PREFECT), *arguments], check=False, capture_output=True, text=True, cwd=REPOSITORY, env=_environment()
    )
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise UserError("it has failed", where=f"prefect {' '.join(arguments)}", fix="Its own words are above.")


def _start(command: list[str]) -> None:
    with (HOME / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(PREFECT), *command],
            cwd=REPOSITORY,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _pid_file(command).write_text(str(process.pid))


def _environment() -> dict[str, str]:
    return os.environ | {"PWD": str(REPOSITORY)}  # prefect.yaml's directory of the flows


def _pid_file(command: list[str]) -> Path:
    return HOME / f"{command[0]}.pid"


def _running(command: list[str]) -> psutil.Process | None:
    """The process that `_start` has started, unless it ended and its id is another's."""
    try:
        process = psutil.Process(int(_pid_file(command).read_text()))
        return process if process.cmdline()[-len(command) :] == command else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Do `register` on a server that is there, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.control", description=register.__doc__)
    parser.add_argument("what", choices=("register",))
    parser.parse_args(arguments)

    def act() -> None:
        with get_client(sync_client=True) as client:
            register(client)

    return exit_status(act)


if __name__ == "__main__":
    sys.exit(main())
