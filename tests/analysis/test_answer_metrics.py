"""Whose answers are better, and how surely."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tasks.analysis.answer_metrics import win_shares, wins
from tests.support.made_up_comparison import MadeUp, by_method


def test_wins_ties_and_losses_are_shares_with_intervals() -> None:
    sign = np.random.default_rng(1).choice([-1, 0, 1], size=(3, 40), p=[0.1, 0.3, 0.6])
    shares = win_shares(sign, 0.95)
    assert shares["win"].value == pytest.approx((sign > 0).mean())
    assert shares["win"].value + shares["tie"].value + shares["loss"].value == pytest.approx(1)
    assert shares["net"].exceeds_error
    for name in ("win", "tie", "loss"):
        low, high = shares[name].interval
        assert 0 <= low < shares[name].value < high <= 1
    assert win_shares(sign[:, :3], 0.95)["loss"].interval[0] == 0, "a share is not below nothing"
    assert not win_shares(sign[:1], 0.95)["net"].repeated


@pytest.mark.usefixtures("fewer_resamples")
def test_a_judge_that_failed_on_the_way_is_told_and_confidence_is_shared(outputs: MadeUp) -> None:
    runs = by_method(outputs.runs(("baseline", "grit", "grit:graft"), 3))
    line = "".join(json.dumps({"outcome": outcome}) + "\n" for outcome in [1, 0, 1, 1, -1, 1])
    judgement = outputs.artifact("judgement", {"judgement.jsonl": line}, {"model": "J"})
    runs["grit"] = [run.model_copy(update={"judgement": judgement}) for run in runs["grit"][:2]] + runs["grit"][2:]
    rows = wins(runs, 0.9)
    (row,) = (row for row in rows if row["key"] == "judge")
    assert row["measure"] == "preferred by the judge J, in both orders (2 of 3 seeds: then it failed)"
    assert row["win"].value == pytest.approx(4 / 6)
    (alone,) = (row for row in wins({m: runs[m] for m in ("baseline", "grit")}, 0.95) if row["key"] == "judge")
    assert row["net"] == alone["net"], "two methods at 0.9 are each tested as one at 0.95"
