from __future__ import annotations

import copy
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.comparison.answer_prompts import answer_prompts
from tasks.comparison.measure_forgetting import measure_forgetting, paragraphs, read_text
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.evaluation.loading import load_model
from tasks.score import score
from tasks.settings.finetune import ModelSettings, ScoringSettings
from tests.support.own_tasks import CHOICES, GENERATION_TASK

HELD = ModelSettings(dtype="float32")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Accra", "Rome")
LEARNED = 5
SYSTEM = "Answer with JSON."


def conversation(city: str) -> dict[str, Any]:
    prompt, completion = f"I live in {city}. Where?", json.dumps({"city": city})
    roles = zip(("system", "user", "assistant"), (SYSTEM, prompt, completion), strict=True)
    return {
        "messages": [{"role": role, "content": content} for role, content in roles],
        "prompt": prompt,
        "completion": completion,
    }


CONVERSATIONS = [conversation(city) for city in CITIES]


@pytest.fixture(scope="module")
def tokenizer(smollm2_tokenizer: Any) -> Any:
    """SmolLM2's, whose template spoils a prompt that it is not told to think about, as servers tell it."""
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template += "{% if enable_thinking is not true %}{{ 'No, ' }}{% endif %}"
    return tokenizer


def prompt_of(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    )


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    tokenized = []
    for row in CONVERSATIONS:
        prompt = prompt_of(tokenizer, row["messages"][:-1])
        start = tokenizer.encode(prompt, add_special_tokens=False)
        answer = tokenizer.encode(row["completion"] + tokenizer.eos_token, add_special_tokens=False)
        tokenized.append({"input_ids": start + answer, "labels": [-100] * len(start) + answer})
    return tokenized


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, rows: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("dataset")
    tokenizer.save_pretrained(path / "tokenizer")
    pq.write_table(pa.Table.from_pylist(rows), path / "validation.parquet")
    (path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8")
    names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    return reference("dataset", path, names, {"end_of_turn": tokenizer.eos_token, "system": SYSTEM})


@pytest.fixture(scope="module")
def learned(
    tiny_model: Artifact, rows: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """A small model that has learned some of the answers by heart, and not the others."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows[:LEARNED]], batch_first=True, padding_value=padding
        )
        for name, padding in (("input_ids", 0), ("labels", -100))
    )
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model")
    model.to(torch.bfloat16).save_pretrained(path)
    return reference("model", path, [p.name for p in path.iterdir()], {})


@pytest.fixture(scope="module")
def network(learned: Artifact) -> Any:
    return AutoModelForCausalLM.from_pretrained(learned.path, dtype=torch.float32)


def test_a_model_is_measured_in_the_type_of_the_settings(learned: Artifact, dataset: Artifact) -> None:
    narrow, wide = (load_model(learned, dataset, dtype, False)[0] for dtype in ("bfloat16", "float32"))
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in narrow.state_dict().items():
        assert torch.equal(weight.float(), wide.state_dict()[name])


def answer_alone(network: Any, tokenizer: Any, messages: list[dict[str, str]], length: int) -> str:
    """Greedy answer without batching, padding, cache or any generation helper."""
    prompt = prompt_of(tokenizer, messages)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < length:
            answer.append(int(network(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def log_likelihood(network: Any, tokenizer: Any, messages: list[dict[str, str]], text: str) -> float:
    prompt = prompt_of(tokenizer, messages)
    start, ids = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, prompt + text))
    with torch.no_grad():
        log_p = network(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(len(start), len(ids)))


def read(artifact: Artifact, name: str = "scores.json") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((artifact.path / name).read_text(encoding="utf-8"))
    return value


def scored(
    model: Artifact, dataset: Artifact, settings: ScoringSettings, directory: Path, role: Any = "base", seed: int = 0
) -> Artifact:
    store = Store(directory)
    return score.function(model, dataset, settings=settings, base=HELD, role=role, seed=seed, store=store)


def test_all_scores_equal_those_computed_by_hand(
    learned: Artifact,
    dataset: Artifact,
    network: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    tasks: Path,
    tmp_path: Path,
    no_network: list[object],
) -> None:
    settings = ScoringSettings(
        tasks=("city", "city_choice"), include_path=tasks, batch_size=3, samples=8, max_new_tokens=12
    )
    artifact = scored(learned, dataset, settings, tmp_path / "store", "tuned", 7)
    scores, details = read(artifact), read(artifact, "rows.json")

    answers = [answer_alone(network, tokenizer, row["messages"][:-1], 12) for row in CONVERSATIONS]
    right = [answer == row["completion"] for answer, row in zip(answers, CONVERSATIONS, strict=True)]
    assert LEARNED - 1 <= sum(right) < len(CITIES)
    mean = sum(right) / len(right)
    assert scores["lm_eval"]["city"]["exact_match"] == {
        "value": pytest.approx(mean),
        "stderr": pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1))),
        "higher_is_better": True,
        "n": len(right),
    }
    assert details["lm_eval"]["city"]["exact_match"] == right
    assert scores["samples"] == [
        {"prompt": row["prompt"], "expected": row["completion"], "answer": answer}
        for row, answer in zip(CONVERSATIONS, answers, strict=True)
    ]

    likelier = [
        log_likelihood(network, tokenizer, row["messages"][:-1], "Oslo")
        > log_likelihood(network, tokenizer, row["messages"][:-1], "Paris")
        for row in CONVERSATIONS
    ]
    correct = [oslo == ("Oslo" in row["completion"]) for oslo, row in zip(likelier, CONVERSATIONS, strict=True)]
    assert details["lm_eval"]["city_choice"]["acc"] == correct
    assert scores["lm_eval"]["city_choice"]["acc"]["value"] == pytest.approx(sum(correct) / len(correct))

    nll = []
    for row in rows:
        with torch.no_grad():
            log_p = network(input_ids=torch.tensor([row["input_ids"]])).logits[0].float().log_softmax(dim=-1)
        nll.append(-sum(float(log_p[t - 1, y]) for t, y in enumerate(row["labels"]) if y != -100))
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    assert scores["validation"]["supervised_tokens"] == supervised
    assert scores["validation"]["rows"] == len(rows)
    assert scores["validation"]["loss"] == pytest.approx(sum(nll) / supervised, rel=1e-4)
    assert scores["validation"]["perplexity"] == pytest.approx(math.exp(scores["validation"]["loss"]))
    assert details["validation"]["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-4)

    assert scores["model"] == "tuned"
    assert scores["lm_eval_versions"] == {"city": 1.5, "city_choice": 2}
    assert scores["num_fewshot"] == {"city": 0, "city_choice": 0}
    assert artifact.facts["city/exact_match"] == mean
    assert artifact.facts["validation_loss"] == scores["validation"]["loss"]
    assert no_network == []


def test_equal_inputs_give_equal_files(learned: Artifact, dataset: Artifact, tasks: Path, tmp_path: Path) -> None:
    settings = ScoringSettings(tasks=("city",), include_path=tasks, num_fewshot=1, limit=3, samples=2)
    artifacts: list[Artifact] = []
    for seed, store in ((7, "one"), (7, "two")):
        random.seed(store)
        torch.manual_seed(len(artifacts))
        artifacts.append(scored(learned, dataset, settings, tmp_path / store, seed=seed))
    assert artifacts[0].digest == artifacts[1].digest
    scores = read(artifacts[0])
    assert scores["lm_eval"]["city"]["exact_match"]["n"] == 3
    assert scores["num_fewshot"] == {"city": 1}
    assert len(scores["samples"]) == 2


def test_without_tasks_and_without_held_out_rows(learned: Artifact, dataset: Artifact, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(dataset.path / "tokenizer", bare / "tokenizer")
    empty = dataset.model_copy(update={"path": bare})
    settings = ScoringSettings(tasks=())
    artifact = scored(learned, empty, settings, tmp_path / "store")
    scores = read(artifact)
    assert (scores["validation"], scores["lm_eval"], scores["samples"]) == (None, {}, [])
    assert set(artifact.facts) == {"seconds"}


def test_samples_come_from_validation_rows_where_there_are_no_test_rows(
    learned: Artifact, dataset: Artifact, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset.path, other)
    (other / "test.jsonl").rename(other / "validation.jsonl")
    settings = ScoringSettings(tasks=(), samples=1, max_new_tokens=12)
    artifact = scored(learned, dataset.model_copy(update={"path": other}), settings, tmp_path / "store")
    assert [sample["prompt"] for sample in read(artifact)["samples"]] == [CONVERSATIONS[0]["prompt"]]


def test_the_cache_key_follows_the_users_task_files(learned: Artifact, dataset: Artifact, tasks: Path) -> None:
    settings = ScoringSettings(tasks=("city",), include_path=tasks)

    def key() -> str:
        return score.key(
            learned, dataset, settings=settings, base=HELD, role="base", seed=0, store=Store(Path("store"))
        )

    before = key()
    assert key() == before
    (tasks / "city.yaml").write_text(GENERATION_TASK.replace("12", "13"), encoding="utf-8")
    changed = key()
    assert changed != before
    (tasks / "choices.py").write_text(CHOICES + "# changed\n", encoding="utf-8")
    assert key() != changed


def test_answers_are_measured_and_those_that_run_on_are_told_apart(
    learned: Artifact, dataset: Artifact, store: Store
) -> None:
    settings = ScoringSettings(tasks=(), max_new_tokens=24)
    answers = answer_prompts.function(learned, dataset, settings=settings, number=6, base=HELD, store=store)
    lines = [json.loads(line) for line in (answers.path / "answers.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == [row["completion"] for row in CONVERSATIONS[:6]]
    for line in lines[:LEARNED]:
        assert line["answer"] == line["expected"] and line["stopped"]
        assert line["metrics"] == {
            "rouge_l": 1.0, "exact_match": 1.0, "stopped": 1.0, "repetition": 0.0, "json_valid": 1.0,
        }  # fmt: skip
    short = settings.model_copy(update={"max_new_tokens": 2})
    cut = answer_prompts.function(learned, dataset, settings=short, number=2, base=HELD, store=store)
    for line in (json.loads(line) for line in (cut.path / "answers.jsonl").read_text().splitlines()):
        assert not line["stopped"] and line["metrics"]["stopped"] == line["metrics"]["exact_match"] == 0


def test_forgetting_is_the_loss_of_every_token_of_each_paragraph(
    tiny_model: Artifact, dataset: Artifact, store: Store, tokenizer: Any, tmp_path: Path
) -> None:
    long = dataset.model_copy(update={"facts": dataset.facts | {"max_length": 12}})
    text = "One two three four.\n\nFive\nsix seven.\n\n\nWord\n\n" + "eight " * 50
    (tmp_path / "text.txt").write_text(text)
    asked: Any = {"settings": ScoringSettings(), "text": str(tmp_path / "text.txt"), "base": HELD, "store": store}
    losses = measure_forgetting.function(tiny_model, long, **asked)
    rows = json.loads((losses.path / "rows.json").read_text())
    network = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    ids = [
        tokenizer.encode(paragraph, add_special_tokens=False)
        for paragraph in ("One two three four.", "Five six seven.")
    ]
    long_one = tokenizer.encode("eight " * 49 + "eight", add_special_tokens=False)
    pieces = [*ids, *(long_one[start : start + 12] for start in range(0, len(long_one), 12))]
    assert rows["supervised_tokens"] == [len(piece) - 1 for piece in pieces]
    assert (losses.facts["rows"], losses.facts["cut_paragraphs"]) == (2 + 5, 1)
    for piece, tokens, nll in zip(pieces, rows["supervised_tokens"], rows["nll"], strict=True):
        with torch.no_grad():
            loss = network(input_ids=torch.tensor([piece]), labels=torch.tensor([piece])).loss
        assert nll / tokens == pytest.approx(float(loss), rel=1e-5)
    key = measure_forgetting.key(tiny_model, long, **asked)
    (tmp_path / "text.txt").write_text(text + " nine")
    assert measure_forgetting.key(tiny_model, long, **asked) != key
    assert len(paragraphs(read_text(None))) >= 15
    (tmp_path / "text.txt").write_text("Word\n\n")
    with pytest.raises(UserError, match=r"text\.txt: the text is empty"):
        measure_forgetting.function(tiny_model, long, **asked)
