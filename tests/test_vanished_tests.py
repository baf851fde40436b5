"""A whole run fails where a file of tests yields none; runs of some tests are not held up."""

from __future__ import annotations

import pytest

from tasks.engine.paths import REPOSITORY

TEST = "def test_it(): assert True\n"
FILES = {
    "tests/test_whole": TEST,
    "tests/test_renamed": TEST.replace("test_it", "tset_it"),
    "tests/test_class_without_the_word": f"class Checks:\n    {TEST.replace('()', '(self)')}",
    "tests/test_skipped_as_a_module": f"import pytest\npytest.skip('', allow_module_level=True)\n{TEST}",
    "tests/test_not_collected": TEST,
    "tests/test_taken_out": TEST,
    "tests/support/test_in_another_folder": TEST,
    "tasks/test_outside": TEST,
}
CONFTEST = """
collect_ignore = ["test_not_collected.py"]

def pytest_ignore_collect(collection_path):
    return True if collection_path.name == "support" else None

def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if "test_taken_out" not in item.nodeid]
"""


@pytest.fixture
def checkout(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory where every file of tests but one yields none in a whole run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for processes: xdist takes the path that its own began with
    pytester.makeini("[pytest]\ntestpaths = tests\naddopts = -p tests.support.vanished_tests")
    for name, text in {**FILES, "tests/conftest": CONFTEST, ".hidden/test_hidden": "", "build/test_copied": ""}.items():
        path = pytester.path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return pytester


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param([], id="alone"),
        pytest.param(["-p", "xdist.plugin", "--numprocesses", "2"], id="shared", marks=pytest.mark.slow),
    ],
)
def test_a_whole_run_ends_with_the_names_of_files_without_a_test(
    checkout: pytest.Pytester, processes: list[str]
) -> None:
    run = checkout.runpytest_subprocess if processes else checkout.runpytest_inprocess
    done = run(*processes)
    names = sorted(f"{name}.py" for name in FILES if name != "tests/test_whole")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert f"no test is found in {', '.join(names)}" in done.stdout.str() + done.stderr.str()
    assert "passed" not in done.stdout.str()


@pytest.mark.parametrize(
    "choice", [["tests"], ["tests/test_whole.py"], ["-k", "it"], ["--ignore", "tests/test_renamed.py"]], ids=str
)
def test_a_run_of_chosen_tests_goes_on(checkout: pytest.Pytester, choice: list[str]) -> None:
    checkout.runpytest_inprocess(*choice).assert_outcomes(passed=1, skipped="test_whole" not in choice[-1])


def test_a_file_with_an_error_is_reported_as_that(checkout: pytest.Pytester) -> None:
    for name in FILES.keys() - {"tests/test_whole"}:
        (checkout.path / f"{name}.py").unlink()
    (checkout.path / "tests/test_broken.py").write_text("import no_such_library\n")
    done = checkout.runpytest_inprocess()
    done.assert_outcomes(errors=1)
    assert "no_such_library" in done.stdout.str() and "no test is found" not in done.stdout.str()
