"""`pytest --fast`: what needs a heavy library or a child process is left out, and everything else counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.engine.paths import REPOSITORY
from tests.support.fast_run import HEAVY

pytestmark = pytest.mark.slow  # a fast run would refuse what is tried here

LIGHT = """
import importlib.util, subprocess, sys

def test_without(): pass

def test_that_asks_whether_there_is_one(): assert importlib.util.find_spec("unsloth")

def test_with_another_program(): subprocess.run(["true"], check=True)

def test_that_can_do_without():
    try:
        import unsloth
    except ImportError:
        unsloth = None
    assert unsloth is None
"""
MIXED = """
import os, subprocess, sys
import pytest

@pytest.fixture
def model():
    import unsloth

@pytest.fixture
def late():
    yield
    import unsloth.models

def test_with_a_fixture(model): pass

def test_with_a_late_import():
    from unsloth import models

def test_that_ends_with_one(late): pass

def test_with_words_of_its_own():
    try:
        import unsloth
    except ImportError:
        raise RuntimeError("install it") from None

def test_with_errors_in_a_group():
    try:
        import unsloth
    except ImportError as error:
        raise ExceptionGroup("all", [ValueError(), error])

def test_with_a_patch(monkeypatch): monkeypatch.setattr("unsloth.cuda", None)

def test_with_a_child(): subprocess.run([sys.executable, "-c", ""], check=True)

def test_with_a_child_of_a_shell(): subprocess.run("python3 -c ''", check=True, shell=True)

@pytest.mark.slow
def test_that_takes_long(): raise AssertionError("never run")
"""
FAULTY = """
def test_wrong(): assert False

def test_of_a_library_that_is_missing(): import no_such_library
"""


@pytest.fixture
def files(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Tests of every kind; the library that is refused here is one that no other test imports."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for processes: xdist takes the path that its own began with
    pytester.makeini("[pytest]\naddopts = -p tests.support.fast_run")
    heavy = f"import unsloth\n{FAULTY}"
    pytester.makepyfile(test_light=LIGHT, test_mixed=MIXED, test_faulty=FAULTY, test_heavy=heavy)
    return pytester


@pytest.mark.parametrize("processes", [[], ["-p", "xdist.plugin", "--numprocesses", "2"]], ids=["alone", "shared"])
def test_what_is_refused_is_left_out_and_counted(files: pytest.Pytester, processes: list[str]) -> None:
    run = files.runpytest_subprocess if processes else files.runpytest_inprocess
    done = run("--fast", *processes)
    done.stdout.fnmatch_lines(["1 files and 9 tests need torch, a server, a model or much time: `make test` runs them"])
    # Of the nine, one passes first and needs the library at its end.
    done.assert_outcomes(passed=5, failed=2)


def test_without_the_option_nothing_is_refused(files: pytest.Pytester) -> None:
    (files.path / "unsloth.py").write_text("models = cuda = 1\n")
    done = files.runpytest_inprocess("test_light.py", "test_mixed.py", "-k", "late or child")
    done.assert_outcomes(passed=3, deselected=10)
    assert "left out" not in done.stdout.str()


def test_a_conftest_that_needs_a_heavy_library_is_an_error(files: pytest.Pytester) -> None:
    (files.path / "below").mkdir()
    (files.path / "below/conftest.py").write_text("import unsloth\n")
    (files.path / "below/test_below.py").write_text("def test_it(): pass\n")
    files.runpytest_inprocess("--fast", "-k", "test_it").assert_outcomes(errors=1)


def test_the_conftests_import_neither_a_heavy_library_nor_prefect() -> None:
    paths = [path.relative_to(REPOSITORY) for path in Path(__file__).parent.rglob("conftest.py")]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    modules += ["tests.support.fast_run", "tests.support.vanished_tests"]
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module(name)\n"
    command = [sys.executable, "-c", f"{code}print(json.dumps(sorted(sys.modules)))"]
    imported = set(json.loads(subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY).stdout))
    assert {*modules, "pytest"} <= imported
    assert not sorted(imported & (HEAVY | {"prefect"}))
