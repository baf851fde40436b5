"""Each command's own help."""

from __future__ import annotations

import pytest

from flows import chat, compare, rollback
from flows.support.command_line import CommandLine, parse


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (CommandLine, "finetune"),
        (chat.ChatLine, "chat"),
        (rollback.RollbackLine, "rollback"),
        (compare.CompareLine, "compare"),
    ],
)
def test_help_names_the_command_that_was_asked(options: type, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(["--help"], options)
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: llama3-grit {name} ")
    assert " ".join(options.__doc__.split())[:40] in " ".join(text.split())


def test_a_chat_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], chat.ChatLine)
    assert "--plan" not in capsys.readouterr().out
