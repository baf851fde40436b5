"""How a training's progress is shown."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

from tasks.engine.display import TrainingProgress, display
from tasks.engine.logs import run_logger

PROGRESS_SECONDS = 5.0
LOG_SECONDS = 60.0


class ProgressArtifact:
    """The training's progress: on the display, in the log, and as Prefect's progress artifact where a task runs."""

    def __init__(self) -> None:
        self._id: Any = None
        self._published = self._logged = -math.inf
        self._seconds: list[float] = []

    def show(self, step: int, steps: int, line: dict[str, Any]) -> None:
        """Show a step. Prefect's page learns of it every few seconds, the log every minute.

        A server that does not answer costs the page, not the training.

        Args:
            step: the last finished one, from 1.
            steps: how many there will be.
            line: the step's figures; of these `loss`, `tokens` and `seconds`.
        """
        self._seconds.append(line["seconds"])
        progress = TrainingProgress(
            step=step,
            steps=steps,
            loss=line["loss"],
            tokens_per_second=line["tokens"] / line["seconds"],
            seconds_left=(steps - step) * statistics.median(self._seconds),
        )
        display().trains(progress)
        now, is_last = time.monotonic(), step == steps
        if now - self._published < PROGRESS_SECONDS and not is_last:
            return
        self._published = now
        description = str(progress).capitalize()
        if now - self._logged >= LOG_SECONDS or is_last:
            self._logged = now
            run_logger().info(description)
        if TaskRunContext.get() is not None:
            try:
                self._publish(100.0 * step / steps, description)
            except Exception as error:
                run_logger().warning("The progress cannot be shown: %s", error)

    def _publish(self, percent: float, description: str) -> None:
        if self._id is None:
            self._id = create_progress_artifact(progress=percent, key="training", description=description)
        else:
            update_progress_artifact(artifact_id=self._id, progress=percent, description=description)
