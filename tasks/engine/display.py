"""Who shows what a run does: nobody, or the terminal of a command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import BaseModel

from tasks.engine.logs import run_logger


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is."""

    step: int
    """The last finished one, from 1."""
    steps: int
    loss: float
    """Mean training loss of that step, nats per token."""
    tokens_per_second: float
    """Of that step."""
    seconds_left: float
    """At the median time of the steps of this process."""

    def __str__(self) -> str:
        left = f"{self.seconds_left / 60:.1f} min left"
        return f"step {self.step}/{self.steps}, loss {self.loss:.4f}, {self.tokens_per_second:.0f} tokens/s, {left}"


class Display:
    """Shows nothing. What shows something takes its place by `showing`, and has these methods."""

    def begins(self, stage: str) -> None:
        """A stage begins, or looks for its cached result.

        Args:
            stage: its name, with the branch of a comparison.
        """

    def ends(self, stage: str, seconds: float, result: BaseModel | None, *, is_cached: bool) -> None:
        """A stage has ended.

        Args:
            stage: as it began.
            seconds: from its beginning, waiting included.
            result: none if it failed or was stopped, by the exception that is handled now.
            is_cached: whether the result is a former run's.
        """

    def trains(self, progress: TrainingProgress) -> None:
        """The training of the stage that runs has finished a step."""

    def notice(self, message: str) -> None:
        """Something that a user wants to know while it happens, such as what the run waits for."""


_display = Display()


def display() -> Display:
    """What shows this process's run."""
    return _display


@contextmanager
def showing(new: Display) -> Iterator[None]:
    """Within this block a display shows what the stages of this process do."""
    global _display
    former, _display = _display, new
    try:
        yield
    finally:
        _display = former


def announce(message: str) -> None:
    """Log something that a user wants to know while it happens, and show it."""
    run_logger().info("%s", message)
    display().notice(message)
