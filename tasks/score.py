"""Stage: validation loss, lm-eval tasks and sample answers of one model, base or tuned, on held-out rows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import sample_answers
from tasks.evaluation.lm_eval_tasks import load_tasks, own_tasks_sha256, run_tasks
from tasks.evaluation.loading import COMPUTING, load_model
from tasks.settings.finetune import ModelSettings, ScoringSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.evaluation.validation_loss import ValidationLoss

LIBRARIES = ("datasets", "lm-eval", "tokenizers", "torch", "transformers")
VALIDATION = "validation.parquet"


def _watch(settings: ScoringSettings, **_others: object) -> str:
    return own_tasks_sha256(settings.include_path)


@stage(libraries=LIBRARIES, retries=2, watch=_watch, reads={"base": COMPUTING}, alone=True)
def score(
    model: Artifact,
    dataset: Artifact,
    *,
    settings: ScoringSettings,
    base: ModelSettings,
    role: Literal["base", "tuned"],
    seed: int,
    store: Store,
) -> Artifact:
    """Score a model. Equal inputs give equal files; how long it took is in the facts.

    `scores.json` holds the figures; `rows.json` holds each row's share in them, for paired comparisons.

    Args:
        model: weights in 16 bits: the base model, or the base with the adapter merged in.
        dataset: held-out rows, and the tokenizer whose chat template both models are asked with.
        settings: what is measured.
        base: the type that is computed in, and whether to run code that comes with the model.
        role: which of the two models this is.
        seed: rules lm-eval's choice of few-shot examples.
        store: where the artifact goes.

    Raises:
        UserError: an lm-eval task that does not exist or lacks its data, or the loss is not a number.
        TemporaryError: the Hub cannot be reached for an lm-eval task's data.
    """
    from accelerate.utils.memory import clear_device_cache

    clock = _Clock()
    with clock.measure("lm_eval_loading"):  # before the model, so that a wrong name fails in seconds
        tasks = load_tasks(settings, dataset.path)
    with clock.measure("model_loading"):
        network, tokenizer = _seeded_model(model, dataset, base, seed)
    scores: dict[str, Any] = {"model": role, "validation": None, "lm_eval": {}, "lm_eval_versions": {}}
    rows: dict[str, Any] = {"validation": None, "lm_eval": {}}
    if (dataset.path / VALIDATION).is_file():
        with clock.measure("validation_loss"):
            loss = _loss(network, dataset, settings.batch_size, tokenizer.pad_token_id, where=model.path)
        scores["validation"] = _loss_scores(loss)
        rows["validation"] = {"nll": loss.row_nll, "supervised_tokens": loss.row_tokens}
    if tasks:
        with clock.measure("lm_eval"):
            results = run_tasks(
                tasks, model=network, tokenizer=tokenizer, settings=settings, system=dataset.facts["system"], seed=seed
            )
        scores |= {"lm_eval": results.metrics, "lm_eval_versions": results.versions, "num_fewshot": results.num_fewshot}
        rows["lm_eval"] = results.documents
    with clock.measure("samples"):
        scores["samples"] = sample_answers(network, tokenizer, dataset, settings)
    del network
    clear_device_cache()  # the training's process needs the GPU's memory
    scores["libraries"] = {name: version(name) for name in LIBRARIES}
    with store.draft("scores") as draft:
        _write_json(draft.path / "scores.json", scores)
        _write_json(draft.path / "rows.json", rows)
        draft.facts = _headline(scores) | {"seconds": clock.seconds}
    return draft.done()


def _seeded_model(
    model: Artifact, dataset: Artifact, base: ModelSettings, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, and random numbers that begin with the seed."""
    from transformers import set_seed

    set_seed(seed)
    return load_model(model, dataset, base.dtype, base.trust_remote_code)


def _loss(
    network: PreTrainedModel, dataset: Artifact, batch_size: int, pad_token_id: int, *, where: object
) -> ValidationLoss:
    """The loss on the validation rows."""
    from tasks.evaluation.validation_loss import read_rows, validation_loss

    return validation_loss(network, read_rows(dataset.path / VALIDATION), batch_size, pad_token_id, where=where)


def _loss_scores(loss: ValidationLoss) -> dict[str, Any]:
    return {
        "loss": loss.loss,
        "stderr": loss.stderr,
        "perplexity": loss.perplexity,
        "supervised_tokens": loss.supervised_tokens,
        "rows": len(loss.row_nll),
    }


def _headline(scores: dict[str, Any]) -> dict[str, Any]:
    """The figures of the artifact's facts."""
    validation = scores["validation"] or {}
    figures = {f"validation_{name}": validation[name] for name in ("loss", "perplexity") if name in validation}
    for task, metrics in scores["lm_eval"].items():
        figures |= {f"{task}/{name}": metric["value"] for name, metric in metrics.items()}
    return figures


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
