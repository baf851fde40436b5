"""Loss on held-out rows: a mean over supervised tokens, whatever the batch size and the padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tasks.engine.errors import TrainingError, UserError
from tasks.stats.standard_errors import ratio_stderr

UNSUPERVISED = -100
"""Label of a token that is no target: PyTorch's default `ignore_index`."""
LOGITS_AT_ONCE = 2**28
"""Logits of one forward pass, at most (512 MiB in 16 bits), unless a single row has more."""
UPCAST_AT_ONCE = 2**26
"""Logits turned to float32 at a time (256 MiB)."""

Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class ValidationLoss:
    """Negative log-likelihood of the supervised tokens, in nats, by row."""

    row_nll: tuple[float, ...]
    """Sum over the supervised tokens of each row, in the order of the rows."""
    row_tokens: tuple[int, ...]
    """Number of supervised tokens of each row."""

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens."""
        return sum(self.row_tokens)

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return math.fsum(self.row_nll) / self.supervised_tokens

    @property
    def stderr(self) -> float | None:
        """Standard error of the loss over the sampling of rows; None for a single row."""
        return ratio_stderr(self.row_nll, self.row_tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def validation_loss(
    model: nn.Module, rows: Sequence[Row], batch_size: int, pad_token_id: int, *, where: object = "validation rows"
) -> ValidationLoss:
    """Measure the loss of a causal language model. The mode (training or not) of every module stays as it was.

    Args:
        model: maps `input_ids` and `attention_mask`, int64 [batch, time], to logits [batch, time, vocabulary].
        rows: `input_ids` and `labels` of like length; -100 marks a token that is no target.
        batch_size: rows in one forward pass, at most; fewer where the logits would be too large.
        pad_token_id: fills rows up on the right; any token will do, for it is masked.
        where: what an error message calls the rows.

    Raises:
        UserError: no token is supervised, or the model's loss is not a number.
    """
    nll, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    progress = tqdm(total=len(rows), desc="Validation loss", unit="row")
    with evaluating(model), torch.no_grad(), progress:
        for batch in _batches(rows, batch_size, _vocabulary(model)):
            nll[batch], tokens[batch] = _row_losses(model, [rows[index] for index in batch], pad_token_id)
            progress.update(len(batch))
    if not tokens.any():
        raise UserError("no token is supervised", where=where, fix="Give rows with an answer.")
    if not np.isfinite(nll).all():
        raise TrainingError(
            "the loss is not a number: the model's weights have diverged",
            where=where,
            fix="Lower training.learning_rate, or use model.dtype bfloat16.",
        )
    return ValidationLoss(tuple(nll.tolist()), tuple(tokens.tolist()))


def read_rows(path: Path) -> list[Row]:
    """Read the tokenised rows of a parquet file."""
    rows: list[Row] = pq.read_table(path, columns=["input_ids", "labels"]).to_pylist()
    return rows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _batches(rows: Sequence[Row], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Indices of rows of like length together, longest first: what does not fit in memory fails at once."""
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    while order:
        number = min(batch_size, max(1, LOGITS_AT_ONCE // (vocabulary * lengths[order[0]])))
        batch, order = order[:number], order[number:]
        yield batch


def _row_losses(model: nn.Module, rows: Sequence[Row], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of nats (float64) and number (int64) of the supervised tokens of each row."""
    ids = _padded([row["input_ids"] for row in rows], pad_token_id)
    mask = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
    labels = _padded([row["labels"] for row in rows], UNSUPERVISED)[:, 1:]
    tokens = (labels != UNSUPERVISED).sum(dim=1)
    if not tokens.any():
        return np.zeros(len(rows)), tokens.numpy()
    device = next(model.parameters()).device
    start = int((labels != UNSUPERVISED).any(dim=0).nonzero()[0])  # no logits are needed before the first target
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        logits_to_keep=ids.shape[1] - start,
    ).logits[:, :-1]
    targets = labels[:, start:].to(device)
    row, column = (targets != UNSUPERVISED).nonzero(as_tuple=True)
    at_once = max(1, UPCAST_AT_ONCE // logits.shape[-1])
    nll = torch.cat(
        [
            functional.cross_entropy(logits[r, c].float(), targets[r, c], reduction="none")
            for r, c in zip(row.split(at_once), column.split(at_once), strict=True)
        ]
    )
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row.cpu(), nll.double().cpu())
    return sums.numpy(), tokens.numpy()


def _padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Int64 [batch, time], filled up with `value` on the right."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences], batch_first=True, padding_value=value
    )
