"""Names of Ollama models."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import date

from tasks.engine.errors import UserError
from tasks.settings.finetune import FinetuneSettings

_PART = {
    "host": r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}",
    "namespace": r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}",
    "model": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}",
    "tag": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}",
}


@dataclass(frozen=True)
class ModelName:
    """`[host/[namespace/]]model[:tag]`, where a single slash parts namespace and model."""

    model: str
    namespace: str = "library"
    host: str = "registry.ollama.ai"
    tag: str = "latest"

    def is_same(self, other: ModelName) -> bool:
        """Whether Ollama takes both for one name: it keeps the case of letters, and does not tell names by it."""
        return str(self).lower() == str(other).lower()

    def __str__(self) -> str:
        """As `ollama list` shows it: always with the tag, without what goes without saying."""
        parts = [self.host, self.namespace, f"{self.model}:{self.tag}"]
        if self.host == ModelName.host:
            parts = parts[2:] if self.namespace == ModelName.namespace else parts[1:]
        return "/".join(parts)


def model_name(settings: FinetuneSettings) -> str:
    """The Ollama model name of a run: the setting `ollama.name` with the method filled in."""
    return settings.ollama.name.replace("{method}", settings.method)


def parse_name(name: str) -> ModelName:
    """Read a model name by Ollama's rules.

    Raises:
        UserError: Ollama would refuse it.
    """
    parts = name.split("/")
    model, colon, tag = parts[-1].partition(":")
    values = {"model": model, "tag": tag if colon else "latest"}
    if len(parts) > 1:
        values["namespace"] = parts[-2]
    if len(parts) > 2:
        values["host"] = parts[-3]
    wrong = [part for part, value in values.items() if not re.fullmatch(_PART[part], value)]
    routed = values["tag"].lower() in ("local", "cloud") or values["tag"].lower().endswith("-cloud")
    if len(parts) > 3 or wrong or routed:
        raise UserError(
            f"{name!r} is no valid Ollama model name",
            where="ollama.name",
            fix="Use letters, digits, - _ . as in llama3-grit or me/llama3-grit:nightly; no tag local or cloud.",
        )
    return ModelName(**values)


def known_name(text: str) -> ModelName | None:
    """Read the name of a model that Ollama has; none for those that the pipeline could not have made.

    Args:
        text: as Ollama lists it.
    """
    try:
        return parse_name(text)
    except UserError:
        return None


def version_name(name: ModelName, day: date, digest: str) -> ModelName:
    """The name of one version of a model, such as llama3-grit:2026-11-23-1a2b3c4d.

    Args:
        name: the user's; of a tag other than `latest`, the versions begin with it.
        day: of its registration.
        digest: of what is registered, in hexadecimal.

    Raises:
        UserError: the user's tag is too long for that.
    """
    prefix = "" if name.tag == ModelName.tag else f"{name.tag}-"
    tag = f"{prefix}{day:%Y-%m-%d}-{digest[:8]}"
    if not re.fullmatch(_PART["tag"], tag):
        fix = "Use a tag of at most 60 characters."
        raise UserError(f"with the version's date and digest, {name.tag!r} is too long", where="ollama.name", fix=fix)
    return replace(name, tag=tag)


def replaced_name(name: ModelName, digest: str) -> ModelName:
    """The name under which a model stays that somebody else has put there, such as llama3-grit:replaced-1a2b3c4d.

    Args:
        name: the one that it had.
        digest: its own.
    """
    return replace(name, tag=f"replaced-{digest[:8]}")


def is_version_of(name: ModelName, version: ModelName) -> bool:
    """Whether two names are of the same content, registered on whatever days.

    Args:
        name: of any model.
        version: what `version_name` returned.
    """
    parts = version.tag.split("-")
    prefix, digest = "-".join(parts[:-4]), parts[-1]
    pattern = rf"{re.escape(prefix)}{'-' if prefix else ''}\d{{4}}-\d\d-\d\d-{digest}"
    same_model = str(replace(name, tag="")).lower() == str(replace(version, tag="")).lower()
    return same_model and re.fullmatch(pattern, name.tag, re.IGNORECASE) is not None
