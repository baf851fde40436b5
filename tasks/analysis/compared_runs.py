"""What passes between the flow `compare` and its report: the outputs of each training."""

from __future__ import annotations

import math

from pydantic import BaseModel

from tasks.engine.artifacts import Artifact
from tasks.training.history import kept_loss


class BaseFigures(BaseModel):
    """What was measured of the base model."""

    scores: Artifact
    answers: Artifact
    forgetting: Artifact
    second: Artifact | None = None


class ComparedRun(BaseModel):
    """One training of one method, and what was measured of it."""

    method: str
    seed: int
    adapter: Artifact
    history: Artifact
    scores: Artifact
    gguf: Artifact
    answers: Artifact
    forgetting: Artifact
    second: Artifact | None = None
    judgement: Artifact | None = None


class FaultRun(BaseModel):
    """One reproduction of the study's faults."""

    seed: int
    history: Artifact


class RateTrial(BaseModel):
    """One training of a learning-rate sweep."""

    method: str
    learning_rate: float
    history: Artifact | None = None
    failure: str | None = None
    """Why there is no history."""

    @property
    def loss(self) -> float:
        """The validation loss of the adapter that was kept; infinite where the training failed."""
        return kept_loss(self.history) if self.history else math.inf
