"""Stage: the GGUF in llama.cpp is held against the merged model in Transformers, on the same tokens.

What the two are compared by is what users of llama.cpp's `perplexity` tool know: mean Kullback-Leibler divergence,
share of tokens whose likeliest successor is kept, ratio of the perplexities. Beyond that the GGUF must show what tuning
changed, which an export of the base model would not. Counted are the supervised tokens, those of the answers: a tuned
model's idea of the prompts is no matter to its users, and not stable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tasks.artifacts import Artifact, Store
from tasks.errors import UserError
from tasks.export_settings import FidelitySettings, GgufType
from tasks.fidelity_limits import Limits, Measured, judged, limits
from tasks.llama import check_loads, load_gguf
from tasks.scoring import COMPUTING, conversations, load_model
from tasks.settings import ModelSettings
from tasks.stage import stage
from tasks.token_ids import Mismatch, mismatches, prompt_mismatches, torture
from tasks.uncertainty import ratio_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = 32
"""Held-out prompts whose token ids are compared, at most."""
SPLITS = ("validation", "test", "train")


class ReadRow(NamedTuple):
    """A row that both models read."""

    ids: list[int]
    before: np.ndarray
    """Positions after which a supervised token comes."""
    targets: np.ndarray
    """These tokens."""


class RowMeasures(NamedTuple):
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


@stage(libraries=("llama-cpp-python", "torch", "transformers"), reads={"base": COMPUTING}, alone=True)
def check_fidelity(
    gguf: Artifact,
    merged: Artifact,
    model: Artifact,
    dataset: Artifact,
    settings: FidelitySettings,
    gguf_type: GgufType,
    base: ModelSettings,
    *,
    store: Store,
) -> Artifact:
    """Compare a GGUF with the model that it was made from.

    Args:
        gguf: the exported file.
        merged: the merged model.
        model: the base model.
        dataset: held-out rows and tokenizer.
        settings: how much is read, and the limits.
        gguf_type: what type the file was to be.
        base: the type that is computed in, and whether to run code that comes with the model.
        store: where the artifact goes.

    Returns:
        The artifact `fidelity`: `fidelity.json`; its facts hold the checks and whether all were passed. A file that
        fails a check is no error: it is not promoted.

    Raises:
        UserError: llama.cpp cannot load the file.
    """
    file, bounds = gguf.path / "model.gguf", limits(settings, gguf_type)
    rows = read(dataset, settings)
    base_nll = _base_nll(model, dataset, rows, base)
    network, tokenizer = load_model(merged, dataset, base.dtype, base.trust_remote_code)
    llama = open_gguf(file, max(len(row.ids) for row in rows))
    try:
        prompts = [row["messages"][:-1] for row in conversations(dataset, PROMPTS)]
        wrong = [*mismatches(llama, tokenizer, list(torture(tokenizer))), *prompt_mismatches(llama, tokenizer, prompts)]
        vocabulary = llama.n_vocab()
        found = []
        for row, nats in tqdm(list(zip(rows, base_nll, strict=True)), desc="Fidelity of the GGUF", unit="row"):
            logits = _logits(network, row.ids), _llama_logits(llama, row.ids, vocabulary)
            found.append(compare_row(logits[0][row.before], logits[1][row.before], row.targets, nats))
        measured = summary(found, wrong, file_type=str(llama.metadata.get("general.file_type", "none")))
        measured = measured._replace(end_token=end_token_agrees(llama, tokenizer))
    finally:
        llama.close()
    del network
    return _recorded(measured, bounds, gguf_type, store)


def _recorded(measured: Measured, bounds: Limits, gguf_type: GgufType, store: Store) -> Artifact:
    checks = judged(measured, bounds, gguf_type)
    with store.draft("fidelity") as draft:
        passed = all(check.reading != "failed" for check in checks)
        facts = {
            "passed": passed,
            "checks": [check._asdict() for check in checks],
            "rows": measured.rows,
            "tokens": measured.tokens,
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
        (draft.path / "fidelity.json").write_text(text + "\n", encoding="utf-8")
        draft.facts = facts
    return draft.done()


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
        said = str(error) or type(error).__name__
        fix = "Start the run again: a damaged file is made anew. Otherwise look at export.llama_cpp."
        raise UserError(f"llama.cpp cannot load the GGUF: {said}", where=file, fix=fix) from error


def end_token_agrees(llama: Any, tokenizer: Any) -> bool:
    """Whether the GGUF ends a generation at the token that ends a turn.

    Args:
        llama: the GGUF.
        tokenizer: of the merged model.
    """
    return int(llama.token_eos()) == tokenizer.eos_token_id


def compare_row(merged: np.ndarray, gguf: np.ndarray, targets: np.ndarray, nll_base: np.ndarray) -> RowMeasures:
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
    return RowMeasures(
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


def summary(rows: Sequence[RowMeasures], wrong: Sequence[Mismatch], file_type: str) -> Measured:
    """The measures over all rows, with standard errors over the sampling of rows.

    Args:
        rows: one for each row.
        wrong: texts that are read as other tokens.
        file_type: `general.file_type` as the GGUF has it.
    """
    tokens = [row.tokens for row in rows]
    count = sum(tokens)
    rise = [row.nll_gguf - row.nll_merged for row in rows]
    shown, changed = [row.shown for row in rows], [row.changed for row in rows]
    ratio = math.exp(min(math.fsum(rise) / count, 50.0))
    error = ratio_stderr(rise, tokens)
    return Measured(
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
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _logits(network: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Float32 [T, V]."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor([ids], device=network.device)
        logits = network(input_ids=tokens, use_cache=False).logits[0]
    return np.asarray(logits.float().cpu().numpy())


def _llama_logits(llama: Any, ids: list[int], vocabulary: int) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.asarray(llama.scores[: len(ids), :vocabulary])


def _base_nll(model: Artifact, dataset: Artifact, rows: list[ReadRow], base: ModelSettings) -> list[np.ndarray]:
    """Nats of each supervised token, by the base model; it is gone from memory afterwards."""
    from accelerate.utils.memory import clear_device_cache

    network, _ = load_model(model, dataset, base.dtype, base.trust_remote_code)
    found = []
    for row in tqdm(rows, desc="Base model", unit="row"):
        logs = _log_softmax(_logits(network, row.ids)[row.before])
        found.append(-logs[np.arange(len(row.targets)), row.targets])
    del network
    clear_device_cache()
    return found


def read(dataset: Artifact, settings: FidelitySettings) -> list[ReadRow]:
    """The rows that both read: the first held-out ones, or else training rows.

    Args:
        dataset: tokenised rows.
        settings: how many, and how much of each.
    """
    from tasks.validation_loss import UNSUPERVISED, read_rows

    path = next(path for split in SPLITS if (path := dataset.path / f"{split}.parquet").is_file())
    found = []
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
        found.append(ReadRow(ids.tolist(), before, labels[before + 1]))
        if len(found) == settings.rows:
            break
    return found
