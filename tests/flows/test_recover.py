"""What `recover` and `make serve` do with runs and ports, by a real server; test_recovery.py kills real runs."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from flows import recover as module
from flows.control import switch_on
from flows.recover import MOST_RECOVERIES, recover
from flows.support.database import check_database
from tasks.engine.paths import REPOSITORY

LONG_AGO = timedelta(hours=1)


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def run_in(client: SyncPrefectClient, state: State) -> UUID:
    """A deployed run of `finetune` in this state."""
    deployment = client.create_deployment(client.create_flow_from_name("finetune"), name=f"d-{uuid4()}")
    run = client.create_flow_run_from_deployment(deployment)
    client.set_flow_run_state(run.id, state, force=True)
    return run.id


def name_of(client: SyncPrefectClient, run: UUID) -> str | None:
    return client.read_flow_run(run).state_name


def test_the_lost_are_repeated_and_the_others_left(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        "silent": run_in(client, Running()),
        "living": run_in(client, Running()),
        "crashed": run_in(client, Crashed()),
        "failed": run_in(client, Failed()),
        "cancelled": run_in(client, Cancelled()),
        "completed": run_in(client, Completed()),
    }
    real = module.last_sign_of_life
    monkeypatch.setattr(
        module,
        "last_sign_of_life",
        lambda asked, run: real(asked, run) - (LONG_AGO if run.id == runs["silent"] else timedelta(0)),
    )
    recover()
    assert {what: name_of(client, run) for what, run in runs.items()} == {
        **{"silent": "Recovered", "crashed": "Recovered"},
        **{"living": "Running", "failed": "Failed", "cancelled": "Cancelled", "completed": "Completed"},
    }


def test_what_crashes_again_and_again_fails(client: SyncPrefectClient) -> None:
    run = run_in(client, Crashed())
    for _ in range(MOST_RECOVERIES):
        recover()
        assert name_of(client, run) == "Recovered"
        client.set_flow_run_state(run, Crashed(), force=True)
    recover()
    assert name_of(client, run) == "Failed"


def test_a_run_that_ends_while_it_is_looked_at_stays_ended(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(client, Running())

    def ends_meanwhile(_: SyncPrefectClient, looked_at: FlowRun) -> datetime:
        client.set_flow_run_state(looked_at.id, Completed(), force=True)
        return datetime.now(UTC) - LONG_AGO

    monkeypatch.setattr(module, "last_sign_of_life", ends_meanwhile)
    recover()
    assert name_of(client, run) == "Completed"


def test_a_schedule_that_is_switched_on_keeps_its_parameters(client: SyncPrefectClient) -> None:
    """The server would forget them: it would train every night, whether or not anything has changed."""
    nightly = DeploymentScheduleCreate(
        schedule=CronSchedule(cron="0 2 * * *"), active=False, parameters={"skip_unchanged": True}, slug="nightly"
    )
    flow = client.create_flow_from_name("finetune")
    deployments = [client.create_deployment(flow, name=f"d-{uuid4()}", schedules=[nightly]) for _ in range(2)]
    on, off = (client.read_deployment(deployment).schedules[0].id for deployment in deployments)
    switch_on(client, {on, uuid4()})
    after = [client.read_deployment(deployment).schedules[0] for deployment in deployments]
    assert [(schedule.id, schedule.active) for schedule in after] == [(on, True), (off, False)]
    assert [schedule.parameters for schedule in after] == [{"skip_unchanged": True}] * 2


def test_the_notifications_are_ones_that_prefect_takes(client: SyncPrefectClient) -> None:
    text = (REPOSITORY / "docs/operations/notifications.yaml").read_text().replace("BLOCK\n", f"{uuid4()}\n")
    automations = [AutomationCore.model_validate(entry) for entry in yaml.safe_load(text)["automations"]]
    for automation in automations:
        created = client.create_automation(automation)
        assert client.read_automation(created) is not None
    assert [automation.name for automation in automations] == ["finetune-went-wrong", "finetune-completed"]


def test_a_port_that_another_program_has_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = os.environ | {"PREFECT_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "flows.command", "serve", "--port", str(port)]
        done = subprocess.run(
            command, check=False, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 2
    problem = f"error: http://127.0.0.1:{port}/api: another program serves this address. Use another port: "
    assert done.stderr.startswith(problem)
    assert done.stderr.endswith(" serve --port 4300\n")


def with_unknown_revision(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
        connection.commit()


def test_a_database_of_a_newer_prefect_is_one_clear_line(prefect_server: None, tmp_path: Path) -> None:
    check_database()  # a real one: that its revision is among those that are looked through
    url = get_current_settings().server.database.connection_url
    assert url is not None
    real = Path(url.get_secret_value().removeprefix("sqlite+aiosqlite:///"))
    for file in real.parent.glob(f"{real.name}*"):
        shutil.copy(file, tmp_path / file.name.replace(real.name, "prefect.db"))
    with_unknown_revision(tmp_path / "prefect.db")
    environment = {name: value for name, value in os.environ.items() if "DATABASE" not in name}
    environment |= {"PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.command", "serve", "--port", "9"]
    done = subprocess.run(
        command, check=False, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"error: {tmp_path}/prefect.db: a Prefect newer than ")
    assert not (tmp_path / "server.pid").exists()
