"""The flow `recover`: runs of `finetune` and `compare` that crashed, or whose machine died, are scheduled again.

Prefect's open-source server marks a run Crashed only where somebody is left to report it. A run whose worker died with
it stays Running for ever; what tells it from a living one is that its heartbeats stop. A worker then repeats the same
flow run with the same parameters: finished stages are cached, and the training goes on from its newest checkpoint.

`llama3-grit recover` looks once.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Failed, Scheduled
from pydantic import PositiveFloat

RECOVERED = "Recovered"
"""Name of the state in which a run waits for its repetition."""
MOST_RECOVERIES = 3
ALIVE_OR_CRASHED = [StateType.PENDING, StateType.RUNNING, StateType.CRASHED]


@flow(name="recover")
def recover(silent_minutes: PositiveFloat = 10, forget_hours: PositiveFloat = 48) -> int:
    """Schedule lost runs of deployments again, each at most three times; then it ends as Failed.

    Cancelled and failed runs stay as they are, and so do runs without a deployment, which no worker can repeat. Should
    a process of a run be alive after all, the two wait for each other's stages and compute each once.

    Args:
        silent_minutes: a run without heartbeat for so long is lost. Prefect sends one every three minutes.
        forget_hours: what has been lost for so long is not repeated.

    Returns:
        How many runs were lost.
    """
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["finetune", "compare"])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ALIVE_OR_CRASHED)),
                deployment_id=FlowRunFilterDeploymentId(is_null_=False),
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
        silent, forget = timedelta(minutes=silent_minutes), timedelta(hours=forget_hours)
        return sum(_look_after(client, run, silent, forget) for run in runs)


def _look_after(client: SyncPrefectClient, run: FlowRun, silent: timedelta, forget: timedelta) -> bool:
    """Schedule a run again if it is lost, or let it end as Failed; return whether it is."""
    logger = get_run_logger()
    crashed = run.state_type == StateType.CRASHED
    silence = datetime.now(UTC) - last_sign_of_life(client, run)
    if silence > forget if crashed else silence < silent:
        return False
    reason = "crashed" if crashed else f"{run.state_name}, without a sign of life for {silence.total_seconds():.0f} s"
    recoveries = sum(state.name == RECOVERED for state in client.read_flow_run_states(run.id))
    if silence > forget or recoveries >= MOST_RECOVERIES:
        message = f"{reason}; not repeated any more, after {recoveries} repetitions"
        state: State[None] = Failed(message=message)
        logger.error("%s: %s", run.name, message)
    else:
        message = f"{reason}; scheduled again, repetition {recoveries + 1} of {MOST_RECOVERIES}"
        state = Scheduled(name=RECOVERED, message=message)
        logger.warning("%s: %s", run.name, message)
    # Without force Prefect lets no run leave Running for Scheduled.
    if _unchanged(client, run):
        client.set_flow_run_state(run.id, state, force=True)
    return True


def _unchanged(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a run is still in the state in which it was found; it may have ended, or been cancelled, meanwhile."""
    now = client.read_flow_run(run.id).state
    return now is not None and run.state is not None and now.id == run.state.id


def last_sign_of_life(client: SyncPrefectClient, run: FlowRun) -> datetime:
    """The newest heartbeat since a run entered its state, or else that moment.

    Args:
        client: of the server that knows the run.
        run: as the server gave it, with its state.
    """
    since = run.state.timestamp if run.state else datetime.min.replace(tzinfo=UTC)
    heartbeats = EventFilter(
        event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        occurred=EventOccurredFilter(since=since),
    )
    newest = client.read_events(heartbeats, limit=1).events
    return newest[0].occurred if newest else since


if __name__ == "__main__":
    recover()
