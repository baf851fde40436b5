"""A comparison's report of made-up runs: what it says, what it leaves out and why, and how large it gets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tasks.analysis.compared_runs import RateTrial
from tasks.analysis.learning_rates import edge_sentence, trial_rows
from tasks.analysis.methods import settings_of
from tasks.analysis.provenance import batch_notes, by_machine, choice_notes, commit
from tasks.settings.presets import load_settings
from tasks.stats import estimates
from tests.support.made_up_comparison import MACHINE, MadeUp

METHODS = ("baseline", "grit")


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 50)


@pytest.fixture
def outputs(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path / "made-up")


def test_rates_that_look_alike_have_directories_of_their_own_and_a_choice_at_the_edge_is_told(outputs: MadeUp) -> None:
    losses = {1e-3: 0.3, 1.0000001e-3: 0.2, 2e-3: 0.1}
    trials = tuple(
        RateTrial(method=method, learning_rate=rate, history=outputs.history(loss, 1))
        for method in METHODS
        for rate, loss in losses.items()
    )
    report = outputs.report(outputs.runs(METHODS, 2), trials)
    data = json.loads((report.path / "report.json").read_text())
    assert {path.name for path in (report.path / "tensorboard/grit").iterdir()} == {
        "seed-3407", "seed-3408", "rate-0.001", "rate-0.0010000001", "rate-0.002",
    }  # fmt: skip
    assert [(row["learning_rate"], row["edge"]) for row in data["trials"] if row["chosen"]] == [(2e-3, "highest")] * 2
    advice = "grit took the highest rate tried, 0.002: a better one may lie beyond the grid."
    for name in ("report.html", "report.md"):
        assert advice in (report.path / name).read_text()


def test_the_short_report_has_the_studys_figures_beside_ours(outputs: MadeUp) -> None:
    text = (outputs.report(outputs.runs(METHODS, 2)).path / "report.md").read_text()
    heading, _, first = text[text.index("| published |") :].splitlines()[:3]
    assert heading.endswith("| ours: baseline | ours: grit |")
    assert first.startswith("| final training loss | 1.0439 | 0.0899") and first.count("±") == 2
    assert heading.count("|") == first.count("|")


def test_a_choice_within_the_grid_is_at_no_edge(outputs: MadeUp) -> None:
    trials = [
        RateTrial(method="grit", learning_rate=rate, history=outputs.history(loss, 1))
        for rate, loss in ((1e-3, 0.3), (2e-3, 0.1), (4e-3, 0.2))
    ]
    rows = trial_rows(trials, ("grit",))
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert edge_sentence(rows) is None
    assert edge_sentence(trial_rows(trials[:1], ("grit",))) is None, "one rate is no choice"
    assert edge_sentence(trial_rows(trials[1:], ("grit",))) is not None


def test_long_answers_are_cut_in_the_page_and_whole_in_its_data(
    outputs: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.made_up_comparison.EXPECTED", "long " * 50_000)
    runs = tuple(run.model_copy(update={"answers": outputs.answers("x")}) for run in outputs.runs(METHODS, 1))
    outputs.base = outputs.base.model_copy(update={"answers": runs[0].answers})
    report = outputs.report(runs)
    html = (report.path / "report.html").read_text()
    assert len(html) < 1_000_000 and "(all of it: report.json)" in html
    assert len(json.loads((report.path / "report.json").read_text())["samples"][0]["expected"]) == 250_000


@pytest.fixture(scope="module")
def of_one_seed(tmp_path_factory: pytest.TempPathFactory) -> str:
    outputs = MadeUp(tmp_path_factory.mktemp("made-up"))
    return (outputs.report(outputs.runs(METHODS, 1)).path / "report.html").read_text()


def test_one_seed_says_that_its_wins_are_of_these_trainings_alone(of_one_seed: str) -> None:
    assert "With one seed they count rows alone, and speak of these trainings only" in of_one_seed
    assert "one seed, which says nothing of others" in of_one_seed


class TestMachines:
    """Where runs of one comparison were trained, and how."""

    def test_runs_of_different_machines_are_told_and_their_costs_not_marked(self, outputs: MadeUp) -> None:
        runs = list(outputs.runs(METHODS, 2))
        fast = outputs.history(0.0, 3408, machine=MACHINE | {"processor": "CPU Y"}, total_seconds=1.0)
        runs[-1] = runs[-1].model_copy(update={"history": fast})
        report = outputs.report(tuple(runs))
        data, html = json.loads((report.path / "report.json").read_text()), (report.path / "report.html").read_text()
        assert len(data["machines"]) == 2
        assert "of trainings on different machines, see Provenance: no best is marked" in html
        costs = [row for row in data["table"] if row["group"] == "cost"]
        assert not any(cell["best"] for row in costs for cell in row["cells"].values())
        assert ["machine of grit, seed 3408", "CPU Y, 2 cores, 24 GiB of memory, CPU"] in data["provenance"]

    def test_one_machine_is_named_once_and_an_unknown_one_is_another(self, outputs: MadeUp) -> None:
        runs = outputs.runs(METHODS, 1)
        assert list(by_machine(runs)) == ["CPU X, 2 cores, 24 GiB of memory, CPU"]
        newer = {"memory_bytes": MACHINE["memory_bytes"] - 2**20, "system": "Linux, newer"}
        nearly = outputs.history(0, 1, machine=MACHINE | newer)
        assert len(by_machine([runs[0], runs[1].model_copy(update={"history": nearly})])) == 1, "after a new kernel"
        old = outputs.history(0, 1, machine=None)
        assert list(by_machine([runs[0].model_copy(update={"history": old})])) == ["not known"]

    def test_a_smaller_micro_batch_is_told(self, outputs: MadeUp) -> None:
        settings = {method: settings_of(method, load_settings("demo")) for method in METHODS}
        training = settings["grit"].training
        rows, passes = training.per_device_batch_size, training.gradient_accumulation_steps
        facts = {"per_device_batch_size": rows, "gradient_accumulation_steps": passes}
        runs = [outputs.run("baseline", 1, 0.0), outputs.run("baseline", 2, 0.0, **facts)]
        assert batch_notes(runs, settings) == []
        less = {"per_device_batch_size": 1, "gradient_accumulation_steps": rows * passes}
        (note,) = batch_notes([*runs, outputs.run("grit", 3, 0.0, **less)], settings)
        assert note.startswith(
            f"grit, seed 3: memory ran out, so it trained on 1 × {rows * passes} rows a step in place of"
        )

    def test_that_the_rows_of_the_verdict_chose_is_told(self) -> None:
        asked = {"training.keep_best": True, "training.eval_steps": 5, "training.eval_tokens": None}
        plain, best = (settings_of("grit", load_settings("demo", overrides)) for overrides in ({}, asked))
        assert choice_notes({"grit": plain}) == []
        (note,) = choice_notes({"baseline": plain, "grit": best})
        assert "on the rows of the table's validation loss" in note

    def test_methods_take_turns_only_without_a_cluster(self, outputs: MadeUp, of_one_seed: str) -> None:
        there = outputs.report(outputs.runs(METHODS, 1), cluster="tcp://127.0.0.1:1")
        assert "takes turns by method" in of_one_seed
        assert "takes turns by method" not in (there.path / "report.html").read_text()


def test_the_commit_is_told_and_whether_anything_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout  # noqa: S607, whichever git there is

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
