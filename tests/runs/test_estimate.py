"""What a plan says of the time: trainings, the padded rows of the study's fault, and every validation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tasks.engine.artifacts import reference
from tasks.engine.planning import Plan
from tasks.runs.estimate import estimate
from tasks.settings.presets import load_settings

RATE = 1e9
PARAMETERS = 1_000_000_000
FACTS = {
    "rows": {"train": 900, "validation": 10},
    "tokens": {"train": 90_000},
    "supervised_tokens": {"train": 27_000},
    "max_length": 512,
}
SETTINGS = {
    "training.max_steps": 20, "training.per_device_batch_size": 4, "training.gradient_accumulation_steps": 1,
    "data.max_length": 512,
}  # fmt: skip
"""A step sees 4 rows of 100 tokens, 30 of them supervised; the training 2400."""


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.runs.duration.matmul_rate", lambda dtype: 2 * RATE)


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    model, data, second = (
        reference("artifact", tmp_path, [], facts)
        for facts in ({"parameters": PARAMETERS}, FACTS, FACTS | {"rows": {"train": 900, "validation": 999}})
    )
    cached = [("fetch_model", model), ("prepare_dataset", data), ("prepare_dataset", second)]

    def of(*waiting: str, **overrides: Any) -> list[str]:
        """What the plan says."""
        states = [(name, "cached") for name, _ in cached] + [(name, "to run") for name in waiting]
        settings = load_settings("demo", SETTINGS | {"training.eval_tokens": None, "method": "baseline"} | overrides)
        return estimate(settings, Plan(states, list(cached)))

    return of


@pytest.fixture
def seconds(lines: Any) -> Any:
    def of(*waiting: str, **overrides: Any) -> dict[str, float]:
        """What the plan says of each part."""
        parts = re.findall(r"(training|validation) about ([\d.]+) (s|min)", " ".join(lines(*waiting, **overrides)))
        return {part: float(number) * (60 if unit == "min" else 1) for part, number, unit in parts}

    return of


def test_a_training_takes_its_passes_over_its_tokens_and_two_validations(seconds: Any) -> None:
    duration = seconds("train", "train")
    assert duration["training"] == pytest.approx(2 * 4 * PARAMETERS * 20 * 400 / RATE, rel=0.01)
    assert duration["validation"] == pytest.approx(2 * 2 * 2 * PARAMETERS * 10 * 100 / RATE, rel=0.01)


def test_recomputed_activations_take_a_half_more(seconds: Any) -> None:
    plain, recomputed = (
        seconds("train", **{"training.gradient_checkpointing": on})["training"] for on in (False, True)
    )
    assert recomputed / plain == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "validations"),
    [
        ({"training.eval_tokens": 240}, 11),
        ({"training.eval_tokens": 500}, 6),
        ({"training.eval_tokens": 1}, 21),
        ({"training.eval_tokens": 99_999}, 2),
        ({"training.eval_steps": 5}, 5),
        ({"training.eval_steps": 6}, 5),
    ],
)
def test_validations_during_the_training_count(seconds: Any, asked: dict[str, Any], validations: int) -> None:
    took = seconds("train", **asked)["validation"]
    assert took == pytest.approx(2 * PARAMETERS * validations * 10 * 100 / RATE, rel=0.01)


def test_rows_of_the_fault_are_padded_to_the_full_length(seconds: Any) -> None:
    assert seconds("reproduce_fault")["training"] == pytest.approx(4 * PARAMETERS * 20 * 4 * 512 / RATE, rel=0.01)


@pytest.mark.parametrize(
    ("waiting", "overrides", "named"),
    [
        (["train", "merge", "score"], {"scoring.tasks": ()}, "merging"),
        (["train"], {"method": "grit", "scoring.tasks": ()}, "GRIT's first basis"),
        (["score"], {}, "lm-eval's answers"),
        (["train", "answer_prompts", "measure_forgetting"], {}, "answers, forgetting"),
        (["train"], {}, None),
    ],
)
def test_what_comes_on_top_is_what_is_still_to_run(
    lines: Any, waiting: list[str], overrides: dict[str, Any], named: str | None
) -> None:
    on_top = re.search(r"On top: (.*)\.$", lines(*waiting, **overrides)[-1])
    assert (on_top[1] if on_top else None) == named


def test_the_first_stage_of_a_name_is_meant() -> None:
    plan = Plan([("prepare_dataset", "to run"), ("prepare_dataset", "cached")], [("prepare_dataset", object())])  # type: ignore[list-item]
    assert plan.result_of("prepare_dataset") is None
    assert plan.result_of("never_visited") is None
