"""A stage is a Prefect task whose result is cached by what decides it, and whose cached files are looked at.

Prefect returns a cached reference even when the files behind it are gone, so each cached result is verified and
recomputed once where it is not whole.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from filelock import FileLock, Timeout
from prefect import get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer
from prefect.tasks import exponential_backoff
from pydantic import BaseModel

from tasks.artifacts import Artifact, Store, file_sha256
from tasks.errors import is_temporary
from tasks.settings import NO_MATTER

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)
ROOT = Path(__file__).resolve().parent.parent
OWN_PACKAGES = ("tasks", "grit")


def stage(
    *,
    libraries: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    retries: int = 0,
    watch: Callable[..., str] | None = None,
    cached: bool = True,
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a function a stage. It must take a keyword `store` and return an `Artifact`, or a model of such.

    Args:
        libraries: distributions whose version shapes the result.
        templates: files beside the stage's module that count as its code.
        retries: further attempts after a temporary failure, with exponential back-off and jitter.
        watch: called with the stage's arguments (without `store`); what it returns is part of the cache key. For
            what can change outside, such as the newest commit of a Hub repository.
        cached: false for stages that act on the outside world and are cheap to repeat.
    """
    return lambda function: Stage(function, libraries, templates, retries, watch, cached)


class Stage(Generic[P, R]):
    """One task of the flow. `stage.function` is the plain function, for tests and for use without Prefect."""

    def __init__(
        self,
        function: Callable[P, R],
        libraries: tuple[str, ...],
        templates: tuple[str, ...],
        retries: int,
        watch: Callable[..., str] | None,
        cached: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.libraries, self.watch, self.cached = function, libraries, watch, cached
        self.templates = [Path(inspect.getfile(function)).with_name(name) for name in templates]
        self.name = function.__name__
        self.task = task(
            name=self.name,
            retries=retries,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_worth_retrying,
        )(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the stage as a Prefect task or take its cached result; within `planning()` only look."""
        if (instead := _instead.get()) is not None:
            return instead(self, *args, **kwargs)
        if not self.cached:
            return self.task(*args, **kwargs)
        key = self.key(*args, **kwargs)
        run = self.task.with_options(
            persist_result=True,
            result_serializer="json",
            result_storage=_store(kwargs).results,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _context, _parameters: key),
        )
        with _alone(_store(kwargs), key):
            state = run(*args, **kwargs, return_state=True)
            result = state.result()
            if state.name == "Cached" and not is_whole(result):
                result = run.with_options(refresh_cache=True)(*args, **kwargs)
        return result

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The cache key: name, arguments (artifacts by digest), code, library versions, and what is watched."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "store"}
        decides = {
            "arguments": {name: _identity(value) for name, value in arguments.items()},
            "code": {name: _source_sha256(name) for name in sorted(own_modules(self.function.__module__))},
            "templates": {path.name: file_sha256(path) for path in self.templates},
            "libraries": {name: version(name) for name in self.libraries},
            "watched": self.watch(**arguments) if self.watch else "",
        }
        return f"{self.name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}"

    def look_up(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The cached result, if there is one and its files are whole."""
        store, key = _store(kwargs), self.key(*args, **kwargs)
        if not self.cached or not (store.results / key).is_file():
            return None
        records = ResultStore(result_storage=LocalFileSystem(basepath=str(store.results)), serializer=JSONSerializer())
        try:
            result: R = records.read(key).result
        except Exception:  # whatever ails a record, computing anew mends it; Prefect's own look-up does the same
            return None
        return result if is_whole(result) else None


class Pending:
    """Stands for the result of a stage that would run, and for whatever is read from it."""

    def __init__(self, certain: bool = True) -> None:
        self.certain = certain
        """Whether the stage is bound to run anew, or only may be since it follows one that always runs."""

    def __getattr__(self, name: str) -> Pending:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Pending:
        """Whatever is called on it is pending too."""
        return self


@dataclass
class Plan:
    """What a run would do: the state of each stage, in order."""

    stages: list[tuple[str, str]] = field(default_factory=list)
    """Name and `cached`, `to run`, `always runs`, or `if something changed` after one that always runs."""
    found: list[tuple[str, BaseModel]] = field(default_factory=list)
    """Name and result of the cached stages."""

    def visit(self, visited: Stage[Any, R], *args: Any, **kwargs: Any) -> Any:
        """Look a stage up; what is not cached is pending, and so are the stages after it."""
        pending = [value for value in [*args, *kwargs.values()] if isinstance(value, Pending)]
        result = None if pending else visited.look_up(*args, **kwargs)
        certain = visited.cached and (any(value.certain for value in pending) or not pending)
        if result is not None:
            state = "cached"
        elif visited.cached:
            state = "to run" if certain else "if something changed"
        else:
            state = "always runs"
        self.stages.append((visited.name, state))
        if result is None:
            return Pending(certain)
        self.found.append((visited.name, result))
        return result


_instead: ContextVar[Callable[..., Any] | None] = ContextVar("instead", default=None)


@contextmanager
def _calling(instead: Callable[..., Any]) -> Iterator[None]:
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)


@contextmanager
def planning() -> Iterator[Plan]:
    """Within this block stages are looked up and not run."""
    plan = Plan()
    with _calling(plan.visit):
        yield plan


@contextmanager
def without_prefect() -> Iterator[None]:
    """Within this block stages are plain functions: no cache, no retries, no server."""
    with _calling(lambda called, *args, **kwargs: called.function(*args, **kwargs)):
        yield


@contextmanager
def _alone(store: Store, key: str) -> Iterator[None]:
    """Let no other run compute the same; it then finds the result cached. The system unlocks for a dead process."""
    lock = FileLock(store.locks / f"{key}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        get_run_logger().info("Waiting for another run, which computes the same: %s", key.rpartition("-")[0])
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_whole(result: object) -> bool:
    """Say whether every artifact in a result is whole; what a damaged record gives instead of a result is not."""
    return isinstance(result, BaseModel) and all(artifact.is_whole() for artifact in artifacts_in(result))


def artifacts_in(result: BaseModel) -> Iterator[Artifact]:
    """All artifacts in a result."""
    if isinstance(result, Artifact):
        yield result
    else:
        for name in type(result).model_fields:
            if isinstance(value := getattr(result, name), BaseModel):
                yield from artifacts_in(value)


@functools.cache
def own_modules(module: str) -> frozenset[str]:
    """The module and all of the project's modules that it imports, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name.split(".")[0] not in OWN_PACKAGES or (path := _source_path(name)) is None:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(found)


def _source_path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def _source_sha256(module: str) -> str:
    path = _source_path(module)
    return file_sha256(path) if path else ""


def _identity(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, BaseModel):
        if any(True for _ in artifacts_in(value)):
            return {name: _identity(getattr(value, name)) for name in type(value).model_fields}
        no_matter = {n for n, field in type(value).model_fields.items() if field.json_schema_extra == NO_MATTER}
        return value.model_dump(mode="json", exclude=no_matter)
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    return value


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
