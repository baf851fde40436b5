"""A plugin of pytest, the option `--fast`: only the tests that need no torch, no server and no model.

No list says which these are. Heavy libraries cannot be imported, and no child process of this environment can start.
The files and tests that try to are left out of the run and counted in its last lines. So are tests with the mark
`slow`, which compute for seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HEAVY = frozenset({
    "accelerate", "bitsandbytes", "dask", "datasets", "distributed", "lm_eval", "peft", "ray", "torch",
    "transformers", "trl", "unsloth", "xllamacpp",
})  # fmt: skip
"""Torch, what needs it or begins with it, and the clusters. llama_cpp is none: it is imported at once."""
PROGRAMS = Path(sys.executable).parent
"""Of this environment: Python itself, Prefect, Ray, Go. They start servers, import torch or take long."""


class NotFastError(ModuleNotFoundError):
    """What a fast run refuses."""


class HeavyLibraries(MetaPathFinder, Loader):
    """Finds each heavy library, as if it could be imported, and refuses to import it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Libraries that only ask whether another one is installed get the true answer."""
        return ModuleSpec(fullname, self, is_package=True) if fullname in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Refuse, as a library that is missing."""
        raise NotFastError(f"a fast run imports no {spec.name}", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing comes here."""


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error is a refusal, or came of one; a library that is truly missing is none."""
    if error is None or isinstance(error, NotFastError):
        return error is not None
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(map(is_refusal, (error.__cause__, error.__context__, *parts)))


def refuse_own_programs(command: Any) -> None:
    """Raise where a command starts a program of this environment."""
    words = [command] if isinstance(command, str | bytes | os.PathLike) else list(command)
    program = Path(os.fsdecode(words[0]))
    if program.parent == PROGRAMS or program.name.startswith("python"):
        raise NotFastError(f"a fast run starts no {program.name}")


@contextmanager
def refusals() -> Iterator[None]:
    """Refuse heavy libraries, and child processes of this environment; what torch would choose is float32."""
    start, finder = subprocess.Popen.__init__, HeavyLibraries()

    def guarded(process: Any, args: Any, *others: Any, **named: Any) -> None:
        refuse_own_programs(args)
        start(process, args, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", guarded)
        patch.setattr("tasks.settings.finetune.native_dtype", lambda: "float32")
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)


class FastRun:
    """What a fast run leaves out."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.tests: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        """Leave out a file that cannot be imported without what is refused; a conftest.py must be."""
        with refusals():
            report = yield
        call = vars(report).get("call")
        if isinstance(collector, pytest.Module) and call and call.excinfo and is_refusal(call.excinfo.value):
            self.files.add(collector.nodeid)
            report.outcome, report.longrepr, report.result = "passed", None, []
            del report.call
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Guard a test and its fixtures; between tests pytest-xdist may start processes."""
        with refusals():
            return (yield)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Leave out what is marked as slow."""
        if item.get_closest_marker("slow"):
            raise NotFastError("a fast run does not compute for seconds")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Leave out a test that fails because of what is refused."""
        report = yield
        if call.excinfo and is_refusal(call.excinfo.value):
            report.outcome, report.left_out = "skipped", True
            report.longrepr = (str(item.path), item.location[1], str(call.excinfo.value))
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Count it, here for all processes that share the tests."""
        if not getattr(report, "left_out", False):
            return None
        self.tests.add(report.nodeid)
        return "left out", "", "LEFT OUT"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell the process that shows the summary which files this one has left out."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = sorted(self.files)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Hear it from a process."""
        self.files.update(getattr(node, "workeroutput", {}).get("left_out", []))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how much is left out, and what runs it."""
        count = f"{len(self.files)} files and {len(self.tests)} tests"
        terminalreporter.write_line(f"{count} need torch, a server, a model or long: `make test` runs them")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--fast`."""
    parser.addoption("--fast", action="store_true", help="only the tests that need no torch, no server and no model")


def pytest_configure(config: pytest.Config) -> None:
    """Guard a fast run."""
    config.addinivalue_line("markers", "slow: computes for seconds; a fast run leaves it out")
    if config.option.fast:
        config.pluginmanager.register(FastRun(), "fast run")
