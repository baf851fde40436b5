"""What a training is told."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import GritSettings, LoraSettings, ModelSettings, TrainingSettings


class Job(BaseModel):
    """All that a training needs to know."""

    model: Artifact
    dataset: Artifact
    base: ModelSettings
    lora: LoraSettings
    training: TrainingSettings
    grit: GritSettings | None
    seed: int
    adapter: Path | None
    """Directory that the adapter is written into; none where none is wanted."""
    history: Path
    """Directory of lines per step and TensorBoard events."""
    fault: bool = False
    """Reproduce the study's loss and batch, see `tasks.training.faulty_step`; needs `grit`."""
    checkpoints: Path
    """Directory of the checkpoints of this very training; what it holds is gone on from."""
