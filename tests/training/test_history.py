"""What a training's history says of its end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.history import final_training_loss, last_steps


@given(st.integers(1, 200))
def test_the_end_is_ten_steps_or_the_last_quarter_of_a_short_training(number: int) -> None:
    steps = [{"step": step} for step in range(1, number + 1)]
    last = last_steps(steps)
    assert last[-1]["step"] == number and len(last) == max(1, min(10, number // 4))


def test_the_start_of_a_short_training_is_no_part_of_its_final_loss() -> None:
    losses = [7.2, 8.4, 2.3, 0.4, 0.3, 0.3, 0.3, 0.2]
    assert final_training_loss([{"loss": loss, "supervised_tokens": 1} for loss in losses]) == pytest.approx(0.25)


def test_the_final_loss_is_a_mean_over_tokens_and_not_over_steps() -> None:
    steps = [{"loss": 9.0, "supervised_tokens": 1}] * 6 + [
        {"loss": 1.0, "supervised_tokens": 30},
        {"loss": 2.0, "supervised_tokens": 10},
    ]
    assert final_training_loss(steps) == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
