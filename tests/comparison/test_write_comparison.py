"""A comparison's report of made-up runs: what it says, what it leaves out and why, and how large it gets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tasks.analysis import figures as pictures
from tasks.analysis.compared_runs import RateTrial
from tasks.analysis.learning_rates import edge_sentence, trial_rows
from tasks.analysis.lm_eval_measures import lm_eval_measures
from tasks.analysis.measure import wins
from tasks.analysis.methods import settings_of
from tasks.analysis.provenance import batch_notes, by_machine, choice_notes, commit
from tasks.analysis.table import table
from tasks.analysis.verdict import verdict
from tasks.settings.comparison import ComparedMethod
from tasks.settings.presets import load_settings
from tasks.stats import estimates
from tasks.training.history import steps_of
from tests.support.made_up_comparison import MACHINE, PROMPTS, MadeUp

METHODS = ("baseline", "grit")


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 50)


@pytest.fixture
def made(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path / "made-up")


def by_method(runs: Any) -> dict[str, Any]:
    return {method: [run for run in runs if run.method == method] for method in dict.fromkeys(r.method for r in runs)}


def test_rates_that_look_alike_have_directories_of_their_own_and_a_choice_at_the_edge_is_told(made: MadeUp) -> None:
    losses = {1e-3: 0.3, 1.0000001e-3: 0.2, 2e-3: 0.1}
    trials = tuple(
        RateTrial(method=method, learning_rate=rate, history=made.history(loss, 1))
        for method in METHODS
        for rate, loss in losses.items()
    )
    report = made.report(made.runs(METHODS, 2), trials)
    data = json.loads((report.path / "report.json").read_text())
    assert {path.name for path in (report.path / "tensorboard/grit").iterdir()} == {
        "seed-3407", "seed-3408", "rate-0.001", "rate-0.0010000001", "rate-0.002",
    }  # fmt: skip
    assert [(row["learning_rate"], row["edge"]) for row in data["trials"] if row["chosen"]] == [(2e-3, "highest")] * 2
    said = "grit took the highest rate tried, 0.002: a better one may lie beyond the grid."
    for name in ("report.html", "report.md"):
        assert said in (report.path / name).read_text()


def test_the_short_report_has_the_studys_figures_beside_ours(made: MadeUp) -> None:
    text = (made.report(made.runs(METHODS, 2)).path / "report.md").read_text()
    heading, _, first = text[text.index("| published |") :].splitlines()[:3]
    assert heading.endswith("| ours: baseline | ours: grit |")
    assert first.startswith("| final training loss | 1.0439 | 0.0899") and first.count("±") == 2
    assert heading.count("|") == first.count("|")


def test_a_choice_within_the_grid_is_at_no_edge(made: MadeUp) -> None:
    trials = [
        RateTrial(method="grit", learning_rate=rate, history=made.history(loss, 1))
        for rate, loss in ((1e-3, 0.3), (2e-3, 0.1), (4e-3, 0.2))
    ]
    rows = trial_rows(trials, ("grit",))
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert edge_sentence(rows) is None
    assert edge_sentence(trial_rows(trials[:1], ("grit",))) is None, "one rate is no choice"
    assert edge_sentence(trial_rows(trials[1:], ("grit",))) is not None


class TestLmEval:
    """Scores that are no number, or are not there."""

    def measures(self, made: MadeUp, change: Callable[[MadeUp], None], of_base: bool) -> list[Any]:
        runs = list(made.runs(METHODS, 2))
        before = made.lm_eval, made.documents
        made.lm_eval, made.documents = json.loads(json.dumps(before))
        change(made)
        changed = made.scores(0.1)
        if of_base:
            made.base = made.base.model_copy(update={"scores": changed})
        else:
            runs[-1] = runs[-1].model_copy(update={"scores": changed})
        return lm_eval_measures(by_method(runs), made.base.scores)

    @staticmethod
    def no_number(made: MadeUp) -> None:
        made.lm_eval["arc"]["acc"]["value"] = None
        made.documents = {"arc": {}}

    @staticmethod
    def one_nan(made: MadeUp) -> None:
        made.documents["arc"]["acc"][0] = float("nan")

    @staticmethod
    def nothing(made: MadeUp) -> None:
        made.lm_eval, made.documents = {}, {}

    @pytest.mark.parametrize("change", ["no_number", "nothing"])
    def test_a_run_without_a_number_leaves_its_method_out_of_the_row(self, made: MadeUp, change: str) -> None:
        (measure,) = self.measures(made, getattr(self, change), of_base=False)
        assert list(measure.values) == ["baseline"] and measure.values["baseline"].shape == (2, PROMPTS)
        (row,) = table([measure], METHODS, 0.95)
        assert row["cells"]["grit"]["text"] == "not a number with seed 3408"
        json.dumps(row, allow_nan=False)
        assert "Nothing was held out" in verdict([measure], METHODS, 0.95)["text"]

    def test_a_document_that_is_no_number_costs_the_pairing_by_documents(self, made: MadeUp) -> None:
        (measure,) = self.measures(made, self.one_nan, of_base=False)
        assert measure.counts is None and measure.values["grit"].tolist() == [0.5, 0.5]

    def test_a_base_without_a_number_is_not_compared_with(self, made: MadeUp) -> None:
        (measure,) = self.measures(made, self.no_number, of_base=True)
        assert measure.base is None and measure.values["grit"].tolist() == [0.5, 0.5]
        (row,) = table([measure], METHODS, 0.95)
        assert row["base"] is None and "to_base" not in row["cells"]["grit"]

    def test_a_base_without_the_task_has_no_row(self, made: MadeUp) -> None:
        assert self.measures(made, self.nothing, of_base=True) == []


def test_a_line_keeps_its_first_and_last_point_and_not_too_many() -> None:
    for points in (1, 5, 400, 401, 9999):
        kept = pictures.thinned(points)
        assert (kept[0], kept[-1]) == (0, points - 1)
        assert len(kept) == min(points, pictures.POINTS) and (np.diff(kept) > 0).all()


def test_twelve_methods_of_five_thousand_steps_stay_far_below_three_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeUp(tmp_path / "made-up", steps=5000, validations=500)
    one, other = made.history(0.0, 1, grit=True), made.history(0.1, 2, grit=True)
    lines = {history.path: steps_of(history) for history in (one, other)}
    monkeypatch.setattr(pictures, "steps_of", lambda history: lines[history.path])  # read once
    runs = made.runs(METHODS[:1], 2)
    by_name = {
        method: [run.model_copy(update={"history": history}) for run, history in zip(runs, (one, other), strict=True)]
        for method in get_args(ComparedMethod)[:-1]
    }
    curves = [draw(by_name, "tokens", None) for draw in (pictures.loss_curves, pictures.validation_curves)]
    maps = [picture for *_, picture in pictures.module_maps({"grit": by_name["grit"]})]
    # The curves come twice, over tokens and over seconds.
    assert 2 * sum(map(len, curves)) + 12 * sum(map(len, maps)) < 2_000_000


def test_long_answers_are_cut_in_the_page_and_whole_in_its_data(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.made_up_comparison.EXPECTED", "long " * 50_000)
    runs = tuple(run.model_copy(update={"answers": made.answers("x")}) for run in made.runs(METHODS, 1))
    made.base = made.base.model_copy(update={"answers": runs[0].answers})
    report = made.report(runs)
    html = (report.path / "report.html").read_text()
    assert len(html) < 1_000_000 and "(all of it: report.json)" in html
    assert len(json.loads((report.path / "report.json").read_text())["samples"][0]["expected"]) == 250_000


def test_the_dashed_line_is_in_the_legend_and_maps_of_a_kind_share_their_colours(made: MadeUp) -> None:
    runs = by_method(made.runs(("baseline", "grit"), 2))
    assert ">validation</text>" in pictures.loss_curves(runs, "tokens", None)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_map", lambda means, kind, scale: seen.append((kind, scale)))
        pictures.module_maps(runs)
    assert seen == [("cosine", (0.5, pytest.approx(0.8))), ("effective rank", (2.5, 6)), ("effective rank", (2.5, 6))]


def test_a_judge_that_failed_on_the_way_is_told_and_confidence_is_shared(made: MadeUp) -> None:
    runs = by_method(made.runs(("baseline", "grit", "grit:graft"), 3))
    line = "".join(json.dumps({"outcome": outcome}) + "\n" for outcome in [1, 0, 1, 1, -1, 1])
    judged = made.artifact("judgement", {"judgement.jsonl": line}, {"model": "J"})
    runs["grit"] = [run.model_copy(update={"judgement": judged}) for run in runs["grit"][:2]] + runs["grit"][2:]
    rows = wins(runs, 0.9)
    (row,) = (row for row in rows if "judge" in row["measure"])
    assert row["measure"] == "preferred by the judge J, in both orders (2 of 3 seeds: then it failed)"
    assert row["win"].value == pytest.approx(4 / 6)
    (alone,) = (row for row in wins({m: runs[m] for m in METHODS}, 0.95) if "judge" in row["measure"])
    assert row["net"] == alone["net"], "two methods at 0.9 are each tested as one at 0.95"


@pytest.fixture(scope="module")
def of_one_seed(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = MadeUp(tmp_path_factory.mktemp("made-up"))
    return (made.report(made.runs(METHODS, 1)).path / "report.html").read_text()


def test_one_seed_says_that_its_wins_are_of_these_trainings_alone(of_one_seed: str) -> None:
    assert "With one seed they count rows alone, and speak of these trainings only" in of_one_seed
    assert "one seed, which says nothing of others" in of_one_seed


class TestMachines:
    """Where runs of one comparison were trained, and how."""

    def test_runs_of_different_machines_are_told_and_their_costs_not_marked(self, made: MadeUp) -> None:
        runs = list(made.runs(METHODS, 2))
        fast = made.history(0.0, 3408, machine=MACHINE | {"processor": "CPU Y"}, total_seconds=1.0)
        runs[-1] = runs[-1].model_copy(update={"history": fast})
        report = made.report(tuple(runs))
        data, html = json.loads((report.path / "report.json").read_text()), (report.path / "report.html").read_text()
        assert len(data["machines"]) == 2
        assert "of trainings on different machines, see Provenance: no best is marked" in html
        costs = [row for row in data["table"] if row["group"] == "Cost"]
        assert not any(cell["best"] for row in costs for cell in row["cells"].values())
        assert ["machine of grit, seed 3408", "CPU Y, 2 cores, 24 GiB of memory, CPU"] in data["provenance"]

    def test_one_machine_is_named_once_and_an_unknown_one_is_another(self, made: MadeUp) -> None:
        runs = made.runs(METHODS, 1)
        assert list(by_machine(runs)) == ["CPU X, 2 cores, 24 GiB of memory, CPU"]
        newer = {"memory_bytes": MACHINE["memory_bytes"] - 2**20, "system": "Linux, newer"}
        nearly = made.history(0, 1, machine=MACHINE | newer)
        assert len(by_machine([runs[0], runs[1].model_copy(update={"history": nearly})])) == 1, "after a new kernel"
        old = made.history(0, 1, machine=None)
        assert list(by_machine([runs[0].model_copy(update={"history": old})])) == ["not known"]

    def test_a_smaller_micro_batch_is_told(self, made: MadeUp) -> None:
        settings = {method: settings_of(method, load_settings("demo")) for method in METHODS}
        training = settings["grit"].training
        rows, passes = training.per_device_batch_size, training.gradient_accumulation_steps
        facts = {"per_device_batch_size": rows, "gradient_accumulation_steps": passes}
        runs = [made.run("baseline", 1, 0.0), made.run("baseline", 2, 0.0, **facts)]
        assert batch_notes(runs, settings) == []
        less = {"per_device_batch_size": 1, "gradient_accumulation_steps": rows * passes}
        (said,) = batch_notes([*runs, made.run("grit", 3, 0.0, **less)], settings)
        assert said.startswith(
            f"grit, seed 3: memory ran out, so it trained on 1 × {rows * passes} rows a step in place of"
        )

    def test_that_the_rows_of_the_verdict_chose_is_told(self) -> None:
        asked = {"training.keep_best": True, "training.eval_steps": 5, "training.eval_tokens": None}
        plain, best = (settings_of("grit", load_settings("demo", overrides)) for overrides in ({}, asked))
        assert choice_notes({"grit": plain}) == []
        (said,) = choice_notes({"baseline": plain, "grit": best})
        assert "on the rows of the table's validation loss" in said

    def test_methods_take_turns_only_without_a_cluster(self, made: MadeUp, of_one_seed: str) -> None:
        there = made.report(made.runs(METHODS, 1), cluster="tcp://127.0.0.1:1")
        assert "takes turns by method" in of_one_seed
        assert "takes turns by method" not in (there.path / "report.html").read_text()


def test_the_commit_is_told_and_whether_anything_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout  # noqa: S607

    assert commit(tmp_path) is None
    git("init", "-q")
    assert commit(tmp_path) is None, "there is none yet"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "One")
    head = git("rev-parse", "HEAD").strip()
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{head} with uncommitted changes"
