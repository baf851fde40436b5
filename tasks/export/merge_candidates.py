"""After training on NF4 two merges are possible; the validation loss of the merged models says which is better.

The adapter has learned beside the NF4 weights, and partly against their rounding. Merged into the original weights it
meets better ones than it knew; merged into the dequantised ones it meets what it knew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.engine.artifacts import Artifact
from tasks.settings.base import Section
from tasks.settings.finetune import FinetuneSettings
from tasks.stats.standard_errors import ratio_stderr

if TYPE_CHECKING:
    from tasks.evaluation.validation_loss import ValidationLoss

Weights = Literal["original", "dequantized"]
CANDIDATES: tuple[Weights, ...] = ("original", "dequantized")
"""What an adapter can be merged into; the first where validation losses are equal, or not to be had."""


class Nf4Merge(Section):
    """How an adapter that was trained on NF4 is merged."""

    dtype: str
    """The setting `model.dtype`."""
    double_quantization: bool
    """The setting `model.double_quantization`."""
    into: Literal["best", "original", "dequantized"]
    """The setting `export.merge_into`."""
    batch_size: int
    """The setting `scoring.batch_size`."""

    def candidates(self, dataset: Artifact) -> tuple[Weights, ...]:
        """What to merge into: both where the better one is wanted and validation rows can tell it."""
        if self.into != "best":
            return (self.into,)
        return CANDIDATES if (dataset.path / "validation.parquet").is_file() else CANDIDATES[:1]


def nf4_merge(settings: FinetuneSettings) -> Nf4Merge | None:
    """How to merge after training on NF4; none where training ran on 16-bit weights."""
    if settings.model.quantization == "none":
        return None
    return Nf4Merge(
        dtype=settings.model.dtype,
        double_quantization=settings.model.double_quantization,
        into=settings.export.merge_into,
        batch_size=settings.scoring.batch_size,
    )


def keep_the_better(directory: Path, dataset: Artifact, trust_remote_code: bool, nf4: Nf4Merge) -> dict[str, Any]:
    """Move the model with the lower validation loss out of its sub-directory, and remove the other.

    Args:
        directory: holds a whole model by the name of each of `CANDIDATES`.
        dataset: its validation rows.
        trust_remote_code: run the model's own code.
        nf4: type of the computation, and rows in one forward pass.

    Returns:
        `into`: which was kept; `validation_loss` of each, in nats per supervised token; `difference`, of the first less
        the second, and its standard error `stderr`, paired by row.

    Raises:
        UserError: a loss is not a number.
    """
    losses = {name: merged_validation_loss(directory / name, dataset, trust_remote_code, nf4) for name in CANDIDATES}
    first, second = (losses[name] for name in CANDIDATES)
    best = min(CANDIDATES, key=lambda name: losses[name].loss)
    for file in (directory / best).iterdir():
        file.rename(directory / file.name)
    for name in CANDIDATES:
        shutil.rmtree(directory / name)
    return {
        "into": best,
        "validation_loss": {name: loss.loss for name, loss in losses.items()},
        "difference": first.loss - second.loss,
        "stderr": ratio_stderr([a - b for a, b in zip(first.row_nll, second.row_nll, strict=True)], first.row_tokens),
    }


def merged_validation_loss(
    directory: Path, dataset: Artifact, trust_remote_code: bool, nf4: Nf4Merge
) -> ValidationLoss:
    """The validation loss of a merged model; the model is gone from memory afterwards.

    Args:
        directory: of the model.
        dataset: its validation rows.
        trust_remote_code: run the model's own code.
        nf4: type of the computation, and rows in one forward pass.

    Raises:
        UserError: the loss is not a number.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.evaluation.loading import load_model
    from tasks.evaluation.validation_loss import read_rows, validation_loss

    candidate = Artifact(kind="merged", path=directory, files={}, size=0, facts={})
    network, tokenizer = load_model(candidate, dataset, nf4.dtype, trust_remote_code)
    rows = read_rows(dataset.path / "validation.parquet")
    loss = validation_loss(network, rows, nf4.batch_size, tokenizer.pad_token_id, where=directory)
    del network
    clear_device_cache()  # the next model needs the GPU's memory
    return loss
