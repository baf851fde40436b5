"""What passes between the flow `compare` and its report: the outputs of each training."""

from __future__ import annotations

from pydantic import BaseModel

from tasks.artifacts import Artifact


class BaseFigures(BaseModel):
    """What was measured of the base model."""

    scores: Artifact
    answers: Artifact
    forgetting: Artifact


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


class FaultRun(BaseModel):
    """One reproduction of the study's faults."""

    seed: int
    history: Artifact
