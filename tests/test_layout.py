"""The layout: tests mirror the rooms, what several of them share is no test, and hooks run what lint runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


def test_no_test_and_no_helper_imports_a_test_or_a_conftest() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 100
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                imported = parts[0] == "tests" and any(part.startswith(("test_", "conftest")) for part in parts[1:])
                assert not imported, f"{file.relative_to(TESTS)} imports {name}"


def test_every_folder_of_tests_is_named_like_what_it_tests() -> None:
    rooms = {path.parent.name for path in REPOSITORY.glob("tasks/*/__init__.py")}
    own = {"benchmarks", "flows", "grit", "standins", "support"}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= folders <= rooms | own
    assert not list(TESTS.joinpath("support").rglob("test_*.py"))


def test_a_folder_of_tests_holds_files_that_pytest_reads() -> None:
    """A file with another name would never run."""
    helpers = {TESTS / "support", TESTS / "standins"}
    for file in TESTS.rglob("*.py"):
        read = file.name.startswith("test_") or file.name in ("conftest.py", "__init__.py")
        assert read or helpers & set(file.parents), f"{file.relative_to(TESTS)} is neither a test nor a helper"
        assert file.with_name("__init__.py").is_file()


def unread(text: str) -> list[str]:
    """Functions and classes of a file of tests that pytest does not take for tests and that nothing there uses."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    definitions = [node for owner in (tree, *classes) for node in owner.body if hasattr(node, "decorator_list")]
    return [
        node.name
        for node in definitions
        if not node.name.startswith(("test_", "Test", "__"))
        and node.name not in used
        and all(re.match(r"pytest\.mark|given|settings|example", ast.unparse(mark)) for mark in node.decorator_list)
    ]


def test_a_misspelt_test_is_seen() -> None:
    marked = "@pytest.mark.parametrize('a', [1])\ndef tset_a(a): ...\n"
    classes = "class TestB:\n  def tset_c(self): ...\nclass Checks: ...\n"
    read = "@pytest.fixture\ndef a(): ...\ndef helper(): ...\ndef test_b(a): helper()\n"
    assert unread(marked + classes + read) == ["tset_a", "Checks", "tset_c"]
    for file in TESTS.rglob("test_*.py"):
        assert not unread(file.read_text(encoding="utf-8")), file.relative_to(TESTS)


def test_at_most_sixteen_files_lie_beside_the_rooms() -> None:
    files = list(REPOSITORY.glob("tasks/*.py"))
    assert len(files) <= 16
    stages = [path for path in [*files, *REPOSITORY.glob("tasks/comparison/*.py")] if path.name != "__init__.py"]
    assert all(f"def {path.stem}(" in path.read_text(encoding="utf-8") for path in stages)


def test_the_commit_hooks_run_what_lint_runs() -> None:
    """All but the pages that the last one reads: those are the hook's `files`."""
    (repository,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    recipe = (REPOSITORY / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    *others, prose = commands
    assert hooks[:-1] == others
    script, pages = prose.split()[:2], prose.split()[2:]
    assert hooks[-1].split() == script
    read = re.compile(repository["hooks"][-1]["files"])
    files = {path for page in pages for path in REPOSITORY.glob(page)}
    assert files and all(read.search(path.relative_to(REPOSITORY).as_posix()) for path in files)
