"""What Ollama is told about the model: template, system prompt, parameters, license; and the Modelfile's text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter, ValidationError

from tasks.chat.formats import FORMATS, format_names
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.engine.paths import checkout_directory
from tasks.settings.export import OllamaSettings

LEAST_CONTEXT = 2048
"""A chat needs room, also with a model that was trained on short rows. In tokens."""
_INTEGERS = (
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "num_predict", "draft_num_predict"),
    *("seed", "top_k", "repeat_last_n"),
)
_NUMBERS = (*("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"),)
PARAMETERS: dict[str, type] = {
    **dict.fromkeys(_INTEGERS, int),
    **dict.fromkeys(_NUMBERS, float),
    "use_mmap": bool,
    "stop": str,
}
"""The parameters that a Modelfile may set, with their types; Ollama checks them only when the model runs."""


def quoted(value: Any) -> str:
    """A value as a Modelfile spells it. There are no escapes: a text goes to the first line that ends in its quote.

    Args:
        value: a text without three quotes in a row, a number or a truth value.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    quote = '"""' if '"' in value or "\n" in value else '"'
    return f"{quote}{value}{quote}"


def _jinja() -> Environment:
    """The templates of the checkout. Ollama's own are Go's, with {{ }}; so Jinja's delimiters are [[ ]] here."""
    environment = Environment(
        loader=FileSystemLoader(checkout_directory("modelfiles")),
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        keep_trailing_newline=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701, no HTML: text that Ollama reads as it is
    )
    environment.filters["quoted"] = quoted
    return environment


@dataclass(frozen=True)
class OllamaModel:
    """The one description from which Modelfile, HTTP request and files on disk are made."""

    template: str
    """Go text/template."""
    system: str | None
    parameters: dict[str, Any]
    """`stop` is a list of texts; all others are single values."""
    license: str | None


def ollama_model(dataset: Artifact, settings: OllamaSettings, license_name: str | None) -> OllamaModel:
    """Describe the model for Ollama.

    Args:
        dataset: chat format, ends of an answer, system prompt and length of the training rows.
        settings: further parameters; a `stop` among them comes on top of the chat format's.
        license_name: the base model's, if known.

    Raises:
        UserError: a chat format without an Ollama template, a parameter that Ollama does not know or of another
            type, or a text that a Modelfile cannot express.
    """
    chat_format = dataset.facts["ollama_template"]
    if not is_servable(dataset):
        raise UserError(
            f"the tokenizer's chat template is like none of {format_names('and')}, so Ollama would format otherwise",
            where="chat.format",
            fix="Choose one of these formats and train with it.",
        )
    further = check_parameters(settings.parameters)
    end_of_turn, system = dataset.facts["end_of_turn"], dataset.facts["system"]
    # Ollama replaces the stops it knows by those it is given, so all of them are given.
    own = filter(None, [further.pop("stop", None)])
    stops = list(dict.fromkeys([*FORMATS[chat_format].stops, *dataset.facts["stops"], *own]))
    texts = {"chat.system": system, "the model's license": license_name, "ollama.parameters": "\n".join(stops)}
    for where, text in texts.items():
        if text is not None and '"""' in text:
            raise UserError('a Modelfile cannot express """', where=where, fix="Use other quotes.")
    return OllamaModel(
        template=_jinja().get_template(f"{chat_format}.gotmpl").render(end_of_turn=end_of_turn),
        system=system or None,
        parameters={"num_ctx": max(LEAST_CONTEXT, dataset.facts["max_length"]), "stop": stops, **further},
        license=license_name or None,
    )


def is_servable(dataset: Artifact) -> bool:
    """Whether Ollama has a template for the chat format of the training rows."""
    return dataset.facts["ollama_template"] in FORMATS


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the user's parameters as the types that Ollama wants, since Ollama finds out only when the model runs.

    Args:
        given: name to value; texts such as "0.5" from a command line count as what they say.

    Returns:
        The same with each value in its type.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    if unknown := sorted(given.keys() - PARAMETERS.keys()):
        raise UserError(
            f"Ollama knows no {', '.join(unknown)}",
            where="ollama.parameters",
            fix=f"Choose from {', '.join(sorted(PARAMETERS))}.",
        )
    checked: dict[str, Any] = {}
    for name, value in given.items():
        try:
            checked[name] = TypeAdapter(PARAMETERS[name]).validate_python(value)
        except ValidationError:
            wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[PARAMETERS[name]]
            raise UserError(
                f"{name} is {value!r}", where="ollama.parameters", fix=f"Ollama wants {wanted} here."
            ) from None
    return checked


def render_modelfile(model: OllamaModel, from_: Path | str) -> str:
    """The text of the Modelfile.

    Args:
        model: what to say.
        from_: the GGUF, as Ollama finds it.
    """
    return _jinja().get_template("Modelfile.j2").render(model=model, from_=from_)
