"""What decides a stage's result: the code that it runs, and its arguments without what is no matter."""

from __future__ import annotations

import dis
import functools
import hashlib
import io
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from pydantic import BaseModel, JsonValue

from tasks.engine.artifacts import Artifact, artifacts_in
from tasks.engine.paths import REPOSITORY

OWN_PACKAGES = ("tasks", "grit")
LEFT_OUT = ("tasks.engine", "tasks.settings")
"""Packages whose code is no part of a key: the engine decides when and where a stage runs; settings are arguments."""
ENGINE_VERSION = 1
"""Part of every key, in place of the engine's code. Raise it with a change that makes stages' results other ones."""
NO_MATTER: dict[str, JsonValue] = {"decides_the_result": False}
"""Marks a setting that decides nothing about the result, and so is no part of a cache key."""
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


def code_sha256(module: str) -> dict[str, str]:
    """SHA-256 of the code that a module runs, by module: its own, and that of the project's modules that it imports.

    Args:
        module: a stage's.

    Raises:
        ImportError: one of them imports a name from a package in place of the module that defines it.
    """
    return {name: source_sha256(name) for name in sorted(own_modules(module))}


def own_modules(module: str) -> frozenset[str]:
    """The module and all of the project's modules that it imports, directly or not, without those left out of keys.

    Raises:
        ImportError: one of them imports a name from a package in place of the module that defines it.
    """
    modules: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        if source_path(name) and not any(f"{name}.".startswith(f"{package}.") for package in LEFT_OUT):
            modules.add(name)
            waiting |= imported_names(name) - modules
    return frozenset(modules)


@functools.cache
def imported_names(module: str) -> frozenset[str]:
    """Names that a module imports from the project's packages; some are those of functions and classes.

    Raises:
        ImportError: it imports a name from a package in place of the module that defines it.
    """
    path = source_path(module)
    names = set(_imports(compile(path.read_bytes(), path, "exec", dont_inherit=True, optimize=0))) if path else set()
    ours = frozenset(name for name in names if name.split(".")[0] in OWN_PACKAGES)
    for name in ours:
        package = source_path(name.rpartition(".")[0])
        if package and package.name == "__init__.py" and not source_path(name):
            # What the name stands for could change without a change to any module that is found from here.
            raise ImportError(f"{module} imports {name} from a package: import it from the module that defines it")
    return ours


def _imports(code: CodeType) -> Iterator[str]:
    """Names that some code imports, wherever it can run. Relative imports, which ruff forbids, are not seen.

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
def source_path(module: str) -> Path | None:
    """The file that holds a module's code; none where no such module is."""
    base = REPOSITORY.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def source_sha256(module: str) -> str:
    """SHA-256 of a module's code without comments, docstrings and layout; empty where there is no such module."""
    path = source_path(module)
    return hashlib.sha256("\0".join(_code(path.read_text(encoding="utf-8"))).encode()).hexdigest() if path else ""


def _code(source: str) -> Iterator[str]:
    """The tokens of a source by statement; a statement that is only a text is a docstring, or has no effect.

    Python 3.12 cuts f-strings into more tokens than 3.11, so that a key can differ between the two.
    """
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if any(part.type != tokenize.STRING for part in statement):
                yield from (part.string for part in statement)
                yield tokenize.tok_name[tokenize.NEWLINE]
            statement = []
            if token.type != tokenize.NEWLINE:
                yield tokenize.tok_name[token.type]
        elif token.type not in _LAYOUT:
            statement.append(token)


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
    if is_dataclass(value):
        return {part.name: identity(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    return value
