"""Every row of a comparison's table, out of the outputs of the runs."""

from __future__ import annotations

from tasks.analysis.answer_metrics import answer_metrics
from tasks.analysis.compared_runs import BaseFigures
from tasks.analysis.cost_metrics import cost_metrics
from tasks.analysis.lm_eval_metrics import lm_eval_metrics
from tasks.analysis.loss_metrics import forgetting_metrics, loss_metrics, second_metrics
from tasks.analysis.metric import Metric, Runs


def all_metrics(runs: Runs, base: BaseFigures) -> list[Metric]:
    """Every metric of the table that these runs have.

    Args:
        runs: all methods with the same seeds; the first method is the reference.
        base: of the base model.
    """
    return [
        *loss_metrics(runs, base.scores),
        *lm_eval_metrics(runs, base.scores),
        *answer_metrics(runs, base.answers),
        *forgetting_metrics(runs, base.forgetting),
        *second_metrics(runs, base.second),
        *cost_metrics(runs),
    ]
