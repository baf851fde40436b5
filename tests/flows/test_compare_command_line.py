"""The command line of the flow `compare`: what it reads, what it refuses, and what its plan says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import compare
from tasks.engine.artifacts import reference
from tasks.engine.planning import Plan
from tasks.settings.presets import load_settings

Preset = Callable[..., str]


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_command_line() -> None:
    words = ["--preset", "x.yaml", "--methods", "baseline,grit:kfac", "--seeds", "5", "--training.max_steps", "40"]
    preset, plan, comparison, settings = compare.parse_comparison(words)
    assert (preset, plan, comparison.seeds) == ("x.yaml", False, 5)
    assert comparison.methods == ("baseline", "grit:kfac")
    assert load_settings("demo", settings).training.max_steps == 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "baseline,gritt"], "methods.1: Input should be"),
        (["--methods", "grit,grit"], "a method is named twice"),
        (["--methods", "study-fault,grit"], "no method to measure others against"),
        (["--seeds", "0"], "seeds: Input should be greater than or equal to 1"),
        (["--methods", "grit,grit:kfac"], "grit:kfac and grit are the same with these settings"),
        (["--method", "grit"], "Use --methods baseline,grit."),
        (["--seed_s", "2"], "Did you mean --seeds?"),
        (["--learning_rates", "1e-3,0.001"], "learning_rates: a rate is named twice"),
        (["--second_data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--forgetting_text", "nowhere.txt"], "nowhere.txt: the text cannot be read: No such file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], make_preset: Preset
) -> None:
    assert compare.run(["--preset", make_preset(), "--plan", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "grit,grit:kfac"], "grit:kfac and grit are the same with these settings"),
        (["--second_data", "nowhere.jsonl"], "nowhere.jsonl: no such file. This is `second_data`"),
        (["--forgetting_text", "nowhere.txt"], "nowhere.txt: the text cannot be read: No such file"),
    ],
)
def test_what_needs_no_flow_to_be_found_starts_none(
    words: list[str],
    message: str,
    make_preset: Preset,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(compare, "compare")
    assert compare.run(["--preset", make_preset(), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_plan_counts_the_validations_that_the_comparison_will_make(
    make_preset: Preset, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"rows": {"train": 9}, "tokens": {"train": 900}, "supervised_tokens": {"train": 90}, "max_length": 512}
    plan = Plan([("prepare_dataset", "cached")], [("prepare_dataset", reference("dataset", tmp_path, [], facts))])
    monkeypatch.setattr(compare, "plan_of", lambda *_: plan)
    monkeypatch.setattr(compare, "estimate", lambda settings, plan: [f"every {settings.training.eval_tokens}"])
    words = ["--training.max_steps", "20", "--training.per_device_batch_size", "5"]
    words += ["--training.gradient_accumulation_steps", "1", "--training.eval_tokens"]
    for asked, tokens in (("null", 100), ("7", 7)):  # a tenth of 20 steps of 5 rows of 10 supervised tokens
        assert compare.run(["--preset", make_preset(), "--plan", *words, asked]) == 0
        assert f"every {tokens}\n" in capsys.readouterr().out


def test_the_plan_counts_stages(make_preset: Preset, capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    unused = make_preset(store=str(workplace / "unused"))
    assert compare.run(["--preset", unused, "--plan", "--methods", "baseline,lora_fa", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"train +│ 0 +│ 4", printed)
    assert "Time: training at most" in printed
    assert not (workplace / "unused").exists()


def test_a_model_too_large_for_a_cpu_is_planned_for_a_cluster(
    make_preset: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tasks.runs.base_model.LARGE", 1000)
    words = ["--preset", make_preset(), "--plan"]
    assert compare.run(words) == 2
    assert "parameters take days without a GPU" in capsys.readouterr().err
    assert compare.run([*words, "--cluster", "tcp://127.0.0.1:9"]) == 0
