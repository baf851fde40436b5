"""How a training's progress is shown."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

from tasks.engine.logs import run_logger

PROGRESS_SECONDS = 5.0
LOG_SECONDS = 60.0


class ProgressArtifact:
    """The training's progress: in the log, and as Prefect's progress artifact where a task runs."""

    def __init__(self) -> None:
        self._id: Any = None
        self._shown = self._logged = -math.inf
        self._seconds: list[float] = []

    def show(self, step: int, steps: int, line: dict[str, Any]) -> None:
        """Show percent, loss, tokens per second and time left, every few seconds; log them every minute.

        A server that does not answer costs the page, not the training.
        """
        self._seconds.append(line["seconds"])
        now, last = time.monotonic(), step == steps
        if now - self._shown < PROGRESS_SECONDS and not last:
            return
        self._shown = now
        seconds = statistics.median(self._seconds)
        description = (
            f"Step {step} of {steps}, loss {line['loss']:.4f}, {line['tokens'] / line['seconds']:.0f} tokens/s, "
            f"{(steps - step) * seconds / 60:.1f} min left"
        )
        if now - self._logged >= LOG_SECONDS or last:
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
