"""A model answers held-out conversations, greedily."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tqdm import trange

from tasks.chat.rendering import render
from tasks.chat.thinking import end_of_thinking, without_thinking
from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import ScoringSettings
from tasks.stats.json_files import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        For each conversation the answer without its thinking, and whether the model ended its turn itself.
    """
    import torch

    from tasks.evaluation.validation_loss import evaluating

    ends = torch.tensor(model.generation_config.eos_token_id)
    end_of_turn, thought = dataset.facts["end_of_turn"], end_of_thinking(tokenizer)
    answers: list[tuple[str, bool]] = []
    for start in trange(0, len(rows), settings.batch_size, desc="Answers", unit="batch"):
        prompts = [
            render(tokenizer, row["messages"][:-1], prompt=True) for row in rows[start : start + settings.batch_size]
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
            (without_thinking(text.partition(end_of_turn)[0], thought).strip(), done or end_of_turn in text)
            for text, done in zip(texts, stopped, strict=True)
        ]
    return answers


def conversations(dataset: Artifact, number: int) -> list[dict[str, Any]]:
    """The first held-out conversations: test rows, or validation rows if there are none.

    Args:
        number: of conversations, at most.
    """
    path = next((p for p in (dataset.path / "test.jsonl", dataset.path / "validation.jsonl") if p.is_file()), None)
    if path is None:
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(number), strict=False)]


def read_answers(answers: Artifact) -> list[dict[str, Any]]:
    """The lines of the artifact `answers`.

    Args:
        answers: what `answer_prompts` returned.
    """
    return read_json_lines(answers.path / "answers.jsonl")
