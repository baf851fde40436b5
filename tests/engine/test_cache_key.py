"""What decides a cache key of the code: changes are made to a copy of the checkout, and the stages' keys looked at."""

from __future__ import annotations

import ast
import gc
import re
import shutil
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tasks.engine import cache_key
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.cache_key import LEFT_OUT, code_sha256, identity, own_modules
from tasks.engine.paths import REPOSITORY
from tasks.settings.finetune import LoraSettings
from tests.support.made_artifacts import make

STAGES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in [*REPOSITORY.glob("tasks/*.py"), *REPOSITORY.glob("tasks/comparison/*.py")]
    if "@stage(" in path.read_text(encoding="utf-8")
)
Keys = dict[str, dict[str, str]]


def forget() -> None:
    for function in (cache_key.imported_names, cache_key.source_path, cache_key.source_sha256):
        function.cache_clear()


def keys() -> Keys:
    forget()
    return {module: code_sha256(module) for module in STAGES}


@pytest.fixture(scope="module")
def before() -> Keys:
    """The keys of the code as it is."""
    return keys()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the code that the keys are made of."""
    for package in ("tasks", "grit"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "REPOSITORY", tmp_path)
        yield tmp_path
    forget()


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before, path
    path.write_text(after, encoding="utf-8")


def changed(before: Keys) -> set[str]:
    after = keys()
    return {module.removeprefix("tasks.") for module in STAGES if after[module] != before[module]}


def test_there_are_the_stages_of_both_flows() -> None:
    assert {"tasks.fetch_model", "tasks.train", "tasks.write_report", "tasks.comparison.judge_answers"} <= set(STAGES)
    assert len(STAGES) == 18


def commented(source: str) -> str:
    """The same code with a comment on each line that may have one, with other docstrings, and with more empty lines."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    for node in ast.walk(tree):
        constant = node.value if isinstance(node, ast.Expr) else None
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            text = constant
            first, last = text.lineno - 1, text.end_lineno or text.lineno
            lines[first:last] = [" " * text.col_offset + '"""Other words."""\n', *["\n"] * (last - first - 1)]
    source = "".join(lines)
    ends = {
        token.start[0] - 1
        for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        if token.type == tokenize.NEWLINE
    }
    lines = source.splitlines(keepends=True)
    return "".join(line.rstrip("\n") + "  # a word\n\n" if at in ends else line for at, line in enumerate(lines))


def test_no_comment_and_no_docstring_changes_a_key(checkout: Path, before: Keys) -> None:
    for path in [*checkout.glob("tasks/**/*.py"), *checkout.glob("grit/*.py")]:
        edit(path, commented)
    assert changed(before) == set()


def test_no_line_of_engine_and_settings_changes_a_key(checkout: Path, before: Keys) -> None:
    for package in LEFT_OUT:
        for path in checkout.joinpath(*package.split(".")).glob("*.py"):
            edit(path, lambda source: source + "\nADDED = 1\n")
    assert changed(before) == set()
    assert not any(name.startswith(LEFT_OUT) for names in before.values() for name in names)


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("tasks/merge.py", {"merge"}),
        ("tasks/training/checkpoints.py", {"train", "comparison.reproduce_fault"}),
        ("grit/factors.py", {"train", "comparison.reproduce_fault"}),
        ("tasks/data/shapes.py", {"prepare_dataset"}),
        ("tasks/export/converter.py", {"check_vocabulary", "convert"}),
        ("tasks/ollama/promotion_rule.py", {"promote"}),
    ],
)
def test_a_changed_line_changes_the_stages_that_use_it_and_no_later_one(
    checkout: Path, before: Keys, file: str, stages: set[str]
) -> None:
    """Later stages compute anew where the result is another one, since its digest is in their keys."""
    edit(checkout / file, lambda source: source + "\nADDED = 1\n")
    assert changed(before) == stages


@pytest.mark.parametrize("change", [("0.05", "0.06"), ("if trained >= before:", "if trained > before:")])
def test_a_value_and_an_operator_count(checkout: Path, before: Keys, change: tuple[str, str]) -> None:
    edit(checkout / "tasks/report/sections.py", lambda source: source.replace(*change))
    assert changed(before) == {"write_report"}


def test_an_indentation_counts(checkout: Path) -> None:
    module = checkout / "tasks/stats/standard_errors.py"
    module.write_text("def f(x):\n    if x:\n        x = 1\n    return x\n")
    other = keys()
    module.write_text("def f(x):\n    if x:\n        x = 1\n        return x\n")
    assert "score" in changed(other)


def test_a_name_out_of_a_package_is_refused_since_what_it_stands_for_would_not_be_followed(checkout: Path) -> None:
    (checkout / "tasks/stats/__init__.py").write_text("from tasks.stats.numbers import figure\n")
    edit(checkout / "tasks/merge.py", lambda source: source + "\nfrom tasks.stats import figure\n")
    with pytest.raises(ImportError, match=r"tasks.merge imports tasks.stats.figure from a package"):
        keys()


def test_packages_hold_no_code_that_keys_would_miss() -> None:
    """Rooms have a docstring; of `grit`, which hands names on, and of `tasks` nothing is imported but modules."""
    for path in REPOSITORY.glob("tasks/*/__init__.py"):
        (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr) and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    bare = re.compile(r"^\s*(import (grit|tasks)\b(?!\.)|from grit import)", re.MULTILINE)
    for path in [*REPOSITORY.glob("tasks/**/*.py"), *REPOSITORY.glob("grit/*.py")]:
        if path.name != "__init__.py":
            assert not bare.search(path.read_text(encoding="utf-8")), path


def test_nothing_that_a_stage_makes_is_decided_in_settings() -> None:
    """Their code is in no key: they hold values and check them, and no stage makes settings of its own."""
    for path in REPOSITORY.glob("tasks/settings/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef):
                    decorators = {ast.unparse(node).partition("(")[0] for node in method.decorator_list}
                    assert decorators & {"field_validator", "model_validator"}, f"{path.name}: {method.name}"
    for module in STAGES:
        path = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorated = isinstance(node, ast.FunctionDef) and any(
                "stage(" in ast.unparse(d) for d in node.decorator_list
            )
            calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)] if decorated else []
            settings = [ast.unparse(call.func) for call in calls if ast.unparse(call.func).endswith("Settings")]
            assert not settings, f"{module} makes {settings}"


@dataclass(frozen=True)
class BundleOfDataclass:
    model: Artifact
    lora: LoraSettings
    number: int


class BundleOfModel(BaseModel):
    model: Artifact
    lora: LoraSettings
    number: int


@pytest.mark.parametrize("bundle", [BundleOfDataclass, BundleOfModel])
def test_a_bundle_counts_by_the_digests_and_the_settings_in_it(bundle: Any, store: Store) -> None:
    artifact = make(store, "thing", {"seconds": 1}, a=[1])
    elsewhere = artifact.model_copy(update={"path": store.root / "elsewhere", "facts": {"seconds": 2}})
    keys = [identity(bundle(model=model, lora=LoraSettings(), number=7)) for model in (artifact, elsewhere)]
    assert keys[0] == keys[1] == {"model": artifact.digest, "lora": identity(LoraSettings()), "number": 7}


def test_imports_within_functions_are_followed() -> None:
    assert "tasks.training.run" in own_modules("tasks.train"), "its child process imports it"
    assert "grit.manager" in own_modules("tasks.train")


@pytest.mark.slow
def test_the_imports_are_found_while_something_else_parses() -> None:
    """The garbage collector's callback stands for another thread; Pythons that are mended pass in any case."""
    expected = own_modules("tasks.train")
    parsed = []

    def parse(phase: str, info: object, depth: int = 30) -> None:  # at another depth of calls
        if depth:
            parse(phase, info, depth - 1)
        else:
            parsed.append(ast.parse("x = [1]"))

    cache_key.imported_names.cache_clear()
    thresholds = gc.get_threshold()
    gc.callbacks.append(parse)
    gc.set_threshold(5)
    try:
        modules = own_modules("tasks.train")
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(parse)
    assert parsed and modules == expected
