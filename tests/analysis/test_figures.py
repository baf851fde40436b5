"""What the curves of a comparison are drawn from: pairs of validations, and the smoothed training loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.analysis import figures as pictures
from tasks.analysis.module_maps import module_maps
from tasks.report.figures import smoothed
from tasks.settings.comparison import ComparedMethod
from tasks.training.history import steps_of
from tests.support.made_up_comparison import MadeUp, by_method

WHOLE = [[0, 3.0], [5, 2.5], [10, 2.0], [15, 1.5], [20, 1.0]]


class TestValidationPoints:
    """Seeds that were validated after different steps share a curve. Each made-up step has 100 tokens."""

    @staticmethod
    def runs(outputs: MadeUp, *validations: list[list[float]]) -> list[Any]:
        return [outputs.run("grit", seed, 0.0, validation=points) for seed, points in enumerate(validations)]

    def test_the_multiple_of_tokens_pairs_them_and_the_end_of_the_training(self, outputs: MadeUp) -> None:
        two_at_once = [[0, 3.5], [6, 3.0], [16, 1.7], [20, 1.4]]
        runs = self.runs(outputs, WHOLE, two_at_once)
        for over, expected in (("tokens", [0, 550, 1550, 2000]), ("seconds", [2, 10.25, 25.25, 32])):
            x, losses = pictures.validation_points(runs, over, 500)
            assert x.tolist() == expected
            assert losses.tolist() == [[3, 2.5, 1.5, 1], [3.5, 3, 1.7, 1.4]]

    def test_a_validation_that_one_has_more_costs_no_other_its_end(self, outputs: MadeUp) -> None:
        one_more = [[0, 3.5], [6, 3.0], [11, 2.0], [16, 1.7], [19, 1.5], [20, 1.4]]
        x, losses = pictures.validation_points(self.runs(outputs, WHOLE, one_more), "tokens", 450)
        assert losses[:, -1].tolist() == [1.0, 1.4] and x[-1] == 2000
        assert losses[1].tolist() == [3.5, 3.0, 2.0, 1.7, 1.4], "what only one seed has is in no mean"

    def test_a_curve_ends_where_a_training_was_stopped(self, outputs: MadeUp) -> None:
        (whole,) = self.runs(outputs, [*WHOLE[:4], [19, 1.2], [20, 1.0]])
        outputs.steps = 11
        (stopped,) = self.runs(outputs, [[0, 3.5], [6, 3.0], [11, 2.6]])
        x, losses = pictures.validation_points([whole, stopped], "tokens", 500)
        assert x.tolist() == [0, 550, 1050]
        assert losses.tolist() == [[3, 2.5, 2], [3.5, 3, 2.6]]

    def test_steps_pair_them_where_no_tokens_are_set(self, outputs: MadeUp) -> None:
        x, losses = pictures.validation_points(self.runs(outputs, WHOLE, WHOLE[1:]), "tokens", None)
        assert x.tolist() == [500, 1000, 1500, 2000] and losses.shape == (2, 4)

    def test_there_may_be_none(self, outputs: MadeUp) -> None:
        x, losses = pictures.validation_points(self.runs(outputs, [], []), "tokens", 500)
        assert x.shape == (0,) and losses.shape == (2, 0)


class TestSmoothed:
    def test_it_is_the_mean_of_as_many_before_as_after(self) -> None:
        losses = np.random.default_rng(0).random(100)
        smooth = smoothed(losses.tolist())
        assert smooth[50] == pytest.approx(losses[48:53].mean())
        assert smooth[0] == pytest.approx(losses[:3].mean()) and smooth[-1] == pytest.approx(losses[-3:].mean())

    @given(steps=st.integers(1, 600))
    def test_it_does_not_lag(self, steps: int) -> None:
        falling = np.linspace(3, 1, steps)
        reach = steps // 50
        inner = slice(reach, steps - reach)
        assert smoothed(falling.tolist())[inner] == pytest.approx(falling[inner])

    def test_a_short_training_is_shown_as_it_was(self) -> None:
        assert smoothed([3.0, 1.0, 2.0]).tolist() == [3.0, 1.0, 2.0]


def test_a_line_keeps_its_first_and_last_point_and_not_too_many() -> None:
    for points in (1, 5, 400, 401, 9999):
        kept = pictures.thinned(points)
        assert (kept[0], kept[-1]) == (0, points - 1)
        assert len(kept) == min(points, pictures.POINTS) and (np.diff(kept) > 0).all()


def test_twelve_methods_of_five_thousand_steps_stay_far_below_three_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = MadeUp(tmp_path / "made-up", steps=5000, validations=500)
    first, second = outputs.history(0.0, 1, grit=True), outputs.history(0.1, 2, grit=True)
    lines = {history.path: steps_of(history) for history in (first, second)}
    monkeypatch.setattr(pictures, "steps_of", lambda history: lines[history.path])  # read once
    runs = outputs.runs(("baseline",), 2)
    by_name = {
        method: [
            run.model_copy(update={"history": history}) for run, history in zip(runs, (first, second), strict=True)
        ]
        for method in get_args(ComparedMethod)[:-1]
    }
    curves = [draw(by_name, "tokens", None) for draw in (pictures.loss_curves, pictures.validation_curves)]
    maps = [picture for *_, picture in module_maps({"grit": by_name["grit"]})]
    # The curves come twice, over tokens and over seconds.
    assert 2 * sum(map(len, curves)) + 12 * sum(map(len, maps)) < 2_000_000


def test_the_dashed_line_is_in_the_legend(outputs: MadeUp) -> None:
    runs = by_method(outputs.runs(("baseline", "grit"), 2))
    assert ">validation</text>" in pictures.loss_curves(runs, "tokens", None)
