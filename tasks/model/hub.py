"""What the Hugging Face Hub says of a base model, and what of it is in the Hub's local cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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

from tasks.engine.errors import NO_ANSWER, TemporaryError, UserError, is_temporary
from tasks.model.files import NOT_FILES, check_names, matching, patterns
from tasks.settings.finetune import ModelSettings

SIZE_IN_A_NAME = re.compile(r"(?<![0-9.])(\d+(?:\.\d+)?)B(?![a-z0-9])", re.IGNORECASE)
BYTES_OF_A_WEIGHT = 2
"""In most repositories: their files hold 16-bit weights."""


def ask_hub(settings: ModelSettings) -> ModelInfo | None:
    """What the Hub says about the model, sizes of files among it; none if it cannot be reached.

    Raises:
        UserError: there is no such model for this user.
    """
    try:
        with _hub_errors(settings):
            return HfApi().model_info(settings.name, revision=settings.revision, timeout=10, files_metadata=True)
    except TemporaryError:
        return None


def check_access(settings: ModelSettings, info: ModelInfo) -> None:
    """Ask the Hub, once, whether this user may fetch a gated model, unless all of its files are in the local cache.

    Args:
        settings: the model's name.
        info: what the Hub says about it.

    Raises:
        UserError: the user may not.
    """
    if not info.gated or _is_cached(settings, info):
        return
    try:
        HfApi().auth_check(settings.name)
    except RepositoryNotFoundError:  # it is there, as `info` shows; without a login the Hub does not say more
        raise _gated(settings) from None
    except (*NO_ANSWER, HfHubHTTPError):  # a mirror need not know this question; the download will tell
        return


def counted_weights(info: ModelInfo) -> int | None:
    """Number of weights as the Hub has counted them, if it has."""
    return info.safetensors.total if info.safetensors else None


def weights_by_size(info: ModelInfo) -> int | None:
    """About how many weights the files hold, from their sizes; none if the Hub does not say them."""
    names = set(matching((file.rfilename for file in info.siblings or ()), ["*.safetensors"]))
    size = sum(file.size or 0 for file in info.siblings or () if file.rfilename in names)
    return size // BYTES_OF_A_WEIGHT or None


def weights_by_name(name: str) -> int | None:
    """About how many weights a model has by its name, such as 8 billion of `Meta-Llama-3-8B`; none if it does not say.

    Args:
        name: of the model on the Hub.
    """
    sizes = SIZE_IN_A_NAME.findall(name.rpartition("/")[2])
    return max((int(float(size) * 1e9) for size in sizes), default=None)


def download(settings: ModelSettings) -> Path:
    """Download what is needed into the Hub's cache, or find it there when the Hub cannot be reached.

    Raises:
        UserError: there is no such model, no right to it, or its files are not those of a model; or HF_HUB_OFFLINE is
            set, and the cache does not hold the model.
        TemporaryError: the Hub cannot be reached, and the cache does not hold the model.
    """
    info = ask_hub(settings)
    if info is not None:
        check_names([file.rfilename for file in info.siblings or ()], settings.name)
    try:
        with _hub_errors(settings):
            return Path(snapshot_download(settings.name, local_files_only=info is None, **_wanted(settings)))
    except TemporaryError:
        if not constants.HF_HUB_OFFLINE:
            raise
        fix = "Unset HF_HUB_OFFLINE, or give a model directory as model.name."
        what = "the model is not whole in the Hub's local cache, and HF_HUB_OFFLINE forbids to ask the Hub"
        raise UserError(what, where=_where(settings), fix=fix) from None


def bytes_to_download(settings: ModelSettings) -> int:
    """Size of the files that are not in the Hub's cache yet; 0 where the Hub cannot be reached.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    try:
        with _hub_errors(settings):
            files = snapshot_download(settings.name, dry_run=True, **_wanted(settings))
    except TemporaryError:  # where it matters, fetch_model says so
        return 0
    return sum(file.file_size for file in files if file.will_download)


def cached_commit(settings: ModelSettings) -> str | None:
    """The commit of a model in the Hub's cache, as far as its configuration is there."""
    config = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _is_cached(settings: ModelSettings, info: ModelInfo) -> bool:
    """Whether all files that the model needs are in the Hub's cache, as they are in the commit that it is at now."""
    names = matching((file.rfilename for file in info.siblings or ()), patterns(settings.trust_remote_code))
    return all(isinstance(try_to_load_from_cache(settings.name, name, revision=info.sha), str) for name in names)


def _wanted(settings: ModelSettings) -> dict[str, Any]:
    """The files that a model needs, as `snapshot_download` is told."""
    return {
        "revision": settings.revision,
        "allow_patterns": [*patterns(settings.trust_remote_code), "README.md"],
        "ignore_patterns": list(NOT_FILES),
    }


@contextmanager
def _hub_errors(settings: ModelSettings) -> Iterator[None]:
    """Turn the Hub's errors into a line that says what to do, and into `TemporaryError` where they may pass."""
    where = _where(settings)
    try:
        yield
    except HFValidationError:
        raise UserError("neither a directory nor a Hub id", where=where, fix="Correct model.name.") from None
    except GatedRepoError:
        raise _gated(settings) from None
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


def _gated(settings: ModelSettings) -> UserError:
    terms = f"https://huggingface.co/{settings.name}"
    fix = f"Accept its terms at {terms}, then log in: hf auth login."
    return UserError("this Hub model is gated", where=_where(settings), fix=fix)


def _unreachable(settings: ModelSettings) -> TemporaryError:
    return TemporaryError(
        f"{settings.name}: the Hugging Face Hub cannot be reached and the model is not whole in its local cache. "
        "Check the network and HF_HUB_OFFLINE, or give a model directory as model.name."
    )


def _where(settings: ModelSettings) -> str:
    return settings.name if settings.revision is None else f"{settings.name}@{settings.revision}"
