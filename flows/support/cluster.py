"""Branches of a flow on a Dask or Ray cluster, ahead of the flow, which then finds what they have made in its cache.

They run as Prefect tasks through Prefect's own task runners. The flow goes through its stages itself in any case, so
that its order, its records and its report are the same with a cluster and without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner
from prefect.transactions import CommitMode, transaction

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.display import announce
from tasks.engine.errors import TrainingError, UserError
from tasks.engine.logs import run_logger
from tasks.engine.planning import looking, planning
from tasks.engine.stage import branch_named

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Branch:
    """A part of a flow that hangs on no other."""

    name: str
    function: Callable[..., Any]
    """Of a module, so that workers can import it."""
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        """Run it here; its task runs bear its name."""
        with branch_named(self.name):
            return self.function(*self.arguments)


def run_on_cluster(
    address: str | None, branches: Mapping[K, Branch], inputs: Sequence[Artifact], store: Store
) -> dict[K, TrainingError]:
    """Run on a cluster what of these branches is not cached.

    A branch that fails for another reason, such as a worker's death, is only warned of: the flow will run it itself.

    Args:
        address: of the scheduler; none: nothing is done.
        branches: what to run.
        inputs: the artifacts that they start from.
        store: where those are, and the results go: a directory that the workers share, or one on each and a URI.

    Returns:
        Why trainings came to nothing, which would come again.

    Raises:
        UserError: no cluster answers, or Prefect's task runner for it is not installed.
    """
    if address is None or looking():
        return {}
    due = {key: branch for key, branch in branches.items() if _is_due(branch)}
    if not due:
        return {}
    failures: dict[K, TrainingError] = {}
    given = {"inputs": tuple(inputs), "store": Store(store.root, store.uri)}
    with _task_runner(address) as runner:
        announce(f"{len(due)} branches go to the cluster at {address}")
        futures = {
            key: runner.submit(on_worker.with_options(task_run_name=branch.name), {"branch": branch, **given})
            for key, branch in due.items()
        }
        for key, future in futures.items():
            try:
                error = future.result()
            except Exception as trouble:
                run_logger().warning("%s failed on the cluster and runs here: %r", due[key].name, trouble)
            else:
                failures |= {key: error} if error else {}
    return failures


@task(cache_policy=NO_CACHE, persist_result=False)
def on_worker(branch: Branch, inputs: tuple[Artifact, ...], store: Store) -> TrainingError | None:
    """Run a branch for its cached results, and return only why there are none."""
    for artifact in inputs:
        if not store.bring(artifact).is_whole():
            raise FileNotFoundError(f"{artifact.path} is not on this worker: without a shared disk, set store_uri")
    try:
        with transaction(commit_mode=CommitMode.EAGER):  # else no stage is recorded until the last one has ended
            branch.run()
    except TrainingError as error:
        return error
    return None


def _is_due(branch: Branch) -> bool:
    with planning() as plan:
        branch.run()
    return any(state == "to run" for _, state in plan.stages)


@contextmanager
def _task_runner(address: str) -> Iterator[TaskRunner[Any]]:
    library = "prefect-ray" if address.startswith("ray://") else "prefect-dask"
    with ExitStack() as stack:
        try:
            runner = _ray(address, stack) if library == "prefect-ray" else _dask(address, stack)
        except ImportError:
            fix = "Install it here and on the workers: `make setup-test`, or the extra `cluster`."
            raise UserError(f"Prefect's task runner {library} is not installed", where="cluster", fix=fix) from None
        except (OSError, ValueError) as error:
            fix = "Start a scheduler there, or leave the setting out."
            raise UserError(f"no cluster answers at {address}: {error}", where="cluster", fix=fix) from None
        yield runner


def _dask(address: str, stack: ExitStack) -> TaskRunner[Any]:
    from prefect_dask import DaskTaskRunner

    runner = stack.enter_context(DaskTaskRunner(address=address))
    _ = runner.client  # connects now, rather than at the first task
    return runner


def _ray(address: str, stack: ExitStack) -> TaskRunner[Any]:
    import ray
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    runner = stack.enter_context(RayTaskRunner(address))
    if ray.cluster_resources().get("GPU"):
        stack.enter_context(remote_options(num_gpus=1))  # Ray hides its GPUs from tasks that ask for none
    return runner
