"""Stage: the raw rows, from the Hugging Face Hub, from local files, or generated for the demo."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError

from tasks.artifacts import Artifact, Store, file_sha256
from tasks.errors import TemporaryError, UserError
from tasks.settings import SOURCE_FIELDS, DataSettings
from tasks.stage import stage

GENERATED = "generated:extraction"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SPLITS = ("train", "validation", "test")


def newest_commit(settings: DataSettings, seed: int) -> str:
    """What outside the settings decides the rows: the Hub's newest commit, or the digest of local files.

    Where the Hub cannot be reached, the commit that was downloaded last, if any: what was made of it stays cached.
    """
    marks = []
    for source in (settings.source, settings.validation_source, settings.test_source):
        if source is None:
            continue
        if source == GENERATED:
            marks.append(f"faker {_faker_version()}")
        elif _is_file(source):
            path = Path(source).expanduser()
            marks.append(file_sha256(path) if path.is_file() else "missing")
        else:
            marks.append(_newest_or_downloaded(source, settings.revision))
    return " ".join(marks)


@stage(libraries=("datasets", "pyarrow"), retries=2, watch=newest_commit, reads={"settings": SOURCE_FIELDS})
def fetch_data(settings: DataSettings, seed: int, *, store: Store) -> Artifact:
    """Bring the raw rows into the store.

    Args:
        settings: where they come from.
        seed: rules generated data.
        store: where the artifact goes.

    Returns:
        The artifact `source`; its facts name the file of each split that the source provides.

    Raises:
        UserError: missing file, unsupported kind of file, or no such data set.
        TemporaryError: the Hub cannot be reached.
    """
    with store.draft("source") as draft:
        if settings.source == GENERATED:
            _faker_version()
            from tasks.extraction import generate

            generate(draft.path, seed)
            draft.facts = {split: f"{split}.jsonl" for split in SPLITS}
        else:
            sources = (settings.source, settings.validation_source, settings.test_source)
            for split, source in zip(SPLITS, sources, strict=True):
                if source is not None:
                    draft.facts[split] = _bring(source, split, settings, draft.path)
        draft.facts["name"] = settings.source
    return draft.done()


def check_files(settings: DataSettings) -> dict[str, Path]:
    """Check that local files are there and of a kind that can be read, without reading them.

    Returns:
        Their paths by split.

    Raises:
        UserError: one is not.
    """
    sources = zip(SPLITS, (settings.source, settings.validation_source, settings.test_source), strict=True)
    return {split: _checked(source) for split, source in sources if source and source != GENERATED and _is_file(source)}


def read_rows(path: Path, name: object) -> list[Mapping[str, Any]]:
    """Read the rows of a JSON, JSON Lines, CSV or Parquet file.

    Args:
        path: the file.
        name: what an error message calls it.

    Raises:
        UserError: empty or broken, with the line where there is one.
    """
    if path.suffix == ".parquet":
        rows = _parquet(path, name)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 at byte {error.start}", where=name, fix="Convert the file to UTF-8.") from None
        rows = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[path.suffix](text, name)
    if not rows:
        raise UserError("the file holds no rows", where=name, fix="Give a file with at least one row.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"row {number} is {type(row).__name__}, not an object", where=name, fix="Make each row a JSON object."
            )
    return rows


def _bring(source: str, split: str, settings: DataSettings, directory: Path) -> str:
    if not _is_file(source):
        _download(source, settings, directory / f"{split}.parquet")
        return f"{split}.parquet"
    path = _checked(source)
    name = split + path.suffix
    shutil.copyfile(path, directory / name)
    read_rows(directory / name, path)
    return name


def _faker_version() -> str:
    try:
        return version("faker")
    except PackageNotFoundError:
        raise UserError(
            "the Python package faker is not installed", where=GENERATED, fix="Run: pip install faker (or make setup)."
        ) from None


def _checked(source: str) -> Path:
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError("unsupported kind of file", where=path, fix=f"Use one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError("no such file", where=path, fix="Correct data.source.")
    return path


def _is_file(source: str) -> bool:
    """Tell a file from a Hub id (`owner/name`, or an old bare name)."""
    path = Path(source).expanduser()
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return looks_like_a_path or path.suffix in SUFFIXES or path.exists() or ("/" not in source and path.suffix != "")


def _download(source: str, settings: DataSettings, path: Path) -> None:
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


def _newest_or_downloaded(source: str, revision: str | None) -> str:
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


def _json(text: str, name: object) -> list[Any]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(error, error.lineno, name) from None
    except RecursionError:
        raise UserError("JSON nested too deeply to be read", where=name, fix="Make each row a flat object.") from None
    if not isinstance(rows, list):
        raise UserError(
            f"the file holds {type(rows).__name__}, not a list of rows", where=name, fix="Wrap the rows in [ ]."
        )
    return rows


def _jsonl(text: str, name: object) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _broken(error, number, name) from None
            except RecursionError:
                what = f"JSON nested too deeply to be read at line {number}"
                raise UserError(what, where=name, fix="Make each row a flat object.") from None
    return rows


def _csv(text: str, name: object) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # the default takes a long text for a missing quote
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(
            f"broken CSV at line {reader.line_num}: {error}", where=name, fix="Correct that line."
        ) from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(
                f"row {number} has another number of fields than the header", where=name, fix="Correct that row."
            )
    return rows


def _parquet(path: Path, name: object) -> list[Any]:
    try:
        rows: list[Any] = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"not a readable Parquet file: {error}", where=name, fix="Write the file anew.") from None
    return rows


def _broken(error: json.JSONDecodeError, line: int, name: object) -> UserError:
    return UserError(
        f"broken JSON at line {line}, column {error.colno}: {error.msg.removesuffix(' starting at')}",
        where=name,
        fix="Correct that line.",
    )
