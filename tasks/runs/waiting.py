"""What the estimates of disk and time start from: the stages that are still to run, and the model's size."""

from __future__ import annotations

from tasks.engine.planning import Plan
from tasks.model.sources import parameters_of_source
from tasks.settings.finetune import FinetuneSettings


def waiting_stages(plan: Plan) -> list[str]:
    """Names of the stages that are not cached, in order; a name stands as often as its stage runs."""
    return [name for name, state in plan.stages if state == "to run"]


def parameter_count(settings: FinetuneSettings, plan: Plan) -> int | None:
    """The base model's weights; none if their number is not known before the model is fetched.

    Raises:
        UserError: there is no such model.
    """
    model = plan.result_of("fetch_model")
    return int(model.facts["parameters"]) if model else parameters_of_source(settings.model)
