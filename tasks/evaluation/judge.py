"""A judge model, behind any server that speaks OpenAI's protocol."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal

from tasks.engine.artifacts import Artifact
from tasks.engine.errors import TemporaryError, UserError
from tasks.stats.json_files import read_json_lines

if TYPE_CHECKING:
    from openai import OpenAI


PROMPT = """Two assistants have answered the same request. Which answer is better: more correct, more helpful, and as \
short as the request wants it? The reference answer shows what was expected; another wording is no fault.
Reply with one letter: A if answer A is better, B if answer B is better, C if both are equally good or equally bad.

[Request]
{prompt}

[Reference answer]
{expected}

[Answer A]
{a}

[Answer B]
{b}

[Your letter]"""
TOKENS = 8
"""Of the judge's reply, at most."""
SECONDS = 120
"""For one reply."""
LETTER = re.compile(
    r"\W*(?:(?i:(?:(?:my|your|the|final|better)\s+)*(?:answer|letter|choice)(?:\s+is)?)\W+)?"
    r"([ABC])(?:\W*$|[^\w\s]|\n| is\b)"
)
"""How a reply begins that names one: with "B", "Answer: B" or "B is better", not with the article of "A clear case"."""


def check_judge(url: str, model: str) -> None:
    """Ask the judge once, before anything is trained.

    Args:
        url: base address of a server that speaks OpenAI's protocol.
        model: the judge's name there.

    Raises:
        UserError: the server refuses, or the reply is no letter.
        TemporaryError: the server does not answer.
    """
    line = {"prompt": "What is 1 + 1?", "expected": "2"}
    if Judge(url, model).ask(line, a="2", b="3") == "?":
        raise no_letter(model, 1)


def outcomes(judgement: Artifact) -> list[int]:
    """The outcome of each prompt.

    Args:
        judgement: what `judge_answers` returned.
    """
    return [line["outcome"] for line in read_json_lines(judgement.path / "judgement.jsonl")]


def no_letter(model: str, replies: int) -> UserError:
    """The error where no reply of a judge was a letter.

    Args:
        model: the judge's name.
        replies: how many there were.
    """
    fix = f"Name a model that follows instructions, and answers in {TOKENS} tokens, without reasoning before."
    return UserError(f"none of {replies} replies of {model} was A, B or C", where="judge_model", fix=fix)


def _client(url: str) -> OpenAI:
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        fix = "Install it: `make setup-test`, or the extra `judge`."
        raise UserError("the package openai is not installed", where="judge_model", fix=fix) from None
    # Local servers want no key, and the client wants some.
    return OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=SECONDS)


class Judge:
    """A model on a server, and the options that it takes.

    Args:
        url: base address of a server that speaks OpenAI's protocol.
        model: the judge's name there.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model, self.client = url, model, _client(url)
        self.options: dict[str, int] = {"temperature": 0, "seed": 0, "max_tokens": TOKENS}

    def ask(self, line: dict[str, Any], *, a: str, b: str) -> Literal["A", "B", "C", "?"]:
        """The judge's letter, or a question mark where it says something else."""
        import openai

        try:
            reply = self._complete(PROMPT.format(prompt=line["prompt"], expected=line["expected"], a=a, b=b))
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise TemporaryError(f"{self.url}: the judge does not answer: {error}") from error
        except openai.APIError as error:
            fix = "Correct judge_url and judge_model; a key goes into the environment as OPENAI_API_KEY."
            raise UserError(f"the judge's server refuses: {error}", where=self.url, fix=fix) from None
        letter = LETTER.match(reply)
        choice: Any = letter[1] if letter else "?"
        return choice

    def _complete(self, content: str) -> str:
        """The reply. Models that reason refuse some options: what the refusal names is left out from then on."""
        import openai

        messages: Any = [{"role": "user", "content": content}]
        options: Any = self.options
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=messages, **options)
        except openai.BadRequestError as error:
            names = {name for name in self.options if name == error.param or re.search(rf"\b{name}\b", str(error))}
            if not names:
                raise
            self.options = {name: value for name, value in self.options.items() if name not in names}
            return self._complete(content)
        return (completion.choices[0].message.content or "") if completion.choices else ""
