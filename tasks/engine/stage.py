"""A stage is a Prefect task whose result is cached by what decides it, and whose cached files are looked at.

Prefect returns a cached reference even when the files behind it are gone, so each cached result is verified and
recomputed once where it is not whole.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.runtime import deployment, flow_run
from prefect.serializers import JSONSerializer
from prefect.tasks import exponential_backoff
from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store, artifacts_in, each_artifact, file_sha256
from tasks.engine.cache_key import ENGINE_VERSION, code_sha256, identity
from tasks.engine.errors import TemporaryError, UserError, is_temporary, unwritable
from tasks.engine.locks import device, locked
from tasks.engine.logs import run_logger
from tasks.engine.planning import instead, note

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)
UNATTENDED_RETRIES = 6
"""Of a deployed run: 10, 20, 40 … 320 seconds, ten minutes in all, in which a network or a server may come back."""
SMALL = 256 * 2**20
"""Artifacts up to this many bytes are fetched from the store's URI when they are looked up, since plans read them."""
_branch: ContextVar[str] = ContextVar("_branch", default="")


@contextmanager
def branch_named(name: str) -> Iterator[None]:
    """Within this block the task runs bear the name of a flow's branch in place of the flow run's.

    Args:
        name: such as "grit, seed 3407".
    """
    token = _branch.set(name)
    try:
        yield
    finally:
        _branch.reset(token)


def stage(
    *,
    libraries: tuple[str, ...] = (),
    templates: tuple[Path, ...] = (),
    retries: int = 0,
    watch: Callable[..., str] | None = None,
    reads: Mapping[str, Collection[str]] | None = None,
    still: Callable[..., bool] | None = None,
    alone: bool = False,
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a function a stage. It must take a keyword `store` and return an `Artifact`, or a model of such.

    Args:
        libraries: distributions whose version shapes the result.
        templates: files that count as the stage's code.
        retries: further attempts after a temporary failure, with exponential back-off and jitter; more in a deployed
            run, which nobody waits for.
        watch: called with the stage's arguments (without `store`); what it returns is part of the cache key. For
            what can change outside, such as the newest commit of a Hub repository.
        reads: of an argument's settings those that matter to the stage, where not all do.
        still: called with a cached result and the stage's arguments (without `store`); whether the world outside is
            still as the result says. For stages that act on it.
        alone: no two of these stages run at a time on a GPU.
    """
    return lambda function: Stage(function, libraries, templates, retries, watch, reads or {}, still, alone)


class Stage(Generic[P, R]):
    """One task of the flow. `stage.function` is the plain function, for tests and for use without Prefect."""

    def __init__(
        self,
        function: Callable[P, R],
        libraries: tuple[str, ...],
        templates: tuple[Path, ...],
        retries: int,
        watch: Callable[..., str] | None,
        reads: Mapping[str, Collection[str]],
        still: Callable[..., bool] | None,
        alone: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.libraries, self.watch, self.reads = function, libraries, watch, reads
        self.still, self.alone = still, alone
        self.templates = templates
        self.name = function.__name__

        @functools.wraps(function)
        def portable(*args: P.args, **kwargs: P.kwargs) -> R:
            store = _store(kwargs)
            run_logger().info("Running.")
            try:
                return each_artifact(self.function(*args, **kwargs), store.portable)
            except Exception as error:
                told = isinstance(error, UserError | TemporaryError)
                if not told and (clear := unwritable(error, store.root)):
                    raise clear from error
                raise

        self.task = task(
            name=self.name,
            retries=retries,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_worth_retrying,
        )(portable)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the stage as a Prefect task or take its cached result; within `planning()` only look."""
        if (function := instead.get()) is not None:
            result: R = function(self, *args, **kwargs)
            return result
        store, run = _store(kwargs), self.task.with_options(**self._options(*args))
        key = self.key(*args, **kwargs)
        run = run.with_options(
            persist_result=True,
            result_serializer="json",
            result_storage=store.results,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _context, _parameters: key),
        )
        with locked(store, key, f"computes the same: {self.name}"):
            found = self._bring(store, key, *args, **kwargs)
            with device(store) if self.alone and found is None else nullcontext():
                # Another machine may have made it while this one waited.
                found = found or self._bring(store, key, *args, **kwargs)
                state = run.with_options(refresh_cache=found is None)(*args, **kwargs, return_state=True)
                result = each_artifact(state.result(), store.located)
                self._share(store, key, result, anew=found is None)
        note(self.name, key, result)
        return result

    def _options(self, *args: Any) -> dict[str, Any]:
        tuned = bool(args) and isinstance(args[0], Artifact) and args[0].kind == "merged"
        words = [self.name, "(tuned)" if tuned else "", _branch.get() or flow_run.name or ""]
        options: dict[str, Any] = {"task_run_name": " ".join(filter(None, words))}
        if deployment.id and self.task.retries:
            options |= {"retries": UNATTENDED_RETRIES, "retry_delay_seconds": exponential_backoff(backoff_factor=10)}
        return options

    def _bring(self, within: Store, key: str, *args: Any, **kwargs: Any) -> R | None:
        """The cached result with all of its files on this machine, if it is whole and still true."""
        result: R | None = recorded(within, key)
        if result is not None:
            (within.results / key).touch()  # what was used of late is not pruned
            each_artifact(result, within.bring)
        whole = result is not None and all(one.is_whole() for one in artifacts_in(result))
        return result if whole and self._still_true(result, *args, **kwargs) else None

    def _share(self, store: Store, key: str, result: R, anew: bool) -> None:
        """Write a result to the store's URI, the record last, unless it is there."""
        name = f"{store.results.name}/{key}"
        if store.remote and (anew or not store.remote.holds(name)):
            each_artifact(result, store.share)
            store.remote.push(store.results / key, name)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The cache key: name, arguments, code, templates, versions of engine and libraries, and what is watched."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "store"}
        decides = {
            "arguments": {name: identity(value, self.reads.get(name)) for name, value in arguments.items()},
            "engine": ENGINE_VERSION,
            "code": code_sha256(self.function.__module__),
            "templates": {path.name: file_sha256(path) for path in self.templates},
            "libraries": {name: version(name) for name in self.libraries},
            "watched": self.watch(**arguments) if self.watch else "",
        }
        return f"{self.name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}"

    def look_up(self, key: str, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The cached result of that key, if its files are whole, here or at the store's URI, and it is still true."""
        store = _store(kwargs)
        result: R | None = recorded(store, key)
        if result is None:
            return None
        for artifact in artifacts_in(result):
            if artifact.size <= SMALL:
                store.bring(artifact)
        whole = all(map(store.holds, artifacts_in(result)))
        return result if whole and self._still_true(result, *args, **kwargs) else None

    def _still_true(self, result: R | None, *args: Any, **kwargs: Any) -> bool:
        arguments = {name: value for name, value in kwargs.items() if name != "store"}
        return self.still is None or self.still(result, *args, **arguments)


def recorded(store: Store, key: str) -> Any:
    """The result that a record holds, fetched from the store's URI where needed; none if it cannot be read."""
    record = store.results / key
    if store.remote and not record.is_file() and store.remote.holds(f"{store.results.name}/{key}"):
        store.remote.pull(f"{store.results.name}/{key}", record)
    if not record.is_file():
        return None
    records = ResultStore(result_storage=LocalFileSystem(basepath=str(store.results)), serializer=JSONSerializer())
    try:
        result = records.read(key).result
    except Exception:  # whatever ails a record, computing anew mends it; Prefect's own look-up does the same
        return None
    return each_artifact(result, store.located) if isinstance(result, BaseModel) else None


def _store(kwargs: dict[str, Any]) -> Store:
    store = kwargs["store"]
    if not isinstance(store, Store):
        raise TypeError("a stage takes its store as the keyword argument `store`")
    return store


async def _worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    try:
        await state.aresult()
    except Exception as error:
        return is_temporary(error)
    return False
