"""Ways to go through a flow without running it as one: looking only, or calling its stages as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel


class AnyStage(Protocol):
    """What is asked of a stage here, see `tasks.engine.stage.Stage`."""

    name: str
    function: Callable[..., Any]

    def key(self, *args: Any, **kwargs: Any) -> str:
        """Its cache key with these arguments."""

    def look_up(self, key: str, *args: Any, **kwargs: Any) -> BaseModel | None:
        """Its cached result, if there is one that is whole."""


class Pending:
    """Stands for the result of a stage that would run, and for whatever is read from it."""

    def __getattr__(self, name: str) -> Pending:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Pending:
        """Whatever is called on it is pending too."""
        return self


@dataclass
class Plan:
    """What a run would do, or has done: the state of each stage, in order."""

    stages: list[tuple[str, str]] = field(default_factory=list)
    """Name and `cached`, `to run`, or `done`."""
    found: list[tuple[str, BaseModel]] = field(default_factory=list)
    """Name and result of the cached or done stages."""
    keys: list[str] = field(default_factory=list)
    """Cache keys of the stages whose arguments are known."""

    def visit(self, visited: AnyStage, *args: Any, **kwargs: Any) -> Any:
        """Look a stage up; what is not cached is pending, and so are the stages after it."""
        pending = any(isinstance(value, Pending) for value in [*args, *kwargs.values()])
        key = None if pending else visited.key(*args, **kwargs)
        result = visited.look_up(key, *args, **kwargs) if key else None
        self.keys += [key] if key else []
        self.stages.append((visited.name, "to run" if result is None else "cached"))
        if result is None:
            return Pending()
        self.found.append((visited.name, result))
        return result

    def result_of(self, name: str) -> Any:
        """What the first stage of this name has made; none if it is still to run."""
        state = next((state for stage, state in self.stages if stage == name), "to run")
        return None if state == "to run" else dict(reversed(self.found))[name]


instead: ContextVar[Callable[..., Any] | None] = ContextVar("instead", default=None)
"""Called with a stage and its arguments in place of running it."""


@contextmanager
def _calling(function: Callable[..., Any]) -> Iterator[None]:
    token = instead.set(function)
    try:
        yield
    finally:
        instead.reset(token)


@contextmanager
def planning() -> Iterator[Plan]:
    """Within this block stages are looked up and not run."""
    plan = Plan()
    with _calling(plan.visit):
        yield plan


def looking() -> bool:
    """Whether stages are not run as tasks now, but looked up or called."""
    return instead.get() is not None


_done: ContextVar[Plan | None] = ContextVar("_done", default=None)


@contextmanager
def recording() -> Iterator[Plan]:
    """Record the stages that run within this block, or are taken from the cache.

    Looking them up afterwards could tell of others, since what they read may have changed meanwhile.
    """
    plan = Plan()
    token = _done.set(plan)
    try:
        yield plan
    finally:
        _done.reset(token)


def note(name: str, key: str, result: BaseModel) -> None:
    """Add a stage to what is recorded, if anything is.

    Args:
        name: the stage's.
        key: its cache key.
        result: what it returned.
    """
    if (plan := _done.get()) is not None:
        plan.stages.append((name, "done"))
        plan.found.append((name, result))
        plan.keys.append(key)


@contextmanager
def without_prefect() -> Iterator[None]:
    """Within this block stages are plain functions: no cache, no retries, no server."""
    with _calling(lambda called, *args, **kwargs: called.function(*args, **kwargs)):
        yield
