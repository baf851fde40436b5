"""Data sets of the Hugging Face Hub."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError

from tasks.engine.errors import TemporaryError, UserError
from tasks.settings.finetune import DataSettings


def download(source: str, settings: DataSettings, path: Path) -> None:
    """Write a data set of the Hub into a Parquet file.

    Args:
        source: its id.
        settings: subset, split and revision.

    Raises:
        UserError: no such data set, no right to it, or a disk that is full.
        TemporaryError: the Hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    not_a_data_set = (
        *(DatasetNotFoundError, DatasetGenerationError, DataFilesNotFoundError, EmptyDatasetError, ValueError),
        RuntimeError,  # it comes as a script, which datasets no longer runs
    )
    commit = _commit(source, settings.revision)
    try:
        rows = load_dataset(source, settings.subset, split=settings.split, revision=commit)
    except not_a_data_set as error:
        message = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(message, where=source, fix="Check data.source, data.subset and data.split.") from None
    except (OSError, HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            fix = "Make room or give the right to write, or point HF_HOME elsewhere."
            raise UserError(f"the download cannot be written: {error.strerror}", where=source, fix=fix) from None
        raise _unreachable(source, error) from error
    rows.to_parquet(path)


def newest_or_downloaded(source: str, revision: str | None) -> str:
    """The newest commit of a data set; where the Hub cannot be reached, the one downloaded last, or an empty text.

    Args:
        source: the data set's id.
        revision: branch, tag or commit; none: the default branch.
    """
    try:
        return _commit(source, revision)
    except TemporaryError:
        try:
            repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
        except CacheNotFound:
            repositories = frozenset()
        ours = (repo for repo in repositories if (repo.repo_type, repo.repo_id) == ("dataset", source))
        downloaded = [(download.last_modified, download.commit_hash) for repo in ours for download in repo.revisions]
        return max(downloaded, default=(0.0, ""))[1]


def _commit(source: str, revision: str | None) -> str:
    try:
        return str(HfApi().dataset_info(source, revision=revision, timeout=20).sha)
    except HFValidationError:
        raise UserError("neither a file nor a Hub id", where=source, fix="Correct data.source.") from None
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise UserError(
                f"the Hub knows no such data set, or you may not read it (HTTP {status})",
                where=source,
                fix="Check data.source; for gated data accept its terms and set HF_TOKEN.",
            ) from None
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> TemporaryError:
    return TemporaryError(
        f"{source}: the Hugging Face Hub cannot be reached ({type(error).__name__}). "
        "Check the network and HF_HUB_OFFLINE, or give a file as data.source."
    )
