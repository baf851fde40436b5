"""What the curves of a comparison are drawn from: pairs of validations, and the smoothed training loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.analysis import figures as pictures
from tasks.report.figures import smoothed
from tests.support.made_up_comparison import MadeUp

WHOLE = [[0, 3.0], [5, 2.5], [10, 2.0], [15, 1.5], [20, 1.0]]


@pytest.fixture
def made(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path / "made-up")


class TestValidationPoints:
    """Seeds that were validated after different steps share a curve. Each made-up step has 100 tokens."""

    @staticmethod
    def runs(made: MadeUp, *validations: list[list[float]]) -> list[Any]:
        return [made.run("grit", seed, 0.0, validation=each) for seed, each in enumerate(validations)]

    def test_the_multiple_of_tokens_pairs_them_and_the_end_of_the_training(self, made: MadeUp) -> None:
        two_at_once = [[0, 3.5], [6, 3.0], [16, 1.7], [20, 1.4]]
        runs = self.runs(made, WHOLE, two_at_once)
        for over, x in (("tokens", [0, 550, 1550, 2000]), ("seconds", [2, 10.25, 25.25, 32])):
            found, losses = pictures.validation_points(runs, over, 500)
            assert found.tolist() == x
            assert losses.tolist() == [[3, 2.5, 1.5, 1], [3.5, 3, 1.7, 1.4]]

    def test_a_validation_that_one_has_more_costs_no_other_its_end(self, made: MadeUp) -> None:
        one_more = [[0, 3.5], [6, 3.0], [11, 2.0], [16, 1.7], [19, 1.5], [20, 1.4]]
        found, losses = pictures.validation_points(self.runs(made, WHOLE, one_more), "tokens", 450)
        assert losses[:, -1].tolist() == [1.0, 1.4] and found[-1] == 2000
        assert losses[1].tolist() == [3.5, 3.0, 2.0, 1.7, 1.4], "what only one seed has is in no mean"

    def test_a_curve_ends_where_a_training_was_stopped(self, made: MadeUp) -> None:
        (whole,) = self.runs(made, [*WHOLE[:4], [19, 1.2], [20, 1.0]])
        made.steps = 11
        (stopped,) = self.runs(made, [[0, 3.5], [6, 3.0], [11, 2.6]])
        found, losses = pictures.validation_points([whole, stopped], "tokens", 500)
        assert found.tolist() == [0, 550, 1050]
        assert losses.tolist() == [[3, 2.5, 2], [3.5, 3, 2.6]]

    def test_steps_pair_them_where_no_tokens_are_set(self, made: MadeUp) -> None:
        found, losses = pictures.validation_points(self.runs(made, WHOLE, WHOLE[1:]), "tokens", None)
        assert found.tolist() == [500, 1000, 1500, 2000] and losses.shape == (2, 4)

    def test_there_may_be_none(self, made: MadeUp) -> None:
        found, losses = pictures.validation_points(self.runs(made, [], []), "tokens", 500)
        assert found.shape == (0,) and losses.shape == (2, 0)


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
