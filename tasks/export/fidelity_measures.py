"""How far a GGUF in llama.cpp and the model that it was made from agree, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.evaluation.loading import load_model
from tasks.export.fidelity_limits import FidelityFigures
from tasks.llamacpp.load import check_loads, load_gguf
from tasks.llamacpp.token_ids import Mismatch
from tasks.settings.export import FidelitySettings
from tasks.settings.finetune import ModelSettings
from tasks.stats.standard_errors import ratio_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPLITS = ("validation", "test", "train")


class ReadRow(NamedTuple):
    """A row that both models read."""

    ids: list[int]
    before: np.ndarray
    """Positions after which a supervised token comes."""
    targets: np.ndarray
    """These tokens."""


class RowFidelity(NamedTuple):
    """One row, summed over its supervised tokens."""

    tokens: int
    nll_base: float
    """Nats of the tokens by the base model."""
    nll_merged: float
    nll_gguf: float
    kl: float
    """Kullback-Leibler divergence of the GGUF's distribution from the merged model's, in nats."""
    kept_top: int
    """Tokens at which the GGUF's likeliest successor is at least half as likely to the merged model as its own."""
    shown: float
    """Sum of d_merged * d_gguf, where d is a token's log-probability less the base model's."""
    changed: float
    """Sum of d_merged squared."""


def rows_to_compare(dataset: Artifact, settings: FidelitySettings) -> list[ReadRow]:
    """The rows that both read: the first held-out ones, or else training rows.

    Args:
        dataset: tokenised rows.
        settings: how many, and how much of each.
    """
    from tasks.evaluation.validation_loss import UNSUPERVISED, read_rows

    path = next(path for split in SPLITS if (path := dataset.path / f"{split}.parquet").is_file())
    rows = []
    for row in read_rows(path):
        ids, labels = (np.array(row[name]) for name in ("input_ids", "labels"))
        answers = np.flatnonzero(labels[1:] != UNSUPERVISED)
        if not len(answers):
            continue
        first = int(answers[0]) + 1
        # Of a prompt that alone is as long as that, the end: without answer tokens there is nothing to compare.
        start = max(0, first - settings.max_tokens // 2) if first >= settings.max_tokens else 0
        ids, labels = (values[start : start + settings.max_tokens] for values in (ids, labels))
        before = np.flatnonzero(labels[1:] != UNSUPERVISED)
        rows.append(ReadRow(ids.tolist(), before, labels[before + 1]))
        if len(rows) == settings.rows:
            break
    return rows


def open_gguf(file: Path, context: int) -> Any:
    """Load a GGUF so that it gives the logits of every token.

    Args:
        file: the GGUF.
        context: longest row in tokens.

    Raises:
        UserError: llama.cpp cannot load it.
    """
    check_loads(file)
    try:
        return load_gguf(file, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        fix = "Start the run again: a damaged file is made anew. Otherwise look at export.llama_cpp."
        raise UserError(f"llama.cpp cannot load the GGUF: {reason}", where=file, fix=fix) from error


def end_token_agrees(llama: Any, tokenizer: Any) -> bool:
    """Whether the GGUF ends a generation at the token that ends a turn.

    Args:
        llama: the GGUF.
        tokenizer: of the merged model.
    """
    return int(llama.token_eos()) == tokenizer.eos_token_id


def compare_row(*, merged: np.ndarray, gguf: np.ndarray, targets: np.ndarray, nll_base: np.ndarray) -> RowFidelity:
    """Compare two models' predictions of one row.

    Args:
        merged: logits where a supervised token follows, float32 [T, V].
        gguf: the same, by the GGUF; where it has more columns, they stand for no token.
        targets: the tokens that follow, int64 [T].
        nll_base: nats of these tokens by the base model, [T].
    """
    p, q = _log_softmax(merged), _log_softmax(gguf[:, : merged.shape[1]])
    at = np.arange(len(targets))
    nll_merged, nll_gguf = -p[at, targets], -q[at, targets]
    d_merged, d_gguf = nll_base - nll_merged, nll_base - nll_gguf
    return RowFidelity(
        tokens=len(targets),
        nll_base=float(nll_base.sum()),
        nll_merged=float(nll_merged.sum()),
        nll_gguf=float(nll_gguf.sum()),
        kl=float((np.exp(p) * (p - q)).sum()),
        # Where two are nearly as likely, the least rounding makes the other one the likeliest.
        kept_top=int((p[at, q.argmax(1)] >= p.max(1) - math.log(2)).sum()),
        shown=float((d_merged * d_gguf).sum()),
        changed=float((d_merged**2).sum()),
    )


def fidelity_figures(
    rows: Sequence[RowFidelity], wrong: Sequence[Mismatch], *, file_type: str, end_token: bool
) -> FidelityFigures:
    """The measures over all rows, with standard errors over the sampling of rows.

    Args:
        rows: one for each row.
        wrong: texts that are read as other tokens.
        file_type: `general.file_type` as the GGUF has it.
        end_token: whether the GGUF ends a generation at the token that ends a turn.
    """
    tokens = [row.tokens for row in rows]
    count = sum(tokens)
    rise = [row.nll_gguf - row.nll_merged for row in rows]
    shown, changed = [row.shown for row in rows], [row.changed for row in rows]
    ratio = math.exp(min(math.fsum(rise) / count, 50.0))
    error = ratio_stderr(rise, tokens)
    return FidelityFigures(
        rows=len(rows),
        tokens=count,
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=None if error is None else ratio * error,
        kl=math.fsum(row.kl for row in rows) / count,
        top1=sum(row.kept_top for row in rows) / count,
        difference_kept=math.fsum(shown) / math.fsum(changed) if math.fsum(changed) > 0 else None,
        difference_kept_stderr=ratio_stderr(shown, changed) if math.fsum(changed) > 0 else None,
        wrong_texts=tuple(text.text for text in wrong),
        file_type=file_type,
        end_token=end_token,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def token_logits(network: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """The logits after each token of a row, by a model in Transformers.

    Args:
        network: from `load_model`.
        ids: the row's tokens.

    Returns:
        Float32 [T, V].
    """
    import torch

    with torch.no_grad():
        tokens = torch.tensor([ids], device=network.device)
        logits = network(input_ids=tokens, use_cache=False).logits[0]
    return np.asarray(logits.float().cpu().numpy())


def gguf_logits(llama: Any, ids: list[int], vocabulary: int) -> np.ndarray:
    """The logits after each token of a row, by the GGUF.

    Args:
        llama: from `open_gguf`.
        ids: the row's tokens.
        vocabulary: columns that are kept.

    Returns:
        Float32 [T, V].
    """
    llama.reset()
    llama.eval(ids)
    return np.asarray(llama.scores[: len(ids), :vocabulary])


def base_nll_by_row(model: Artifact, dataset: Artifact, rows: list[ReadRow], base: ModelSettings) -> list[np.ndarray]:
    """Nats of each supervised token, by the base model; it is gone from memory afterwards.

    Args:
        model: the base model.
        dataset: its tokenizer.
        rows: what is read.
        base: the type that is computed in, and whether to run code that comes with the model.

    Returns:
        Float64 [T] for each row.
    """
    from accelerate.utils.memory import clear_device_cache

    network, _ = load_model(model, dataset, base.dtype, base.trust_remote_code)
    nats = []
    for row in tqdm(rows, desc="Base model", unit="row"):
        logs = _log_softmax(token_logits(network, row.ids)[row.before])
        nats.append(-logs[np.arange(len(row.targets)), row.targets])
    del network
    clear_device_cache()
    return nats
