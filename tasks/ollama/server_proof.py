"""Whether a server formats the chat as the training did, found out by asking it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from tasks.chat.probes import Probe, probes
from tasks.chat.rendering import render, without_bos
from tasks.chat.templates import RULE
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import TemporaryError, UserError
from tasks.llamacpp.template_proof import AFTER, Difference, text_difference
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName
from tasks.ollama.served_template import renders_jinja
from tasks.ollama.server import OllamaServer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSED_ON = "{{ .Prompt }}"
"""What a server may show where the GGUF's own template formats the chat."""


@dataclass(frozen=True)
class OnServer:
    """A model that a server has, and what decides how its chats are formatted there."""

    server: OllamaServer
    name: ModelName
    model: OllamaModel
    """What the server was told."""
    dataset: Artifact
    """Tokenizer and chat format of the training rows."""
    version: Version | None
    """The server's, if it is known."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the training rows; its chat template is the GGUF's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.dataset.path / "tokenizer", local_files_only=True)

    @property
    def knows(self) -> list[str]:
        """What the server takes the GGUF's template to know, such as `tools`, if it renders that one at all."""
        return list(self.dataset.facts["server_capabilities"]) if renders_jinja(self.version) else []

    @property
    def is_detected(self) -> bool:
        """Whether the server gets no template, and takes the GGUF's for its own ChatML."""
        is_chatml = self.dataset.facts["ollama_template"] == "chatml" and not self.knows
        return self.model.template is None and is_chatml and RULE not in str(self.tokenizer.chat_template)

    @property
    def by_go(self) -> bool:
        """Whether a template of Go's formats the chat."""
        return self.is_detected or (self.model.template is not None and not self.knows)

    def takes(self, probe: Probe) -> bool:
        """Whether the server takes such a conversation as it is: by Go it joins neighbours of one role."""
        if (probe.tools and "tools" not in self.knows) or (probe.thinking is not None and "thinking" not in self.knows):
            return False
        return probe.alternates or not self.by_go

    def expected(self, probe: Probe) -> str:
        """The text of a conversation as the training renders it, with the system prompt that the server puts in.

        Raises:
            UserError: the training's template refuses it.
        """
        system = [{"role": "system", "content": self.model.system}] if self.model.system else []
        messages = probe.messages if probe.begins_with_system else [*system, *probe.messages]
        return render(self.tokenizer, messages, prompt=True, tools=probe.tools, thinking=probe.thinking)

    def count(self, text: str) -> int:
        """Tokens of a rendered text, as the training has them."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def served(model: OnServer, prompt: str, *, proof: bool) -> dict[str, Any]:
    """Look at what a server has made of a model: the template it takes, the prompts it makes, the answer it gives.

    Args:
        model: on its server.
        prompt: what the model is asked.
        proof: whether template and prompts are compared with those of the training.

    Returns:
        Facts: `rendering`, how many prompts were compared and which differ; `chat_fault`, what is wrong with the
        answer, or none.

    Raises:
        UserError, TemporaryError: as the server's methods have them, and for a template that is none of ours.
    """
    model.server.unload(model.name)
    rendering = None
    if proof:
        check_selected(model)
        rendering = compared_prompts(model)
    answer = model.server.chat(model.name, prompt)
    fault = answer.fault(model.model.parameters["stop"])
    if rendering is not None:
        trained = model.count(model.expected(Probe("a question", [{"role": "user", "content": prompt}])))
        if _is_miscounted(answer.prompt_tokens, trained, is_first=not rendering["compared"]):
            fault = f"the server reads a prompt as {answer.prompt_tokens} tokens, the training as {trained}"
    return {"rendering": rendering, "chat_fault": fault}


def check_selected(model: OnServer) -> None:
    """Check that the server formats with one of ours: the TEMPLATE that it got, or the GGUF's own template.

    Args:
        model: on its server.

    Raises:
        UserError: it shows another one, such as one that it has detected.
    """
    if model.is_detected:
        return  # as what it is
    jinja = str(model.tokenizer.chat_template)
    ours = [jinja, PASSED_ON] if model.model.template is None else [model.model.template]
    if model.model.template is not None and model.knows:
        ours.append(jinja)
    if (shown := model.server.shown_template(model.name)) not in ours:
        raise UserError(
            f"the server formats the chat with a template that is none of ours: {shown[:60]!r}",
            where=f"{model.server.where}, model {model.name}",
            fix="Update Ollama, or choose another ollama.template.",
        )


def compared_prompts(model: OnServer) -> dict[str, Any]:
    """Compare the server's prompts with those of the training, as text and by the number of their tokens.

    Args:
        model: on its server.

    Returns:
        How many were `compared`, 0 where the server does not show them, and the `differences`.
    """
    differences: list[Difference] = []
    compared = 0
    for probe in filter(model.takes, probes(model.tokenizer)):
        try:
            expected = model.expected(probe)
        except UserError:
            continue  # so that no row is like it
        try:
            rendered = model.server.rendered(model.name, probe)
            if rendered is None:
                return {"compared": 0, "differences": []}
            compared += 1
            difference = _difference(model, probe, expected, rendered, is_first=compared == 1)
        except UserError as error:
            difference = Difference(probe.name, "refused", expected[:AFTER], str(error))
        if difference is not None:
            differences.append(difference)
    return {"compared": compared, "differences": [asdict(difference) for difference in differences]}


def _difference(model: OnServer, probe: Probe, expected: str, rendered: str, *, is_first: bool) -> Difference | None:
    if difference := text_difference(probe.name, without_bos(model.tokenizer, expected), rendered):
        return difference
    trained = model.count(expected)
    try:
        read = model.server.prompt_tokens(model.name, probe)
    except (UserError, TemporaryError):  # llama.cpp may refuse to parse an answer that is cut off: no fault of a prompt
        return None
    if not _is_miscounted(read, trained, is_first=is_first):
        return None
    return Difference(probe.name, "tokens", f"{trained} tokens", f"{read} tokens")


def _is_miscounted(read: int, trained: int, *, is_first: bool) -> bool:
    """Whether a server has read other tokens than the training.

    Args:
        read: as it says; 0 where it does not.
        trained: of the training.
        is_first: nothing was read before. Later, some versions leave out what they still know of the prompt before.
    """
    return read != 0 and (read != trained if is_first else read > trained)
