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
