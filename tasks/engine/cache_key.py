"""What decides a stage's result: the code that it runs, and its arguments without what is no matter."""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from pydantic import BaseModel, JsonValue

from tasks.engine.artifacts import Artifact, artifacts_in, file_sha256
from tasks.engine.paths import REPOSITORY

OWN_PACKAGES = ("tasks", "grit")
NO_MATTER: dict[str, JsonValue] = {"decides_the_result": False}
"""Marks a setting that decides nothing about the result, and so is no part of a cache key."""


def own_modules(module: str) -> frozenset[str]:
    """The module and all of the project's modules that it imports, directly or not."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        if _source_path(name):
            found.add(name)
            waiting |= _imported(name) - found
    return frozenset(found)


@functools.cache
def _imported(module: str) -> frozenset[str]:
    """Names that a module imports from the project's packages; some are those of functions and classes."""
    path = _source_path(module)
    names = _imports(compile(path.read_bytes(), path, "exec", dont_inherit=True, optimize=0)) if path else ()
    return frozenset(name for name in names if name.split(".")[0] in OWN_PACKAGES)


def _imports(code: CodeType) -> Iterator[str]:
    """Names that some code imports, wherever it can run.

    From its bytecode: in Python 3.11 `ast.parse` raises a SystemError where another thread parses too, or the garbage
    collector calls something that does (https://github.com/python/cpython/issues/106905).
    """
    module = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            module = instruction.argval
            yield module
        elif instruction.opname == "IMPORT_FROM":
            yield f"{module}.{instruction.argval}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports(constant)


@functools.cache
def _source_path(module: str) -> Path | None:
    base = REPOSITORY.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def source_sha256(module: str) -> str:
    """SHA-256 of a module's source; empty where there is none."""
    path = _source_path(module)
    return file_sha256(path) if path else ""


def identity(value: Any, reads: Collection[str] | None = None) -> Any:
    """A stage's argument as JSON values: artifacts by their digest, settings without those that do not matter.

    Args:
        value: the argument.
        reads: the only settings that matter to the stage; none for all.
    """
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, BaseModel):
        if any(True for _ in artifacts_in(value)):
            return {name: identity(getattr(value, name)) for name in type(value).model_fields}
        no_matter = {n for n, field in type(value).model_fields.items() if field.json_schema_extra == NO_MATTER}
        return value.model_dump(mode="json", include=set(reads) if reads else None, exclude=no_matter)
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    return value
