"""Scoring: validation loss, lm-eval tasks and sample answers of one model, base or tuned, on held-out rows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import trange

from tasks.artifacts import Artifact, Store
from tasks.lm_eval_tasks import load_tasks, own_tasks_sha256, run_tasks
from tasks.settings import ModelSettings, ScoringSettings
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = ("datasets", "lm-eval", "tokenizers", "torch", "transformers")
COMPUTING = ("dtype", "trust_remote_code")
"""Of the base model's settings those that matter to what is measured of a model."""


def _watch(settings: ScoringSettings, **_others: object) -> str:
    return own_tasks_sha256(settings.include_path)


@stage(libraries=LIBRARIES, retries=2, watch=_watch, reads={"base": COMPUTING}, alone=True)
def score(
    model: Artifact,
    dataset: Artifact,
    settings: ScoringSettings,
    base: ModelSettings,
    role: Literal["base", "tuned"],
    seed: int,
    *,
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
    from transformers import set_seed

    from tasks.validation_loss import read_rows, validation_loss

    clock = _Clock()
    with clock.measure("lm_eval_loading"):  # before the model, so that a wrong name fails in seconds
        tasks = load_tasks(settings, dataset.path)
    with clock.measure("model_loading"):
        set_seed(seed)
        network, tokenizer = load_model(model, dataset, base.dtype, base.trust_remote_code)
    scores: dict[str, Any] = {"model": role, "validation": None, "lm_eval": {}, "lm_eval_versions": {}}
    rows: dict[str, Any] = {"validation": None, "lm_eval": {}}
    validation = dataset.path / "validation.parquet"
    if validation.is_file():
        with clock.measure("validation_loss"):
            loss = validation_loss(
                network, read_rows(validation), settings.batch_size, tokenizer.pad_token_id, where=model.path
            )
        scores["validation"] = {
            "loss": loss.loss,
            "stderr": loss.stderr,
            "perplexity": loss.perplexity,
            "supervised_tokens": loss.supervised_tokens,
            "rows": len(loss.row_nll),
        }
        rows["validation"] = {"nll": loss.row_nll, "supervised_tokens": loss.row_tokens}
    if tasks:
        with clock.measure("lm_eval"):
            results = run_tasks(tasks, network, tokenizer, settings, dataset.facts["system"], seed)
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


def load_model(model: Artifact, dataset: Artifact, dtype: str, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """Load the model, once, set up to answer greedily, and the data set's tokenizer.

    Args:
        model: its directory.
        dataset: the tokenizer, and how a turn ends.
        dtype: the setting `model.dtype`: what is computed in.
        trust_remote_code: run Python code that comes with the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(
        dataset.path / "tokenizer", local_files_only=True, trust_remote_code=trust_remote_code
    )
    network = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=getattr(torch, dtype),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    network.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=_end_tokens(network, tokenizer, dataset.facts["end_of_turn"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    return network, tokenizer


def sample_answers(
    model: PreTrainedModel, tokenizer: Any, dataset: Artifact, settings: ScoringSettings
) -> list[dict[str, str]]:
    """Let the model answer the first held-out conversations: test rows, or validation rows if there are none.

    Returns:
        For each one the last user turn, the expected answer and the model's.
    """
    rows = conversations(dataset, settings.samples)
    answers = generate(model, tokenizer, dataset, rows, settings)
    return [
        {"prompt": row["prompt"], "expected": row["completion"], "answer": answer}
        for row, (answer, _stopped) in zip(rows, answers, strict=True)
    ]


def generate(
    model: PreTrainedModel, tokenizer: Any, dataset: Artifact, rows: list[dict[str, Any]], settings: ScoringSettings
) -> list[tuple[str, bool]]:
    """Answer conversations greedily.

    Args:
        model: from `load_model`.
        tokenizer: with the chat template.
        dataset: says how a turn ends.
        rows: conversations, whose last message is left out.
        settings: longest answer, rows in one forward pass.

    Returns:
        For each conversation the answer, and whether the model ended its turn itself.
    """
    import torch

    from tasks.validation_loss import evaluating

    ends = torch.tensor(model.generation_config.eos_token_id)
    answers: list[tuple[str, bool]] = []
    for start in trange(0, len(rows), settings.batch_size, desc="Answers", unit="batch"):
        prompts = [
            tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for row in rows[start : start + settings.batch_size]
        ]
        encoded = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        with evaluating(model), torch.no_grad():
            tokens = model.generate(  # type: ignore[operator]
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=settings.max_new_tokens,
            )[:, encoded["input_ids"].shape[1] :].cpu()
        stopped = torch.isin(tokens, ends).any(dim=1).tolist()
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers += [
            (text.partition(dataset.facts["end_of_turn"])[0].strip(), done or dataset.facts["end_of_turn"] in text)
            for text, done in zip(texts, stopped, strict=True)
        ]
    return answers


def _end_tokens(model: PreTrainedModel, tokenizer: Any, end_of_turn: str) -> list[int]:
    """Tokens that end an answer: the chat format's, and those of the model itself."""
    own = model.generation_config.eos_token_id
    turn = tokenizer.encode(end_of_turn, add_special_tokens=False)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(turn if len(turn) == 1 else [])}
    return sorted(found - {None})


def conversations(dataset: Artifact, number: int) -> list[dict[str, Any]]:
    """The first held-out conversations: test rows, or validation rows if there are none.

    Args:
        dataset: the data set.
        number: of conversations, at most.
    """
    path = next((p for p in (dataset.path / "test.jsonl", dataset.path / "validation.jsonl") if p.is_file()), None)
    if path is None:
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(number), strict=False)]


def _headline(scores: dict[str, Any]) -> dict[str, Any]:
    validation = scores["validation"] or {}
    figures = {f"validation_{name}": validation[name] for name in ("loss", "perplexity") if name in validation}
    for task, metrics in scores["lm_eval"].items():
        figures |= {f"{task}/{metric}": found["value"] for metric, found in metrics.items()}
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
