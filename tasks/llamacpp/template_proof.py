"""Whether llama.cpp's server renders and reads conversations as training does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.chat.probes import Probe, probes
from tasks.chat.rendering import render, without_bos
from tasks.engine.errors import UserError
from tasks.llamacpp.carrier import has_tensors, write_carrier
from tasks.llamacpp.rendering import Rendering, Served, served

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE, AFTER = 30, 60
"""Characters of an excerpt, before and after the first place that differs."""
TOKENS = 8
"""Token ids of an excerpt."""


@dataclass(frozen=True)
class Difference:
    """A conversation that the server has otherwise than training."""

    conversation: str
    """The probe's name."""
    kind: str
    """`text`, `tokens`, or `refused` where only the server refuses it."""
    training: str
    """Text or token ids, from a little before the first place that differs."""
    server: str
    """The same, or the server's words."""


@dataclass(frozen=True)
class TemplateProof:
    """What llama.cpp's server did with the conversations."""

    proven: bool | None
    """All are equal; None: nothing could be compared."""
    why: str | None = None
    """Where there is no comparison: why, in llama.cpp's words where the template is at fault."""
    conversations: int = 0
    """How many were compared."""
    refused: list[str] = field(default_factory=list)
    """Conversations that the training's template itself refuses; they are no differences."""
    differences: list[Difference] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def prove(tokenizer: PreTrainedTokenizerBase, file: Path, *, template: str | None = None) -> TemplateProof:
    """Compare texts and tokens of all conversations that the tokenizer's template can be asked.

    Args:
        tokenizer: of training, with the chat template.
        file: the GGUF, or its vocabulary alone.
        template: of the server, in place of the GGUF's.
    """
    expected: list[tuple[Probe, str]] = []
    refused = []
    for probe in probes(tokenizer):
        try:
            text = render(tokenizer, probe.messages, prompt=True, tools=probe.tools, thinking=probe.thinking)
        except UserError:
            refused.append(probe.name)
        else:
            expected.append((probe, text))
    if not expected:
        return TemplateProof(None, "the template refuses every conversation", refused=refused)
    answer = _served(file, [probe for probe, _ in expected], template)
    if answer.no_server is not None:
        return TemplateProof(None, answer.no_server, refused=refused)
    if answer.template_fault is not None:
        return TemplateProof(False, f"llama.cpp cannot use the template: {answer.template_fault}", refused=refused)
    pairs = zip(expected, answer.renderings, strict=True)
    compared = [_difference(tokenizer, probe, text, rendering) for (probe, text), rendering in pairs]
    differences = [difference for difference in compared if difference]
    return TemplateProof(not differences, conversations=len(expected), refused=refused, differences=differences)


def _served(file: Path, conversations: Sequence[Probe], template: str | None) -> Served:
    if has_tensors(file):
        return served(file, conversations, template=template)
    with tempfile.TemporaryDirectory() as directory:
        carrier = Path(directory, "carrier.gguf")
        write_carrier(file, carrier)
        return served(carrier, conversations, template=template)


def _difference(tokenizer: PreTrainedTokenizerBase, probe: Probe, text: str, rendering: Rendering) -> Difference | None:
    expected = without_bos(tokenizer, text)
    if rendering.text is None:
        return Difference(probe.name, "refused", expected[: BEFORE + AFTER], rendering.refusal)
    if (difference := text_difference(probe.name, expected, rendering.text)) is not None:
        return difference
    tokens = list(tokenizer(text, add_special_tokens=False).input_ids)
    if rendering.tokens != tokens:
        start = max(0, _first_difference(tokens, rendering.tokens) - 2)
        training, server = (str(ids[start : start + TOKENS]) for ids in (tokens, rendering.tokens))
        return Difference(probe.name, "tokens", training, server)
    return None


def text_difference(conversation: str, training: str, server: str) -> Difference | None:
    """Where two texts of one conversation differ, if they do.

    Args:
        conversation: its name.
        training: as training renders it, without the beginning-of-text token.
        server: as a server does.
    """
    if training == server:
        return None
    start = max(0, _first_difference(training, server) - BEFORE)
    excerpts = (text[start : start + BEFORE + AFTER] for text in (training, server))
    return Difference(conversation, "text", *excerpts)


def _first_difference(expected: Sequence[Any], actual: Sequence[Any]) -> int:
    pairs = enumerate(zip(expected, actual, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(expected), len(actual)))
