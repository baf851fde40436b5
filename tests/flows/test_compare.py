"""The flow `compare` on a tiny random model: every stage for real, through Prefect, and its report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName

from flows.compare import compare, plan_of
from flows.comparison_stages import stages
from flows.finetune import stages as finetune_stages
from tasks.comparison.measure_forgetting import OWN_TEXT
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import TrainingError, UserError
from tasks.engine.planning import planning
from tasks.settings.comparison import CompareSettings
from tasks.settings.presets import load_settings
from tests.standins.openai_server import MODEL, openai_stand_in
from tests.support.pages import Page

Preset = Callable[..., str]
METHODS = ("baseline", "grit", "baseline-unsloth", "study-fault")
SHARED: dict[str, Any] = {"training": {"max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-2, "eval_tokens": 100}}


@pytest.fixture(scope="module")
def without_cuda(in_this_process: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def wanted(workplace: Path) -> Iterator[CompareSettings]:
    second = workplace / "second.jsonl"
    second.write_text('{"prompt": "How are you?", "completion": "Well."}\n{"prompt": "And", "completion": "Nor."}\n')
    with openai_stand_in(lambda _: "A") as judge:
        yield CompareSettings(
            methods=METHODS, seeds=2, answers=3, second_data=str(second), judge_url=judge.url, judge_model=MODEL
        )


@pytest.fixture(scope="module")
def compared(make_preset: Preset, wanted: CompareSettings, prefect_server: None, without_cuda: None) -> Artifact:
    report = compare(make_preset(), wanted, SHARED)
    assert isinstance(report, Artifact)
    return report


@pytest.fixture(scope="module")
def data(compared: Artifact) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((compared.path / "report.json").read_text())
    return loaded


def test_nothing_is_registered_and_nothing_is_left_half_written(compared: Artifact, workplace: Path) -> None:
    assert not (workplace / "ollama").exists()
    assert not (workplace / "store/registration").exists()
    assert not list((workplace / "store/drafts").iterdir())


def test_task_runs_bear_method_and_seed(compared: Artifact) -> None:
    with get_client(sync_client=True) as client:
        named = TaskRunFilter(name=TaskRunFilterName(like_="seed 34"))
        names = [run.name for run in client.read_task_runs(task_run_filter=named)]
    for stage in ("train", "merge", "score (tuned)", "convert (tuned)"):
        for method in ("baseline", "grit"):
            assert {f"{stage} {method}, seed {seed}" for seed in (3407, 3408)} <= set(names)


def test_the_provenance_names_all_data_by_digest(data: dict[str, Any], workplace: Path) -> None:
    digests = {name: value for name, value in data["provenance"] if name.endswith(" SHA-256")}
    datasets = {path.name: path for path in (workplace / "store/dataset").iterdir()}
    trained_on, second = (datasets.pop(digests[f"{name} SHA-256"][:16]) for name in ("dataset", "second data set"))
    held_out = [json.loads((path / "card.json").read_text())["rows"]["validation"] for path in (trained_on, second)]
    assert held_out == [8, 0] and not datasets
    assert digests["text outside the data SHA-256"] == hashlib.sha256(OWN_TEXT.read_bytes()).hexdigest()


def test_a_fault_and_what_cannot_run_are_told_and_not_compared(data: dict[str, Any], workplace: Path) -> None:
    assert data["methods"] == ["baseline", "grit"]
    assert "Unsloth needs a CUDA GPU" in data["not_run"]["baseline-unsloth"]
    assert data["fault"]["faulty_loss"] > 0
    assert data["fault"]["seed"] == 3407
    # Two methods and two seeds; of the fault there is a history alone.
    assert [len(list((workplace / "store" / kind).iterdir())) for kind in ("history", "adapter", "merged", "gguf")] == [
        5, 4, 4, 4,
    ]  # fmt: skip


def test_a_further_seed_or_method_runs_only_what_is_new(
    compared: Artifact, wanted: CompareSettings, make_preset: Preset, without_cuda: None
) -> None:
    settings = load_settings(make_preset(), SHARED)

    def to_run(**changes: Any) -> list[str]:
        plan = plan_of(settings, wanted.model_copy(update=changes))
        return [name for name, state in plan.stages if state == "to run"]

    of_a_run = ["train", "merge", "score", "convert", "measure_second_data", "answer_prompts", "measure_forgetting"]
    assert to_run() == []
    assert to_run(seeds=3) == [*of_a_run, *of_a_run, "judge_answers", "write_comparison"]
    of_both_seeds = [*of_a_run, "judge_answers"] * 2
    assert to_run(methods=(*METHODS, "lora_fa")) == [*of_both_seeds, "write_comparison"]
    assert to_run(methods=("baseline", "grit")) == ["write_comparison"]
    assert to_run(second_rows=1) == [*["measure_second_data"] * 5, "write_comparison"]
    assert to_run(second_data=None) == ["write_comparison"]
    answering = (
        ["answer_prompts"] * 2 + ["answer_prompts", "judge_answers"] + ["answer_prompts"] * 2 + ["judge_answers"]
    )
    assert to_run(answers=2) == [*answering, "write_comparison"]
    assert to_run(judge_model=None) == ["write_comparison"]


def test_all_trainings_are_validated_after_the_same_tokens(data: dict[str, Any], workplace: Path) -> None:
    every, histories = SHARED["training"]["eval_tokens"], sorted((workplace / "store/history").iterdir())
    for history in histories:
        lines = [json.loads(line) for line in (history / "history.jsonl").read_text().splitlines()]
        seen = np.cumsum([line["supervised_tokens"] for line in lines])
        reaching = {int(np.argmax(seen >= tokens)) + 1 for tokens in range(every, seen[-1] + 1, every)}
        assert [line["step"] for line in lines if "validation_loss" in line] == sorted(reaching | {len(lines)})
        assert reaching and len(reaching | {len(lines)}) < len(lines), "some steps have one, and some have none"
        if (history / "modules.jsonl").is_file():
            modules = [json.loads(line) for line in (history / "modules.jsonl").read_text().splitlines()]
            assert {line["step"] for line in modules} == reaching | {len(lines)}
    assert sum((history / "modules.jsonl").is_file() for history in histories) == 2 + 1, "GRIT's, and the fault's"


def test_finetune_finds_what_the_comparison_has_made(
    compared: Artifact, make_preset: Preset, without_cuda: None
) -> None:
    with planning() as plan:
        finetune_stages(load_settings(make_preset(), SHARED | {"method": "grit"}))
    assert [name for name, state in plan.stages if state == "to run"] == [
        "check_fidelity",
        "register",
        "promote",
        "write_report",
    ]


def test_the_report_shows_what_its_data_says(compared: Artifact, data: dict[str, Any]) -> None:
    html = (compared.path / "report.html").read_text()
    page = Page(html)
    assert page.loads == [], "nothing is loaded from elsewhere"
    assert len(html) < 3_000_000
    assert page.pictures == 4 + 2 + 1, "curves, GRIT's modules (no gradient is in its factors yet), the fault"
    text = " ".join(" ".join(page.text).split())
    assert " ".join(data["verdict"]["text"].split()) in text
    assert data["verdict"]["text"] in (compared.path / "report.md").read_text()
    for row in data["table"]:
        assert row["name"] in text
        for cell in row["cells"].values():
            assert cell["text"] in text
    assert "the second data set, nats per supervised token (2 rows): grit" in data["verdict"]["text"]
    assert f"preferred by the judge {MODEL}, in both orders" in [row["measure"] for row in data["wins"]]
    for published in ("11.6×", "0.0899", "averaged over padding"):
        assert published in text
    assert data["comparison"]["second_data"] in text and "cluster" not in data["comparison"]
    assert "grit.variant" in text and "grit.variant" in [key for key, _ in data["settings_that_differ"]]
    ids = re.findall(r' id="([^"]+)"', html)
    assert ids and len(set(ids)) == len(ids), "pictures in one page share their names otherwise"


def test_the_tables_figures_are_those_of_the_runs(data: dict[str, Any], workplace: Path) -> None:
    rows = {row["key"]: row for row in data["table"]}
    validation = rows["validation_loss"]
    scores = [json.loads(path.read_text()) for path in (workplace / "store/scores").glob("*/scores.json")]
    tuned = sorted(score["validation"]["loss"] for score in scores if score["model"] == "tuned")
    means = [validation["cells"][method]["estimate"]["value"] for method in ("baseline", "grit")]
    assert sum(means) / 2 == pytest.approx(sum(tuned) / 4)
    difference = validation["cells"]["grit"]["to_reference"]
    assert difference["value"] == pytest.approx(means[1] - means[0])
    second = rows["second_validation_loss"]
    losses = [json.loads(path.read_text()) for path in (workplace / "store/second_data").glob("*/rows.json")]
    total = sum(sum(scores["nll"]) / sum(scores["supervised_tokens"]) for scores in losses)
    tuned_means = sum(second["cells"][method]["estimate"]["value"] for method in ("baseline", "grit"))
    assert len(losses) == 5
    assert float(second["base"]) + 2 * tuned_means == pytest.approx(total, abs=1e-4), "two seeds each"
    seconds = rows["median_seconds_per_step"]["cells"]["grit"]["values"]
    assert seconds == [r["median_seconds_per_step"] for r in data["runs"] if r["method"] == "grit"]
    assert rows["steps_to_reference"]["cells"]["baseline"]["values"] == [4, 4]


def test_events_of_all_runs_lie_under_one_root(compared: Artifact) -> None:
    directories = {name.rsplit("/", 1)[0] for name in compared.files if "/events." in name}
    trained = {f"tensorboard/{m}/seed-{seed}" for m in ("baseline", "grit") for seed in (3407, 3408)}
    assert directories == trained | {"tensorboard/study-fault/seed-3407"}


def test_a_method_that_diverges_is_left_out_with_the_reason(
    compared: Artifact,
    make_preset: Preset,
    prefect_server: None,
    without_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverge(*_: Any) -> None:
        raise TrainingError("training diverged at step 2", where="training.learning_rate", fix="Lower it.")

    monkeypatch.setattr("tasks.train.train_in_child", diverge)
    wanted = CompareSettings(methods=("baseline", "lora_plus"), seeds=2, answers=3)
    report = compare(make_preset(), wanted, SHARED)
    data = json.loads((report.path / "report.json").read_text())
    assert data["methods"] == ["baseline"]
    assert "seed 3407: training.learning_rate: training diverged at step 2" in data["not_run"]["lora_plus"]
    assert "nothing to compare" in data["verdict"]["text"]


def test_what_is_no_fault_of_the_method_stops_the_comparison(
    compared: Artifact, make_preset: Preset, without_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise UserError("no space is left", where="store", fix="Free some.")

    monkeypatch.setattr("tasks.train.train_in_child", full)
    with pytest.raises(UserError, match="no space is left"):
        compare(make_preset(), CompareSettings(methods=("baseline", "lora_fa"), seeds=2, answers=3), SHARED)


def test_a_judge_that_fails_at_the_end_and_a_fault_that_diverges_cost_no_report(
    compared: Artifact, make_preset: Preset, without_cuda: None, wanted: CompareSettings, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("it failed", where="here", fix="Mend it.")

    for name in ("judge_answers", "reproduce_fault"):
        monkeypatch.setattr(f"flows.comparison_stages.{name}", fail)
    monkeypatch.setattr("flows.compare.check_judge", lambda *_: None)
    report = compare(make_preset(), wanted, SHARED)
    data = json.loads((report.path / "report.json").read_text())
    assert data["methods"] == ["baseline", "grit"]
    assert {name for name, reason in data["not_run"].items() if reason == "here: it failed. Mend it."} == {
        "judge", "study-fault",
    }  # fmt: skip


def test_each_method_takes_the_rate_of_its_lowest_validation_loss(
    compared: Artifact, make_preset: Preset, without_cuda: None
) -> None:
    """One of the two is too high, and each method has trained at the other before."""
    wanted = CompareSettings(methods=("baseline", "grit"), seeds=2, answers=3, learning_rates=(1e-2, 1e20))
    with planning() as plan:
        stages(load_settings(make_preset(), SHARED), wanted)
    assert [name for name, state in plan.stages if state == "to run"][:2] == ["train", "train"]
    report = compare(make_preset(), wanted, SHARED)
    data = json.loads((report.path / "report.json").read_text())
    assert [(trial["method"], trial["learning_rate"], trial["loss"] is None) for trial in data["trials"]] == [
        ("baseline", 1e-2, False), ("baseline", 1e20, True), ("grit", 1e-2, False), ("grit", 1e20, True),
    ]  # fmt: skip
    assert data["settings"]["training"]["learning_rate"] == 1e-2
    assert all("diverged" in trial["failure"] for trial in data["trials"] if trial["loss"] is None)
    assert "have diverged" in (report.path / "report.html").read_text()
    before = json.loads((compared.path / "report.json").read_text())
    same = [row for row in before["table"] if row["group"] != "second"]
    assert data["table"] == same, "its runs are the ones that were there"
