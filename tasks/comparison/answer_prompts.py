"""Stage: a model answers held-out prompts, greedily, and each answer is measured."""

from __future__ import annotations

import json
from typing import Any

from tasks.artifacts import Artifact, Store
from tasks.quality import measure
from tasks.scoring import COMPUTING, conversations, load_model
from tasks.settings import ModelSettings, ScoringSettings
from tasks.stage import stage


@stage(
    libraries=("torch", "transformers", "tokenizers", "rouge-score"),
    reads={"settings": ("max_new_tokens", "batch_size"), "base": COMPUTING},
    alone=True,
)
def answer_prompts(
    model: Artifact, dataset: Artifact, settings: ScoringSettings, number: int, base: ModelSettings, *, store: Store
) -> Artifact:
    """Let a model answer the first held-out prompts.

    Args:
        model: weights in 16 bits.
        dataset: test rows, or validation rows if there are none; and the tokenizer.
        settings: longest answer, rows in one forward pass.
        number: of prompts.
        base: the type that is computed in, and whether to run code that comes with the model.
        store: where the artifact goes.

    Returns:
        The artifact `answers`: a line of JSON for each with `prompt`, `expected`, `answer`, `stopped` (it ended its
        turn itself) and `measures`, see `tasks.quality`.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.scoring import generate

    network, tokenizer = load_model(model, dataset, base.dtype, base.trust_remote_code)
    rows = conversations(dataset, number)
    answers = generate(network, tokenizer, dataset, rows, settings)
    del network
    clear_device_cache()
    with store.draft("answers") as draft, (draft.path / "answers.jsonl").open("w", encoding="utf-8") as file:
        for row, (text, stopped) in zip(rows, answers, strict=True):
            line = {"prompt": row["prompt"], "expected": row["completion"], "answer": text, "stopped": stopped}
            line["measures"] = measure(text, row["completion"], stopped)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        draft.facts = {"answers": len(rows)}
    return draft.done()


def read_answers(answers: Artifact) -> list[dict[str, Any]]:
    """The lines of the artifact `answers`.

    Args:
        answers: what `answer_prompts` returned.
    """
    text = (answers.path / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # answers may hold other separators of lines
