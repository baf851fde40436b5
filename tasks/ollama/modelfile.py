"""What Ollama is told about the model: template, system prompt, parameters, license; and the Modelfile's text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.version import Version
from pydantic import TypeAdapter, ValidationError

from tasks.chat.formats import FORMATS
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.engine.paths import checkout_directory
from tasks.ollama.served_template import served_template
from tasks.settings.export import OllamaSettings

DEFAULT_CONTEXT = 4096
"""Tokens that Ollama reads where no `num_ctx` is given and no GPU is there; with one it is more."""
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
DROPPED = {"typical_p": Version("0.34")}
"""Parameters that Ollama refuses or ignores, and since which version."""


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

    template: str | None
    """Go text/template; none where the GGUF's own template is served."""
    system: str | None
    parameters: dict[str, Any]
    """`stop` is a list of texts; all others are single values."""
    license: str | None
    needs: str | None = None
    """The oldest version of Ollama that serves the model as it was trained; none where each does."""
    context: int = DEFAULT_CONTEXT
    """Tokens of a conversation that Ollama reads, at least."""


def ollama_model(
    dataset: Artifact, settings: OllamaSettings, license_name: str | None, server: Version | None = None
) -> OllamaModel:
    """Describe the model for Ollama.

    Args:
        dataset: chat format, ends of an answer, system prompt and length of the training rows.
        settings: who formats the chat, and further parameters; a `stop` among them comes on top of the chat format's.
        license_name: the base model's, if known.
        server: the version of the server that is to have it, if one is known.

    Raises:
        UserError: a chat format that cannot be served as the settings want it, a parameter that Ollama does not know or
            of another type, or a text that a Modelfile cannot express.
    """
    served = served_template(dataset, settings, server)
    parameters = check_parameters(settings.parameters, server)
    own = [stop] if (stop := parameters.pop("stop", None)) else []
    # Ollama replaces the stops it knows by those it is given, so all of them are given.
    of_format = FORMATS[dataset.facts["ollama_template"]].stops if dataset.facts["ollama_template"] in FORMATS else ()
    stops = list(dict.fromkeys([*of_format, *dataset.facts["stops"], *own]))
    check_stops(own, dataset)
    parameters = _context(dataset, parameters) | {"stop": stops} | parameters
    system = dataset.facts["system"]
    by_go = served.kind == "go" or dataset.facts["ollama_template"] == "chatml"  # which a server detects
    if not by_go and system == dataset.facts["default_system"]:
        system = None  # the model's own template puts it there
    texts = {"chat.system": system, "the model's license": license_name, "ollama.parameters": "\n".join(stops)}
    for where, text in texts.items():
        if text is not None and '"""' in text:
            raise UserError('a Modelfile cannot express """', where=where, fix="Use other quotes.")
    template = None
    if served.kind == "go":
        file = _jinja().get_template(f"{dataset.facts['ollama_template']}.gotmpl")
        template = file.render(end_of_turn=dataset.facts["end_of_turn"])
    context = min(parameters.get("num_ctx", DEFAULT_CONTEXT), dataset.facts["context_length"])
    return OllamaModel(template, system or None, parameters, license_name or None, served.needs, context)


def check_stops(own: Sequence[str], dataset: Artifact) -> None:
    """Check that no stop of the user's is part of the text that the chat template itself writes, line ends aside.

    Args:
        own: the user's.
        dataset: that text, without special tokens.

    Raises:
        UserError: one is.
    """
    if inside := [stop for stop in own if stop.strip() and stop in dataset.facts["template_text"]]:
        raise UserError(
            f"the stop {inside[0]!r} is a part of the chat template's own text",
            where="ollama.parameters",
            fix="Leave it out, or make it longer: the ends of the template's turns are stops already.",
        )


def _context(dataset: Artifact, parameters: Mapping[str, Any]) -> dict[str, int]:
    """`num_ctx`, where a chat twice as long as the longest training row needs more than Ollama's default."""
    limit = dataset.facts["context_length"]
    if (chosen := parameters.get("num_ctx")) is not None and chosen > limit:
        what = f"num_ctx is {chosen}, and the model's context has {limit} tokens"
        raise UserError(what, where="ollama.parameters", fix=f"Use at most {limit}.")
    wanted = min(2 * dataset.facts["max_length"], limit)
    return {"num_ctx": wanted} if chosen is None and wanted > DEFAULT_CONTEXT else {}


def check_parameters(given: Mapping[str, Any], server: Version | None = None) -> dict[str, Any]:
    """Read the user's parameters as the types that Ollama wants, since Ollama finds out only when the model runs.

    Args:
        given: name to value; texts such as "0.5" from a command line count as what they say.
        server: the version of the server that is to have them, if one is known.

    Returns:
        The same with each value in its type.

    Raises:
        UserError: an unknown name, one that the server refuses or ignores, or a value of another type.
    """
    if unknown := sorted(given.keys() - PARAMETERS.keys()):
        raise UserError(
            f"Ollama knows no {', '.join(unknown)}",
            where="ollama.parameters",
            fix=f"Choose from {', '.join(sorted(PARAMETERS))}.",
        )
    if server and (gone := [name for name in given if name in DROPPED and server >= DROPPED[name]]):
        what = f"Ollama {server} refuses or ignores {', '.join(gone)}"
        raise UserError(what, where="ollama.parameters", fix="Leave it out.")
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
