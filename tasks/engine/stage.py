"""A stage is a Prefect task whose result is cached by what decides it, and whose cached files are looked at.

Prefect returns a cached reference even when the files behind it are gone, so each cached result is verified and
recomputed once where it is not whole.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.runtime import deployment, flow_run
from prefect.serializers import JSONSerializer
from prefect.tasks import Task, exponential_backoff
from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store, artifacts_in, each_artifact, file_sha256
from tasks.engine.cache_key import ENGINE_VERSION, code_sha256, identity
from tasks.engine.display import display
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


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What decides a stage's result beside its code and arguments, and how it is run.

    As a decorator, `@stage(...)`, it makes a function a stage. The function must take a keyword `store` and return an
    `Artifact`, or a model of such, which its return annotation names.
    """

    libraries: tuple[str, ...] = ()
    """Distributions whose version shapes the result."""
    templates: tuple[Path, ...] = ()
    """Files that count as the stage's code."""
    retries: int = 0
    """Further attempts after a temporary failure, with exponential back-off and jitter; more in a deployed run, which
    nobody waits for."""
    watch: Callable[..., str] | None = None
    """Called with the stage's arguments by name (without `store`); what it returns is part of the cache key. For what
    can change outside, such as the newest commit of a Hub repository."""
    reads: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Of an argument's settings those that matter to the stage, where not all do."""
    still: Callable[..., bool] | None = None
    """Called with a cached result, and with the stage's arguments by name (without `store`); whether the world outside
    is still as the result says. For stages that act on it."""
    alone: bool = False
    """No two of these stages run at a time on a GPU."""

    def __call__(self, function: Callable[P, R]) -> Stage[P, R]:
        """Make a function a stage."""
        return Stage(function, self)


stage = StageOptions
"""The decorator, by the name that reads well over a function."""


class Stage(Generic[P, R]):
    """One task of the flow. `stage.function` is the plain function, for tests and for use without Prefect.

    Args:
        function: computes the result.
        options: what else decides the result, and how it is run.
    """

    def __init__(self, function: Callable[P, R], options: StageOptions) -> None:
        functools.update_wrapper(self, function)
        self.function, self.options, self.name = function, options, function.__name__
        self.task: Task[..., R] = task(
            name=self.name,
            retries=options.retries,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_worth_retrying,
        )(self._portable())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the stage as a Prefect task or take its cached result; within `planning()` only look."""
        arguments = self.by_name(*args, **kwargs)
        if (function := instead.get()) is not None:
            result: R = function(self, **arguments)
            return result
        label, began = self._label(arguments), time.monotonic()
        display().begins(label)
        computed, is_cached = None, False
        try:
            key, computed, is_cached = self._cached_or_run(arguments)
        finally:
            display().ends(label, time.monotonic() - began, computed, is_cached=is_cached)
        note(self.name, key, computed)
        return computed

    def _cached_or_run(self, arguments: Mapping[str, Any]) -> tuple[str, R, bool]:
        """The cache key, the result, and whether that was cached."""
        store, key = arguments["store"], self._key(arguments)
        with locked(store, key, f"computes the same: {self.name}"):
            cached = self._whole_here(key, arguments)
            with device(store) if self.options.alone and cached is None else nullcontext():
                # Another machine may have made it while this one waited.
                cached = cached or self._whole_here(key, arguments)
                result = self._run(key, arguments, anew=cached is None)
                self._share(key, result, store, anew=cached is None)
        return key, result, cached is not None

    def by_name(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """All arguments of a call by their names, in the function's order, defaults among them.

        Raises:
            TypeError: the function does not take these, or `store` is no store.
        """
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        if not isinstance(bound.arguments.get("store"), Store):
            raise TypeError("a stage takes its store as the keyword argument `store`")
        return dict(bound.arguments)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The cache key: name, arguments, code, templates, versions of engine and libraries, and what is watched."""
        return self._key(self.by_name(*args, **kwargs))

    def look_up(self, key: str, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The cached result of that key, if its files are whole, here or at the store's URI, and it is still true."""
        arguments = self.by_name(*args, **kwargs)
        store = arguments["store"]
        result: R | None = cached_result(store, key)
        if result is None:
            return None
        for artifact in artifacts_in(result):
            if artifact.size <= SMALL:
                store.bring(artifact)
        whole = all(map(store.holds, artifacts_in(result)))
        return result if whole and self._is_still_true(result, arguments) else None

    def _key(self, arguments: Mapping[str, Any]) -> str:
        deciding = _without_store(arguments)
        options = self.options
        decides = {
            "arguments": {name: identity(value, options.reads.get(name)) for name, value in deciding.items()},
            "engine": ENGINE_VERSION,
            "code": code_sha256(self.function.__module__),
            "templates": {path.name: file_sha256(path) for path in options.templates},
            "libraries": {name: version(name) for name in options.libraries},
            "watched": options.watch(**deciding) if options.watch else "",
        }
        return f"{self.name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}"

    def _whole_here(self, key: str, arguments: Mapping[str, Any]) -> R | None:
        """The cached result with all of its files on this machine, if it is whole and still true."""
        store = arguments["store"]
        result: R | None = cached_result(store, key)
        if result is None:
            return None
        (store.results / key).touch()  # what was used of late is not pruned
        each_artifact(result, store.bring)
        whole = all(artifact.is_whole() for artifact in artifacts_in(result))
        return result if whole and self._is_still_true(result, arguments) else None

    def _is_still_true(self, result: R, arguments: Mapping[str, Any]) -> bool:
        still = self.options.still
        return still is None or still(result, **_without_store(arguments))

    def _run(self, key: str, arguments: Mapping[str, Any], *, anew: bool) -> R:
        """The result of a task run, which computes it, or takes what is recorded under the key."""
        store = arguments["store"]
        run = self.task.with_options(
            task_run_name=self._run_name(arguments),
            persist_result=True,
            result_serializer="json",
            result_storage=store.results,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _context, _parameters: key),
            refresh_cache=anew,
            **self._patience(),
        )
        state = run(**arguments, return_state=True)
        return each_artifact(state.result(), store.located)

    def _run_name(self, arguments: Mapping[str, Any]) -> str:
        """The stage, which model it is about, and which run or branch it belongs to."""
        return f"{self._label(arguments)} {'' if _branch.get() else flow_run.name or ''}".strip()

    def _label(self, arguments: Mapping[str, Any]) -> str:
        """The stage, which model it is about, and which branch of a comparison it belongs to."""
        about = next(iter(arguments.values()))
        is_tuned = isinstance(about, Artifact) and about.kind == "merged"
        return " ".join(filter(None, [self.name, "(tuned)" if is_tuned else "", _branch.get()]))

    def _patience(self) -> dict[str, Any]:
        """More attempts than the task's own where nobody waits for the run."""
        if not (deployment.id and self.options.retries):
            return {}
        return {"retries": UNATTENDED_RETRIES, "retry_delay_seconds": exponential_backoff(backoff_factor=10)}

    def _share(self, key: str, result: R, store: Store, *, anew: bool) -> None:
        """Write a result to the store's URI, the record last, unless it is there."""
        name = f"{store.results.name}/{key}"
        if store.remote and (anew or not store.remote.holds(name)):
            each_artifact(result, store.share)
            store.remote.push(store.results / key, name)

    def _portable(self) -> Callable[P, R]:
        """The function with a result that names no place of this machine, and with clear words for a full disk."""

        @functools.wraps(self.function)
        def portable(*args: P.args, **kwargs: P.kwargs) -> R:
            store = self.by_name(*args, **kwargs)["store"]
            run_logger().info("Running.")
            try:
                return each_artifact(self.function(*args, **kwargs), store.portable)
            except Exception as error:
                is_clear = isinstance(error, UserError | TemporaryError)
                if not is_clear and (clear := unwritable(error, store.root)):
                    raise clear from error
                raise

        return portable


def cached_result(store: Store, key: str) -> Any:
    """The result that is recorded under a key, whole or not; none if the record cannot be read.

    Args:
        store: where; the record is fetched from its URI where needed.
        key: a stage's cache key.
    """
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


def _without_store(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "store"}


async def _worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    try:
        await state.aresult()
    except Exception as error:
        return is_temporary(error)
    return False
