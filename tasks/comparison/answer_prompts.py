"""Stage: a model answers held-out prompts, greedily, and each answer is measured."""

from __future__ import annotations

import json

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import conversations
from tasks.evaluation.loading import COMPUTING, load_model
from tasks.evaluation.quality import measure_answer
from tasks.settings.finetune import ModelSettings, ScoringSettings


@stage(
    libraries=("torch", "transformers", "tokenizers", "rouge-score"),
    reads={"settings": ("max_new_tokens", "batch_size"), "base": COMPUTING},
    alone=True,
)
def answer_prompts(
    model: Artifact, dataset: Artifact, *, settings: ScoringSettings, number: int, base: ModelSettings, store: Store
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
        turn itself) and `metrics`, see `tasks.evaluation.quality`.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.evaluation.answering import generate

    network, tokenizer = load_model(model, dataset, base.dtype, base.trust_remote_code)
    rows = conversations(dataset, number)
    answers = generate(network, tokenizer, dataset, rows, settings)
    del network
    clear_device_cache()
    with store.draft("answers") as draft, (draft.path / "answers.jsonl").open("w", encoding="utf-8") as file:
        for row, (text, stopped) in zip(rows, answers, strict=True):
            line = {"prompt": row["prompt"], "expected": row["completion"], "answer": text, "stopped": stopped}
            line["metrics"] = measure_answer(text, row["completion"], stopped)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        draft.facts = {"answers": len(rows)}
    return draft.done()
