"""Ways to go through a flow without running it as one: looking only, or calling its stages as plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel


class AnyStage(Protocol):
    """What is asked of a stage here, see `tasks.engine.stage.Stage`."""

    name: str
    function: Callable[..., Any]

    def key(self, *args: Any, **kwargs: Any) -> str:
        """Its cache key with these arguments."""

    def look_up(self, key: str, /, *args: Any, **kwargs: Any) -> BaseModel | None:
        """Its cached result, if there is one that is whole."""


class Pending:
    """Stands for the result of a stage that would run, and for whatever is read from it.

    It has what its type has: a misspelt name is found out in a plan, and not hours later. Of the unknown type anything
    may be read, and anything called.

    Args:
        kind: the type that the result will have; `Any` where that is unknown.
        source: whose result it is, or was read from; named where something is asked for that it lacks.
    """

    __iter__ = None  # `for` would otherwise ask for the items 0, 1, 2 … without an end

    def __init__(self, kind: Any = Any, source: str = "a stage") -> None:
        self._kind, self._source = _class_of(kind), source

    def __getattr__(self, name: str) -> Pending:
        if name.startswith("_"):  # what `copy` and the like look for, even before there is a type
            raise AttributeError(name)
        return Pending(Any if self._kind is Any else self._type_of(name), self._source)

    def __getitem__(self, key: object) -> Pending:
        if self._kind is not Any and not hasattr(self._kind, "__getitem__"):
            raise TypeError(f"the result of {self._source}: {self._kind.__name__} holds no {key!r}")
        return Pending(Any, self._source)

    def __call__(self, *args: Any, **kwargs: Any) -> Pending:
        """What a pending function returns, which is of unknown type."""
        if self._kind is not Any:
            raise TypeError(f"the result of {self._source}: {self._kind.__name__} cannot be called")
        return Pending(Any, self._source)

    def _type_of(self, name: str) -> Any:
        """The annotated type of an attribute; unknown for methods."""
        annotated = _fields(self._kind)
        if name in annotated:
            return annotated[name]
        attribute = inspect.getattr_static(self._kind, name, None)
        if attribute is None:
            others = (other for other in vars(self._kind) if other[0] != "_" and not hasattr(BaseModel, other))
            names = ", ".join(dict.fromkeys([*annotated, *others]))
            raise AttributeError(f"the result of {self._source}: {self._kind.__name__} has no {name}; it has {names}")
        if isinstance(attribute, property):
            return get_type_hints(attribute.fget).get("return", Any)
        if isinstance(attribute, cached_property):
            return get_type_hints(attribute.func).get("return", Any)
        return Any


def _class_of(kind: Any) -> Any:
    """The class that an annotation stands for, of an optional one the class that is not None; or `Any`."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [option for option in get_args(kind) if option is not NoneType]
        return _class_of(kinds[0]) if len(kinds) == 1 else Any
    kind = get_origin(kind) or kind
    return kind if isinstance(kind, type) else Any


def _fields(kind: type) -> dict[str, Any]:
    """The fields of a model, a dataclass or a named tuple with their types."""
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind)


def is_pending(value: Any) -> bool:
    """Whether a value is pending, or holds what is: a list, a tuple, a mapping, a model, or a dataclass.

    Args:
        value: a stage's argument.
    """
    if isinstance(value, Mapping):
        return any(map(is_pending, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_pending, value))
    if isinstance(value, BaseModel):  # one that `model_construct` has made may lack some of its fields
        return any(map(is_pending, vars(value).values()))
    if is_dataclass(value):
        return any(is_pending(getattr(value, part.name)) for part in fields(value))
    return isinstance(value, Pending)


@dataclass
class Plan:
    """What a run would do, or has done: the state of each stage, in order."""

    stages: list[tuple[str, str]] = field(default_factory=list)
    """Name and `cached`, `to run`, or `done`."""
    results: list[tuple[str, BaseModel]] = field(default_factory=list)
    """Name and result of the cached or done stages."""
    keys: list[str] = field(default_factory=list)
    """Cache keys of the stages whose arguments are known."""

    def visit(self, visited: AnyStage, /, **arguments: Any) -> Any:
        """Look a stage up; what is not cached is pending, and so are the stages after it.

        Args:
            arguments: all that it is called with, by name.
        """
        key = None if is_pending(arguments) else visited.key(**arguments)
        result = visited.look_up(key, **arguments) if key else None
        self.keys += [key] if key else []
        self.stages.append((visited.name, "to run" if result is None else "cached"))
        if result is None:
            return Pending(get_type_hints(visited.function).get("return", Any), visited.name)
        self.results.append((visited.name, result))
        return result

    def result_of(self, name: str) -> Any:
        """What the first stage of this name has made; none if it is still to run."""
        state = next((state for stage, state in self.stages if stage == name), "to run")
        return None if state == "to run" else dict(reversed(self.results))[name]


instead: ContextVar[Callable[..., Any] | None] = ContextVar("instead", default=None)
"""Called with a stage, and with its arguments by name, in place of running it."""


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


_current: ContextVar[Plan | None] = ContextVar("_current", default=None)


@contextmanager
def recording() -> Iterator[Plan]:
    """Record the stages that run within this block, or are taken from the cache.

    Looking them up afterwards could tell of others, since what they read may have changed meanwhile.
    """
    plan = Plan()
    token = _current.set(plan)
    try:
        yield plan
    finally:
        _current.reset(token)


def note(name: str, key: str, result: BaseModel) -> None:
    """Add a stage to what is recorded, if anything is.

    Args:
        name: the stage's.
        key: its cache key.
        result: what it returned.
    """
    if (plan := _current.get()) is not None:
        plan.stages.append((name, "done"))
        plan.results.append((name, result))
        plan.keys.append(key)


@contextmanager
def without_prefect() -> Iterator[None]:
    """Within this block stages are plain functions: no cache, no retries, no server."""
    with _calling(lambda called, /, **arguments: called.function(**arguments)):
        yield
