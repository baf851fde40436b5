"""Artifacts that no stage has made: data sets, scores, and any other by its facts and files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from tasks.engine.artifacts import Artifact, Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOSTILE = '<script>alert("x")</script></pre> & {{ 7 * 7 }} | `$(id)`'
"""What no page may take for its own markup."""


def make(store: Store, kind: str, facts: dict[str, Any], **files: Any) -> Artifact:
    with store.draft(kind) as draft:
        for name, value in files.items():
            suffix = "jsonl" if name == "history" else "json"
            (draft.path / f"{name}.{suffix}").write_text(json.dumps(value) + "\n")
        draft.facts = facts
    return draft.done()


def scores(store: Store, nll: list[float] | None, exact: float | None = None, answer: str = "no") -> Artifact:
    """Scores of one model: rows of ten supervised tokens each, exact match of a hundred documents."""
    validation = rows = None
    if nll:
        loss = sum(nll) / (10 * len(nll))
        validation = {"loss": loss, "stderr": 0.01, "perplexity": math.exp(loss), "rows": len(nll)}
        rows = {"nll": nll, "supervised_tokens": [10] * len(nll)}
    metrics = {}
    if exact is not None:
        error = math.sqrt(exact * (1 - exact) / 100)
        metrics = {"extraction": {"exact_match": {"value": exact, "stderr": error, "n": 100, "higher_is_better": True}}}
    samples = [{"prompt": HOSTILE, "expected": "yes", "answer": answer}]
    written = {"validation": validation, "lm_eval": metrics, "samples": samples}
    return make(store, "scores", {}, scores=written, rows={"validation": rows})


SERVING = {
    "ollama_template": "chatml", "server_capabilities": [], "unseen_tools": False, "end_of_turn": "<|im_end|>",
    "stops": ["<|im_end|>"],
    "system": None, "default_system": None, "template_text": "\0user\n\0\n", "max_length": 4096, "context_length": 8192,
    "longest_prompt": None,
}  # fmt: skip
"""Facts of a data set in ChatML: what decides how its chat is served."""


def make_dataset(store: Store, tokenizer: PreTrainedTokenizerBase | None = None, **facts: Any) -> Artifact:
    with store.draft("dataset") as draft:
        if tokenizer is not None:
            tokenizer.save_pretrained(draft.path / "tokenizer")
        draft.facts = SERVING | {"system": 'Say "yes".'} | facts
        (draft.path / "card.json").write_text(json.dumps(draft.facts))
    return draft.done()
