"""Time and size of the trainings of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.analysis.compared_runs import ComparedRun
from tasks.analysis.cost_metrics import point_reaching
from tasks.engine.artifacts import reference
from tasks.training.history import steps_to_kept


def test_steps_to_a_loss_are_read_between_validations(tmp_path: Path) -> None:
    lines = [{"step": step, "seconds": 2.0, "loss": 1.0, "supervised_tokens": 1} for step in range(1, 31)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"validation": [(10, 3.0), (20, 2.0), (30, 1.0)], "basis_seconds": 5.0, "kept": (20, 2.0)}
    history = reference("history", tmp_path, ["history.jsonl"], facts)
    others = dict.fromkeys(("adapter", "scores", "gguf", "answers", "forgetting"), history)
    run = ComparedRun(method="baseline", seed=1, history=history, **others)
    assert point_reaching(run, 1.5) == (25, 5 + 50)
    assert point_reaching(run, 3.5) == (10, 5 + 20), "not before the first"
    assert point_reaching(run, 0.5) is None
    assert len(steps_to_kept(history)) == 20, "the training loss is that of the adapter that was kept"
