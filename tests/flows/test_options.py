"""The command line's options, and what is said of mistyped ones."""

from __future__ import annotations

import pytest

from flows.support.command_line import parse
from tasks.engine.errors import UserError
from tasks.settings.presets import load_settings


def test_options_reach_every_setting() -> None:
    arguments = ["--preset", "x.yaml", "--plan", "--training.max_steps", "60", "--lora.target_modules", "q_proj"]
    preset, plan, given = parse([*arguments, "--model.trust_remote_code", "--data.columns", "output=answer"])
    assert (preset, plan) == ("x.yaml", True)
    assert load_settings("demo", given).training.max_steps == 60
    assert load_settings("demo", given).lora.target_modules == ("q_proj",)
    assert load_settings("demo", given).data.columns == {"output": "answer"}
    nothing = parse(["--chat.system", "null", "--training.eval_tokens", "null"])[2]
    assert load_settings("demo", nothing).chat.system is None
    assert load_settings("demo", nothing).training.eval_tokens is None
    with pytest.raises(UserError, match=r"unrecognized arguments: --training.max_step 6"):
        parse(["--training.max_step", "6"])
    for switch in (["--training.keep_best", "true"], ["--training.keep_best=false"]):
        with pytest.raises(UserError, match="A switch takes no value"):
            parse(switch)
    with pytest.raises(UserError, match=r"Did you mean --data.source\?"):
        parse(["--data.sorce", "true.jsonl"])
    assert parse(["--no-training.keep_best"])[2] == {"training": {"keep_best": False}}
