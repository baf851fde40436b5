"""A plugin of pytest: a whole run fails where a file of tests yields none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHOICES = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "fast")
"""Options of pytest with which a run is not of all tests."""


def test_files(root: Path) -> Iterator[str]:
    """Each `test_*.py` below a directory, hidden directories and built copies left out."""
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name != "build"]
        for name in files:
            if name.startswith("test_") and name.endswith(".py"):
                yield (Path(directory) / name).relative_to(root).as_posix()


class VanishedTests:
    """Compares the files with the tests of a run that names no file and chooses no tests.

    Args:
        config: of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.failed: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is reported as that."""
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Look where one process runs all tests."""
        if not hasattr(self.config, "workerinput"):
            self.compare(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Look where several processes share them."""
        self.compare(ids)

    def compare(self, ids: Iterable[str]) -> None:
        """End a run in which a file yields no test."""
        if "" in self.failed:
            return
        yielding = {name.partition("::")[0] for name in ids} | self.failed
        if empty := sorted(set(test_files(self.config.rootpath)) - yielding):
            pytest.exit(f"no test is found in {', '.join(empty)}", returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_configure(config: pytest.Config) -> None:
    """Watch a run of all tests."""
    options: dict[str, Any] = vars(config.option)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(map(options.get, CHOICES)):
        config.pluginmanager.register(VanishedTests(config), "vanished tests")
