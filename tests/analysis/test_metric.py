"""A metric tells which method is best."""

from __future__ import annotations

from tests.support.metrics import loss_metric


def test_the_best_is_marked_only_where_it_beats_every_other() -> None:
    assert loss_metric({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.1}).best(0.95) == "grit"
    assert loss_metric({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.2}).best(0.95) is None
    assert loss_metric({"baseline": 0.0, "grit": 0.0}).best(0.95) is None
    higher = loss_metric({"baseline": 0.0, "grit": -0.2})
    higher.better = "higher"
    assert higher.best(0.95) == "baseline"
    higher.better = None
    assert higher.best(0.95) is None
    assert loss_metric({"baseline": 0.0}).best(0.95) is None
    lacking = loss_metric({"baseline": 0.0, "grit": -0.2})
    lacking.notes = {"lora_fa": "not told"}
    assert lacking.best(0.95) is None, "with a method that has no value it is not compared"
