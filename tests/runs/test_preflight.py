"""What is checked before a training, of the data set that it would see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prefect import get_run_logger  # noqa: F401 - replaces the root logger's handlers, which no test should see happen

from tasks.engine.artifacts import Artifact, reference
from tasks.engine.errors import UserError
from tasks.engine.planning import planning
from tasks.runs.preflight import check_chat, check_served, check_validations
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import load_settings
from tests.support.made_artifacts import SERVING

STEPS = {
    "training.max_steps": 20, "training.per_device_batch_size": 5, "training.gradient_accumulation_steps": 1,
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    """Of which 20 steps of 5 rows see 1000 supervised tokens."""
    facts = {"rows": {"train": 9}, "tokens": {"train": 900}, "supervised_tokens": {"train": 90}, "max_length": 512}
    return reference("dataset", tmp_path, [], facts)


@pytest.mark.parametrize(("every", "warned"), [(999, False), (1000, True), (None, False)])
def test_a_training_that_ends_before_its_first_validation_is_warned_of(
    dataset: Artifact, caplog: pytest.LogCaptureFixture, every: int | None, warned: bool
) -> None:
    settings = load_settings("demo", STEPS | {"training.eval_tokens": every})
    with planning():
        check_validations(settings, dataset)
    assert not caplog.messages, "a plan is made several times"
    check_validations(settings, dataset)
    assert bool(caplog.messages) == warned
    assert not warned or "1000 supervised tokens, and 1000 pass between two validations. Use 100," in caplog.text


@pytest.mark.parametrize("choice", [{"training.keep_best": True}, {"training.early_stopping_patience": 2}])
def test_and_refused_where_it_would_choose_by_them(dataset: Artifact, choice: dict[str, Any]) -> None:
    check_validations(load_settings("demo", STEPS | choice | {"training.eval_tokens": 999}), dataset)
    with pytest.raises(UserError, match="nothing to choose by"):
        check_validations(load_settings("demo", STEPS | choice | {"training.eval_tokens": 1000}), dataset)


def served(tmp_path: Path, **facts: Any) -> Artifact:
    return reference("dataset", tmp_path, [], SERVING | facts)


def demo(**ollama: Any) -> FinetuneSettings:
    return load_settings("demo", {f"ollama.{name}": value for name, value in ollama.items()})


def test_a_held_out_prompt_that_ollama_would_cut_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    longest = {"split": "test", "row": 17, "tokens": 5000}
    check_served(demo(), served(tmp_path, longest_prompt=longest), None)
    assert not caplog.messages, "Ollama is told to read 8192"
    check_served(demo(), served(tmp_path, longest_prompt=longest, max_length=64), None)
    assert "the prompt of row 17 of the test rows that were kept has 5000 tokens, and Ollama reads 4096" in caplog.text


def test_a_context_below_ollamas_own_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_served(demo(parameters={"num_ctx": 4096}), served(tmp_path), None)
    assert not caplog.messages
    check_served(demo(), served(tmp_path, context_length=1024, max_length=512), None)
    assert not caplog.messages, "a model of a shorter context is nobody's choice"
    check_served(demo(parameters={"num_ctx": 1024}), served(tmp_path), None)
    assert "num_ctx is 1024, below Ollama's own 4096" in caplog.text


def test_a_server_that_does_not_answer_yet_must_be_new_enough_by_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = demo(target="server", host="http://127.0.0.1:9")
    check_served(settings, served(tmp_path), None)
    assert not caplog.messages
    check_served(settings, served(tmp_path, ollama_template=None), None)
    assert "the server must be Ollama 0.30 or newer by then" in caplog.text


@pytest.mark.parametrize("unseen", [True, False])
def test_tools_that_ollama_does_not_see_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unseen: bool
) -> None:
    check_served(demo(), served(tmp_path, unseen_tools=unseen), None)
    assert ("it will refuse chats with tools" in caplog.text) == unseen


DIFFERENCE = {"conversation": "empty turns", "kind": "text", "training": "<|user|>\n", "server": "<|user|>"}
OTHERWISE = {"proven": False, "why": None, "conversations": 12, "differences": [DIFFERENCE]}
UNPARSABLE: dict[str, Any] = {
    "proven": False,
    "why": "llama.cpp cannot use the template: line 3",
    "conversations": 0,
    "differences": [],
}
UNPROVEN: dict[str, Any] = {"proven": None, "why": "xllamacpp is not installed", "conversations": 0, "differences": []}


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        (OTHERWISE, "'empty turns' otherwise than the training: '<|user|>' in place of '<|user|>"),
        (UNPARSABLE, "line 3"),
    ],
)
@pytest.mark.parametrize(
    ("facts", "template", "refused"),
    [
        ({"ollama_template": None}, "auto", True),
        ({"server_capabilities": ["tools"]}, "auto", True),
        ({"server_capabilities": ["tools"]}, "go", True),
        ({}, "jinja", True),
        ({}, "auto", False),
        ({}, "go", False),
        ({"ollama_template": None}, "none", False),
    ],
)
def test_a_template_that_llamacpp_renders_otherwise_is_refused_where_it_would_be_served(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    proof: dict[str, Any],
    message: str,
    facts: dict[str, Any],
    template: str,
    refused: bool,
) -> None:
    vocabulary = reference("vocabulary", tmp_path, [], {"template": proof})
    settings, dataset = demo(template=template), served(tmp_path, **facts)
    if refused:
        with pytest.raises(UserError, match=message):
            check_chat(settings, dataset, vocabulary)
    else:
        check_chat(settings, dataset, vocabulary)
        assert re.search(message, caplog.text)


def test_a_template_that_could_not_be_proven_is_said_where_it_would_be_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = reference("vocabulary", tmp_path, [], {"template": UNPROVEN})
    check_chat(demo(), served(tmp_path), vocabulary)
    assert not caplog.messages
    check_chat(demo(), served(tmp_path, ollama_template=None), vocabulary)
    assert "not proven to be served as it was trained: xllamacpp is not installed" in caplog.text
