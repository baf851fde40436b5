"""Ollama's templates, rendered by Go's own text/template, give what the tokenizer's chat template gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.formats import FORMATS
from tasks.chat.recognition import known_format
from tasks.chat.rendering import adds_bos, render
from tasks.engine.artifacts import Artifact, reference
from tasks.llamacpp.load import load_gguf
from tasks.llamacpp.token_ids import TORTURE
from tasks.ollama.modelfile import ollama_model, render_modelfile
from tasks.settings.export import OllamaSettings
from tasks.settings.finetune import ChatFormat
from tests.support.go_template import rendered
from tests.support.made_artifacts import SERVING
from tests.support.vocabularies import BOS, with_bos, write_vocabulary

CONVERSATIONS = 200
"""Of each format, in each of the two tests."""
HARD = (
    *TORTURE,
    *("", " ", "\n", '"', '"""', "'", "`", "\\", "\\n", "{", "}", "{{", "}}", "{{ .System }}", "{{ range .Messages }}"),
    *(
        "{% if x %}",
        "{{ bos_token }}",
        "[[ end_of_turn ]]",
        "### Instruction:\n",
        "### Response:",
        "<|im_start|>user\n",
    ),
)
"""Contents of messages that a template could trip over."""


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    """System prompt or none, any number of exchanges, and the question that is to be answered."""

    def joined(system: str | None, exchanges: list[tuple[str, str]], question: str) -> list[dict[str, str]]:
        turns = [] if system is None else [("system", system)]
        for asked, answered in exchanges:
            turns += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]

    exchanges = st.lists(st.tuples(content, content), max_size=3)
    return st.builds(joined, st.none() | content, exchanges, content)


READABLE = st.lists(st.sampled_from(HARD), max_size=3).map("".join)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
GENERATED = settings(max_examples=CONVERSATIONS, deadline=None, suppress_health_check=list(HealthCheck))


def described(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Any:
    facts = {"ollama_template": known_format(tokenizer), "end_of_turn": tokenizer.eos_token, "stops": []}
    return ollama_model(reference("dataset", directory, [], SERVING | facts), OllamaSettings(), None)


@pytest.fixture(scope="module", params=[False, True], ids=["no beginning of text", "beginning of text"])
def tokenizer(request: pytest.FixtureRequest, llama3_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Without a token at the beginning of each text, as SmolLM2's, and with one, as Llama 3's."""
    return with_bos(llama3_tokenizer) if request.param else copy.deepcopy(llama3_tokenizer)


@pytest.fixture(scope="module")
def vocabulary(
    tokenizer: PreTrainedTokenizerFast,
    llama3_tokenizer: PreTrainedTokenizerFast,
    tiny_model: Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """The vocabulary in llama.cpp."""
    directory = tmp_path_factory.mktemp("vocabulary")
    file = write_vocabulary(tokenizer, llama3_tokenizer, tiny_model.path, directory)
    llama = load_gguf(file, vocab_only=True)
    yield llama
    llama.close()


@pytest.mark.parametrize("chat_format", FORMATS)
def test_it_renders_like_the_tokenizers_template(
    go_render: Path, tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat, tmp_path: Path
) -> None:
    speaking = apply_chat_format(tokenizer, chat_format)
    template = described(speaking, tmp_path).template

    @GENERATED
    @given(conversations(READABLE | ANY_TEXT))
    def equal(messages: list[dict[str, str]]) -> None:
        expected = render(speaking, messages, prompt=True)
        if adds_bos(speaking):
            assert expected.startswith(BOS)
            expected = expected.removeprefix(BOS)
        assert rendered(go_render, template, messages) == expected

    equal()


@pytest.mark.parametrize("chat_format", FORMATS)
def test_the_server_reads_the_tokens_of_training(
    go_render: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: Any, chat_format: ChatFormat, tmp_path: Path
) -> None:
    speaking = apply_chat_format(tokenizer, chat_format)
    template = described(speaking, tmp_path).template

    @GENERATED
    @given(conversations(READABLE))
    def equal(messages: list[dict[str, str]]) -> None:
        text = rendered(go_render, template, messages)
        served = vocabulary.tokenize(text.encode(), add_bos=True, special=True)
        asked: Any = speaking.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert served == asked["input_ids"]
        assert served.count(speaking.convert_tokens_to_ids(BOS)) == (1 if adds_bos(speaking) else 0)

    equal()


@pytest.mark.parametrize("chat_format", FORMATS)
def test_the_modelfile_quotes_the_template_whole(
    llama3_tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat, tmp_path: Path
) -> None:
    model = described(apply_chat_format(llama3_tokenizer, chat_format), tmp_path)
    text = render_modelfile(model, "model.gguf")
    start = text.index('TEMPLATE """') + len('TEMPLATE """')
    assert text[start : text.index('"""\n', start)] == model.template
