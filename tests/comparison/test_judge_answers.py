"""The judge: both orders, what counts as a reply, and what becomes of a server's refusals."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError

from tasks.comparison.judge_answers import judge_answers
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.evaluation.answering import read_answers
from tasks.evaluation.judge import check_judge, outcomes
from tasks.settings.comparison import CompareSettings
from tests.standins.openai_server import KEY, MODEL, Reply, openai_stand_in

pytestmark = pytest.mark.slow  # a client and a server of HTTP for each

REFERENCE = ["good", "bad", "same", "bad"]
OTHER = ["bad", "good", "same", "worse"]


def answers(store: Store, texts: list[str]) -> Artifact:
    with store.draft("answers") as draft:
        lines = [{"prompt": f"P{n} [Answer A]", "expected": f"E{n}", "answer": text} for n, text in enumerate(texts)]
        (draft.path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return draft.done()


def fair(prompt: str) -> str:
    """The letter of the answer that says good, else C."""
    pair = re.search(r"\n\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\n\[Your letter\]$", prompt)
    assert pair
    return "A" if pair[1] == "good" else "B" if pair[2] == "good" else "C"


def judged(store: Store, reply: Reply, **changes: str) -> tuple[Artifact, int]:
    with openai_stand_in(reply) as server:
        asked = {"url": server.url, "model": MODEL} | changes
        judgement = judge_answers.function(
            answers(store, REFERENCE), answers=answers(store, OTHER), **asked, store=store
        )
        return judgement, len(server.asked)


@pytest.mark.parametrize(
    ("reply", "expected", "swayed"),
    [
        (fair, [-1, 1, 0, 0], 0),
        (lambda prompt: f"**{fair(prompt)}**, since it is", [-1, 1, 0, 0], 0),
        (lambda prompt: f"{fair(prompt)} is better.", [-1, 1, 0, 0], 0),
        (lambda prompt: f"Answer: {fair(prompt)}", [-1, 1, 0, 0], 0),
        (lambda prompt: f"**My final answer is:** {fair(prompt)}.", [-1, 1, 0, 0], 0),
        (lambda prompt: fair(prompt) if "P0" in prompt else "Answer: A clear case of B", [-1, 0, 0, 0], 0),
        (lambda prompt: fair(prompt) if "P0" in prompt else "A clear case of B", [-1, 0, 0, 0], 0),
        (lambda _: "A", [0, 0, 0, 0], 3),
        (lambda _: "B.", [0, 0, 0, 0], 3),
        (lambda prompt: fair(prompt) if "P0" in prompt else "Both are fine", [-1, 0, 0, 0], 0),
    ],
    ids=[
        *("fair", "wordy", "a sentence", "announced", "announced at length", "an announced article", "an article"),
        *("likes the first", "likes the second", "unclear"),
    ],
)
def test_only_a_preference_that_survives_the_swap_counts(
    store: Store, reply: Reply, expected: list[int], swayed: int
) -> None:
    judgement, asked = judged(store, reply)
    assert outcomes(judgement) == expected
    assert judgement.facts["swayed_by_order"] == swayed
    assert asked == 6, "equal answers need no judge"


def test_a_judge_that_never_says_a_letter_is_an_error(store: Store) -> None:
    with pytest.raises(UserError, match=f"none of 6 replies of {MODEL} was A, B or C"):
        judged(store, lambda _: "I cannot say.")
    with (
        openai_stand_in(lambda _: "<think>") as server,
        pytest.raises(UserError, match="none of 1 replies.*without reasoning"),
    ):
        check_judge(server.url, MODEL)


def test_replies_of_c_are_letters(store: Store) -> None:
    judgement, _ = judged(store, lambda prompt: "C" if "P0" in prompt else "Hm.")
    assert outcomes(judgement) == [0, 0, 0, 0] and judgement.facts["unclear"] == 4


def test_texts_may_hold_any_separator_of_lines(store: Store) -> None:
    with store.draft("answers") as draft:
        line = {"prompt": "a\u2028b", "expected": "\u0085", "answer": "c\u2029d"}
        (draft.path / "answers.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(draft.done()) == [line]
    with openai_stand_in(fair) as server:
        judgement = judge_answers.function(draft.done(), answers=draft.done(), url=server.url, model=MODEL, store=store)
    assert outcomes(judgement) == [0]


REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported.",
}


def test_options_that_a_model_refuses_are_left_out_from_then_on(store: Store) -> None:
    with openai_stand_in(fair) as server:
        server.refuses = REFUSALS
        judgement = judge_answers.function(
            answers(store, REFERENCE), answers=answers(store, OTHER), url=server.url, model=MODEL, store=store
        )
        assert server.refused == ["max_tokens", "temperature"] and len(server.asked) == 6
        assert outcomes(judgement) == [-1, 1, 0, 0]
        assert judgement.facts["options"] == {"seed": 0}
        server.refuses = {"messages": "too long"}
        with pytest.raises(UserError, match="the judge's server refuses: .*too long"):
            check_judge(server.url, MODEL)


def test_a_server_that_refuses_or_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with openai_stand_in(fair) as server:
        check_judge(server.url, MODEL)
        with pytest.raises(UserError, match="The model `other` does not exist.*Correct judge_url and judge_model"):
            check_judge(server.url, "other")
        server.key = KEY
        with pytest.raises(UserError, match="Incorrect API key"):
            check_judge(server.url, MODEL)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        check_judge(server.url, MODEL)
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
        for status in (429, 503):
            server.status = status
            with pytest.raises(TemporaryError, match="the judge does not answer"):
                check_judge(server.url, MODEL)
        gone = server.url
    with pytest.raises(TemporaryError, match="the judge does not answer: Connection error"):
        check_judge(gone, MODEL)


def test_no_key_in_the_address() -> None:
    with pytest.raises(ValidationError, match="no user name or password here"):
        CompareSettings(judge_url="https://me:secret@judge.example/v1")
