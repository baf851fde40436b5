"""Modules of the project in processes of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.llamacpp.load import run_module


def test_a_file_of_the_users_that_is_called_like_a_room_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks.py").write_text("raise SystemExit('not the project')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.llamacpp.load.subprocess", subprocess)  # no fork
    done = run_module("tasks.engine.paths")
    assert (done.returncode, done.stderr) == (0, "")
