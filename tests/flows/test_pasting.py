"""Printed commands are what the user's shell takes, from the directory that the user is in."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows.support.pasting import PROGRAM, PROJECT, as_typed, next_lines, typed
from tasks.engine import paths
from tasks.engine.errors import UserError

WORDS = ["--preset", "my file.yaml", "--chat.system", 'It\'s $HOME, "not" `here`\\.', "--scoring.tasks", "[]"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a program that prints its arguments; Python is the one that runs the tests, by its name."""
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    script = programs / PROGRAM
    script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.delenv(PROJECT, raising=False)
    return programs


def arguments_in_shell(command: str) -> list[str]:
    """What a program gets whose command is pasted into a shell here."""
    return subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("where", "program"),
    [(".", "'my env/bin/llama3-grit'"), ("my env", "bin/llama3-grit"), ("my env/bin", "./llama3-grit")],
)
def test_below_the_current_directory_the_path_is_relative(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, program: str
) -> None:
    monkeypatch.chdir(tmp_path / where)
    assert typed("down") == f"{program} down"
    assert arguments_in_shell(typed("chat", WORDS)) == ["chat", *WORDS]


def test_elsewhere_the_path_is_absolute(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed("chat") == f"{shlex.quote(str(environment / PROGRAM))} chat"
    assert arguments_in_shell(typed("chat", WORDS)) == ["chat", *WORDS]


def test_what_path_leads_to_is_called_by_its_name_alone(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked, other = tmp_path / "linked", tmp_path / "other"
    linked.mkdir()
    other.mkdir()
    (linked / PROGRAM).symlink_to(environment / PROGRAM)
    (other / PROGRAM).write_bytes((environment / PROGRAM).read_bytes())
    (other / PROGRAM).chmod(0o755)
    for first, program in ((environment, PROGRAM), (linked, PROGRAM), (other, str(environment / PROGRAM))):
        monkeypatch.setenv("PATH", os.pathsep.join([str(first), os.defpath]))
        assert as_typed(environment / PROGRAM) == program


def test_the_project_that_was_named_is_named_again(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "REPOSITORY", Path("/other checkout"))
    monkeypatch.setenv(PROJECT, "/other checkout")
    assert arguments_in_shell(typed("chat", WORDS)) == ["--project", "/other checkout", "chat", *WORDS]


def test_a_project_that_this_process_does_not_use_is_not_named(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROJECT, "/other checkout")  # `python -m flows.chat` does not read it
    assert arguments_in_shell(typed("chat", WORDS)) == ["chat", *WORDS]


def test_a_command_in_an_error_keeps_its_spaces(environment: Path) -> None:
    words = ["--chat.system", "two  spaces"]
    error = UserError("no run", where="store", fix=f"Start it: {typed('finetune', words)}")
    assert arguments_in_shell(str(error).partition("Start it: ")[2]) == ["finetune", *words]


def test_without_the_program_the_module_is_called(monkeypatch: pytest.MonkeyPatch, environment: Path) -> None:
    (environment / PROGRAM).unlink()
    assert shlex.split(typed("chat"))[1:] == ["-P", "-m", "flows.command", "chat"]


@pytest.mark.parametrize("commands", [["ollama run it"], ["OLLAMA_MODELS='/a b' ollama serve", "ollama run it"]])
def test_each_next_command_has_a_line_of_its_own(commands: list[str]) -> None:
    heading, *lines = next_lines(commands).splitlines()
    assert [line.strip() for line in lines if line.startswith("  ")] == commands
    assert heading.startswith("Next") and [line for line in lines if not line.startswith("  ")] == (
        ["and in another:"] if len(commands) == 2 else []
    )
