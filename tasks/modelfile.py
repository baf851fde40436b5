"""What Ollama is told about the model: template, system prompt, parameters, license; and the Modelfile's text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.artifacts import Artifact
from tasks.errors import UserError
from tasks.settings import REPOSITORY, OllamaSettings

MODELFILES = REPOSITORY / "modelfiles"
STOPS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "alpaca": ["### Instruction:", "### Response:"],
}
LEAST_CONTEXT = 2048
"""A chat needs room, also with a model that was trained on short rows. In tokens."""
TEXT_PARAMETERS = (
    *("num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "seed", "num_predict", "top_k", "repeat_last_n"),
    *("num_ctx", "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty"),
    *("frequency_penalty", "use_mmap", "stop", "draft_num_predict"),
)
"""The parameters that a Modelfile may set; Ollama checks them only when the model runs."""

# Ollama's templates are Go's, with {{ }}; so Jinja's own delimiters are [[ ]] here.
_JINJA = Environment(
    loader=FileSystemLoader(MODELFILES),
    variable_start_string="[[",
    variable_end_string="]]",
    block_start_string="[%",
    block_end_string="%]",
    keep_trailing_newline=True,
    trim_blocks=True,
    undefined=StrictUndefined,
    autoescape=False,  # noqa: S701, no HTML: text that Ollama reads as it is
)


@dataclass(frozen=True)
class OllamaModel:
    """The one description from which Modelfile, HTTP request and files on disk are made."""

    template: str
    """Go text/template."""
    system: str | None
    parameters: dict[str, Any]
    """`stop` is a list."""
    license: str | None


def ollama_model(dataset: Artifact, settings: OllamaSettings, license_name: str | None) -> OllamaModel:
    """Describe the model for Ollama.

    Args:
        dataset: chat format, end of turn, system prompt and length of the training rows.
        settings: further parameters.
        license_name: the base model's, if known.

    Raises:
        UserError: a chat format without an Ollama template, or a parameter that Ollama does not know.
    """
    chat_format = dataset.facts["ollama_template"]
    if chat_format not in STOPS:
        raise UserError(
            "the tokenizer's chat template is like none of chatml, llama3 and alpaca, so Ollama would format otherwise",
            where="chat.format",
            fix="Choose one of these formats and train with it.",
        )
    if unknown := sorted(set(settings.parameters) - set(TEXT_PARAMETERS)):
        raise UserError(
            f"Ollama knows no {', '.join(unknown)}",
            where="ollama.parameters",
            fix=f"Choose from {', '.join(sorted(TEXT_PARAMETERS))}.",
        )
    end_of_turn = dataset.facts["end_of_turn"]
    stops = STOPS[chat_format] + [end_of_turn] * (end_of_turn not in STOPS[chat_format])
    context = max(LEAST_CONTEXT, dataset.facts["max_length"])
    return OllamaModel(
        template=_JINJA.get_template(f"{chat_format}.gotmpl").render(end_of_turn=end_of_turn),
        system=dataset.facts["system"],
        parameters={"num_ctx": context, "stop": stops, **settings.parameters},
        license=license_name,
    )


def render_modelfile(model: OllamaModel, from_: Path | str) -> str:
    """The text of the Modelfile.

    Args:
        model: what to say.
        from_: the GGUF, as Ollama finds it.

    Raises:
        UserError: a text holds three quotes, which a Modelfile cannot express.
    """
    for where, text in (("chat.system", model.system), ("the model's license", model.license)):
        if text is not None and '"""' in text:
            raise UserError('a Modelfile cannot express """', where=where, fix="Use other quotes.")
    return _JINJA.get_template("Modelfile.j2").render(model=model, from_=from_)
