"""Whether a server formats the chat as the training did, found out by asking it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.chat.probes import Probe, probes
from tasks.chat.rendering import render, without_bos
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.llamacpp.template_proof import AFTER, Difference, text_difference
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName
from tasks.ollama.server import Answer, OllamaServer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSED_ON = "{{ .Prompt }}"
"""What a server may show where the GGUF's own template formats the chat."""


def served(
    server: OllamaServer, name: ModelName, model: OllamaModel, dataset: Artifact, prompt: str, *, proof: bool
) -> dict[str, Any]:
    """Look at what a server has made of a model: the template it takes, the prompts it makes, the answer it gives.

    Args:
        server: where the model is.
        name: of the model.
        model: what the server was told.
        dataset: tokenizer and chat format of the training rows.
        prompt: what the model is asked.
        proof: whether template and prompts are compared with those of the training.

    Returns:
        Facts: `rendering`, how many prompts were compared and which differ; `chat_fault`, what is wrong with the
        answer, or none.

    Raises:
        UserError, TemporaryError: as the server's methods have them, and for a template that is none of ours.
    """
    from transformers import AutoTokenizer

    server.unload(name)
    rendering = None
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer", local_files_only=True)
    if proof:
        check_selected(server, name, model, dataset, str(tokenizer.chat_template))
        outcome = server_proof(server, name, model, dataset, tokenizer)
        differences = [asdict(difference) for difference in outcome.differences]
        rendering = {"compared": outcome.compared, "differences": differences}
    answer = server.chat(name, prompt)
    miscounted = _miscounted(answer, tokenizer, model, prompt) if proof else None
    return {"rendering": rendering, "chat_fault": miscounted or answer.fault(model.parameters["stop"])}


def _miscounted(answer: Answer, tokenizer: PreTrainedTokenizerBase, model: OllamaModel, prompt: str) -> str | None:
    """What is wrong with the number of tokens that the server has read, if it tells one."""
    system = [{"role": "system", "content": model.system}] if model.system else []
    text = render(tokenizer, [*system, {"role": "user", "content": prompt}], prompt=True)
    trained = len(tokenizer(text, add_special_tokens=False).input_ids)
    if answer.prompt_tokens in (0, trained):
        return None
    return f"the server reads a prompt as {answer.prompt_tokens} tokens, the training as {trained}"


def check_selected(server: OllamaServer, name: ModelName, model: OllamaModel, dataset: Artifact, jinja: str) -> None:
    """Check that the server formats with one of ours: the TEMPLATE that it got, or the GGUF's own template.

    Args:
        server: where the model is.
        name: of the model.
        model: what the server was told.
        dataset: chat format of the training rows.
        jinja: the template in the GGUF.

    Raises:
        UserError: it shows another one, such as one that it has detected.
    """
    if model.template is None and dataset.facts["ollama_template"] == "chatml":
        return  # it is detected as what it is
    ours = [jinja, PASSED_ON] if model.template is None else [model.template]
    if model.template is not None and dataset.facts["server_capabilities"]:
        ours.append(jinja)
    if (shown := server.shown_template(name)) not in ours:
        raise UserError(
            f"the server formats the chat with a template that is none of ours: {shown[:60]!r}",
            where=f"{server.where}, model {name}",
            fix="Update Ollama, or choose another ollama.template.",
        )


class ServerProof(NamedTuple):
    """What a server makes of the probe conversations."""

    compared: int
    """Conversations that it has rendered; 0 where it cannot tell."""
    differences: list[Difference]


def server_proof(
    server: OllamaServer,
    name: ModelName,
    model: OllamaModel,
    dataset: Artifact,
    tokenizer: PreTrainedTokenizerBase,
) -> ServerProof:
    """Compare the server's prompts with those of the training.

    Args:
        server: where the model is.
        name: of the model.
        model: what the server was told.
        dataset: chat format of the training rows.
        tokenizer: of the training rows.
    """
    differences: list[Difference] = []
    compared = 0
    for probe in probes(tokenizer):
        if not _is_served(probe, model, dataset):
            continue
        system = [] if probe.begins_with_system or not model.system else [{"role": "system", "content": model.system}]
        try:
            expected = render(
                tokenizer, [*system, *probe.messages], prompt=True, tools=probe.tools, thinking=probe.thinking
            )
        except UserError:
            continue  # the training's template refuses it, so that no row is like it
        try:
            rendered = server.rendered(name, probe)
        except UserError as error:
            differences.append(Difference(probe.name, "refused", expected[:AFTER], str(error)))
            continue
        if rendered is None:
            return ServerProof(0, [])
        compared += 1
        if difference := text_difference(probe.name, without_bos(tokenizer, expected), rendered):
            differences.append(difference)
    return ServerProof(compared, differences)


def _is_served(probe: Probe, model: OllamaModel, dataset: Artifact) -> bool:
    """Whether a server takes such a conversation; by Go it joins neighbours of one role."""
    knows = dataset.facts["server_capabilities"]
    if (probe.tools and "tools" not in knows) or (probe.thinking is not None and "thinking" not in knows):
        return False
    is_detected = model.template is None and dataset.facts["ollama_template"] == "chatml"
    by_go = not knows and (model.template is not None or is_detected)
    return probe.alternates or not by_go
