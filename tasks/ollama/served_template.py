"""Who formats the chat once the model is registered: our Go template, or the GGUF's own Jinja template.

Since version 0.30 Ollama runs llama.cpp's server, which renders the Jinja template of the GGUF where no TEMPLATE is
registered, and also where the Jinja template knows tools or thinking and the TEMPLATE does not. Older versions render
the TEMPLATE alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from tasks.chat.formats import FORMATS, format_names
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.settings.export import OllamaSettings, Template

JINJA_SINCE = Version("0.30")
"""The first version of Ollama that renders a GGUF's Jinja template."""


@dataclass(frozen=True)
class ServedTemplate:
    """What is registered as a model's template."""

    kind: Literal["go", "jinja", "none"]
    """`go`: our TEMPLATE. `jinja`: the GGUF's own template. `none`: whatever the server takes, unproven."""

    @property
    def needs(self) -> str | None:
        """The oldest version of Ollama that serves the model as it was trained; none where each does."""
        return str(JINJA_SINCE) if self.kind == "jinja" else None


def served_template(dataset: Artifact, settings: OllamaSettings, server: Version | None = None) -> ServedTemplate:
    """Choose by the setting `ollama.template`, by what the chat format is, and by the server's version.

    Args:
        dataset: chat format of the training rows.
        settings: the setting.
        server: the version of the server that is to have the model; none for a store, or where none answers.

    Raises:
        UserError: `go` for a format that has no Go template, or a server that is too old for the Jinja template.
    """
    fits = dataset.facts["ollama_template"] in FORMATS
    knows_more = bool(dataset.facts["server_capabilities"])
    choice = settings.template
    old = not renders_jinja(server)
    if choice == "auto":
        # On a server the choice is for its version alone; a store may be served by any.
        wins = knows_more and server is not None and not old
        choice = "go" if fits and not wins else "jinja"
    if choice == "go" and not fits:
        raise UserError(
            f"the tokenizer's chat template is like none of {format_names('and')}, so no Go template fits it",
            where="ollama.template",
            fix="Use jinja, or set chat.format to one of these and train with it.",
        )
    if choice == "jinja" and old:
        raise UserError(
            f"Ollama {server} cannot render the model's own chat template, which needs {JINJA_SINCE} or newer",
            where="ollama.template",
            fix=f"Use a newer Ollama, or set chat.format to {format_names('or')} and train with it.",
        )
    return ServedTemplate(choice)


def renders_jinja(server: Version | None) -> bool:
    """Whether a server renders a GGUF's own template; true where its version is not known.

    Args:
        server: its version.
    """
    return server is None or server >= JINJA_SINCE


def jinja_counts(dataset: Artifact, template: Template) -> bool:
    """Whether some version of Ollama renders the GGUF's own template, so that it must render as the training did.

    Args:
        dataset: chat format of the training rows.
        template: the setting.
    """
    if template in ("jinja", "none"):
        return template == "jinja"
    return bool(dataset.facts["server_capabilities"]) or dataset.facts["ollama_template"] not in FORMATS
