"""llama.cpp's own server, by xllamacpp, against the rendering of training."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.capabilities import WEATHER
from tasks.chat.probes import PLAIN
from tasks.chat.rendering import render
from tasks.chat.templates import prepare_templates
from tasks.engine.artifacts import Artifact
from tasks.llamacpp.carrier import has_tensors
from tasks.llamacpp.template_proof import TemplateProof, prove
from tests.support.jinja_templates import CHATML, COMPUTED_DATE, EVERYTHING, UNREADABLE, UNSEEN_THINKING
from tests.support.vocabularies import BOS, with_bos, write_vocabulary

SERVED = "{% if messages[1] and messages[1]['content'] == 'Are you there?' %}{{ raise_exception('no') }}{% endif %}" + (
    CHATML.replace("m['content']", "m['content'] | trim")
)
TRAINED = "{% if not messages[0]['content'] %}{{ raise_exception('say something') }}{% endif %}" + CHATML


def speaking(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_tools_thinking_and_a_date_are_proven(smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path) -> None:
    tokenizer = speaking(smollm2_tokenizer, EVERYTHING)
    prepare_templates(tokenizer)
    proof = prove(tokenizer, tiny_gguf, template=str(tokenizer.chat_template))
    assert proof == TemplateProof(True, conversations=len(PLAIN) + 9)


def test_a_computed_date_is_the_same_in_both_engines(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path
) -> None:
    tokenizer = speaking(smollm2_tokenizer, COMPUTED_DATE)
    prepare_templates(tokenizer)
    assert render(tokenizer, PLAIN[0].messages).startswith(
        "<|im_start|>system\n26 Jul 2024 26 Jul 2024 2024-07-26 Friday 208<|im_end|>\n<|im_start|>"
    )
    assert prove(tokenizer, tiny_gguf, template=str(tokenizer.chat_template)).proven


def test_a_vocabulary_is_proven_with_the_template_that_it_holds(
    llama3_tokenizer: PreTrainedTokenizerFast, tiny_model: Artifact, tmp_path: Path
) -> None:
    tokenizer = apply_chat_format(with_bos(llama3_tokenizer), "llama3")
    vocabulary = write_vocabulary(tokenizer, llama3_tokenizer, tiny_model.path, tmp_path)
    assert not has_tensors(vocabulary)
    assert tokenizer.bos_token == BOS
    assert prove(tokenizer, vocabulary) == TemplateProof(True, conversations=len(PLAIN))


def test_each_difference_is_named(smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path) -> None:
    tokenizer = speaking(smollm2_tokenizer, TRAINED)
    tokenizer.add_tokens(["How are"])
    proof = prove(tokenizer, tiny_gguf, template=SERVED)
    assert proof.proven is False and proof.why is None
    by_name = {difference.conversation: difference for difference in proof.differences}
    assert proof.refused == ["empty turns", "empty turns, with a system prompt"], "by training itself: no differences"
    white = by_name["white space at both ends, with a system prompt"]
    assert white.kind == "text"
    assert white.training.startswith("<|im_start|>system\n \n Be brief.")
    assert white.server.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    refused = by_name["two questions in a row"]
    assert refused.kind == "refused" and "Jinja Exception: no" in refused.server
    tokens = by_name["several exchanges"]
    assert tokens.kind == "tokens"
    assert json.loads(tokens.training)[:2] == json.loads(tokens.server)[:2], "from a little before the difference"
    assert len(smollm2_tokenizer) in json.loads(tokens.training)
    assert json.loads(json.dumps(proof.facts()))["differences"][0]["conversation"]


def test_thinking_that_the_server_does_not_recognise_differs_where_nothing_is_said(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path
) -> None:
    proof = prove(speaking(smollm2_tokenizer, UNSEEN_THINKING), tiny_gguf, template=UNSEEN_THINKING)
    assert [difference.conversation for difference in proof.differences] == [probe.name for probe in PLAIN]
    assert all(difference.server.endswith("<think>\n\n</think>\n\n") for difference in proof.differences)


def test_a_template_that_llama_cpp_cannot_parse_is_at_fault(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path
) -> None:
    proof = prove(speaking(smollm2_tokenizer, CHATML), tiny_gguf, template=UNREADABLE)
    assert (proof.proven, proof.conversations) == (False, 0)
    assert proof.why == "llama.cpp cannot use the template: Unexpected token: }} of type 11"


def test_a_template_that_fails_in_llama_cpp_is_at_fault_with_its_line(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path
) -> None:
    proof = prove(speaking(smollm2_tokenizer, CHATML), tiny_gguf, template="\n\n{{ messages[0].content.title_case() }}")
    assert proof.proven is False
    assert "at line 3, column" in proof.why and proof.why.endswith("got Undefined (hint: 'title_case')")


def test_without_the_package_nothing_is_proven(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.llamacpp.rendering.find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))
    proof = prove(smollm2_tokenizer, tmp_path / "model.gguf")
    assert proof.proven is None and "xllamacpp is not installed" in proof.why


def test_a_server_that_never_answers_proves_nothing(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.llamacpp.rendering.SECONDS", 0.01)
    proof = prove(smollm2_tokenizer, tiny_gguf)
    assert proof.proven is None and proof.why == "llama.cpp's server gave no answer in 0.01 seconds"


def test_a_file_that_does_not_load_proves_nothing(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))
    proof = prove(smollm2_tokenizer, tmp_path / "model.gguf")
    assert proof.proven is None and proof.why.startswith("llama.cpp's server did not start: ")


def test_a_template_that_refuses_everything_is_not_proven(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    proof = prove(speaking(smollm2_tokenizer, "{{ raise_exception('no') }}"), Path("none.gguf"))
    assert proof.proven is None and proof.why == "the template refuses every conversation"
    assert WEATHER not in str(proof)
