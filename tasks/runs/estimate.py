"""What a run will need, before it starts, in a few lines."""

from __future__ import annotations

from tasks.engine.planning import Plan
from tasks.runs.disk import disk_lines, disk_needs, free_bytes
from tasks.runs.duration import ESTIMATED, duration_line
from tasks.runs.waiting import parameter_count, waiting_stages
from tasks.settings.finetune import FinetuneSettings


def estimate(settings: FinetuneSettings, plan: Plan) -> list[str]:
    """Say in a few lines what the stages that are not cached will take.

    Args:
        plan: the state of its stages.
    """
    waiting = waiting_stages(plan)
    if not waiting:
        return ["Nothing to compute: all is cached."]
    needs, parameters = disk_needs(settings, plan), parameter_count(settings, plan)
    if needs is None or parameters is None:
        free = free_bytes(settings.store)
        return [f"Disk and time: known once the base model has been fetched ({free / 1e9:.0f} GB are free)."]
    lines = disk_lines(needs)
    if ESTIMATED & set(waiting):
        lines.append(duration_line(settings, parameters, plan))
    return lines
