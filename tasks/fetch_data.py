"""Stage: the raw rows, from the Hugging Face Hub, from local files, or generated for the demo."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tasks.data.files import GENERATED, SPLITS, checked_file, is_file, read_rows
from tasks.data.hub import download, newest_or_downloaded
from tasks.engine.artifacts import Artifact, Store, file_sha256
from tasks.engine.errors import UserError
from tasks.engine.stage import stage
from tasks.settings.finetune import SOURCE_FIELDS, DataSettings


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
        elif is_file(source):
            path = Path(source).expanduser()
            marks.append(file_sha256(path) if path.is_file() else "missing")
        else:
            marks.append(newest_or_downloaded(source, settings.revision))
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
            from tasks.data.demo_extraction import generate

            generate(draft.path, seed)
            draft.facts = {split: f"{split}.jsonl" for split in SPLITS}
        else:
            sources = (settings.source, settings.validation_source, settings.test_source)
            for split, source in zip(SPLITS, sources, strict=True):
                if source is not None:
                    draft.facts[split] = _bring(source, split, settings, draft.path)
        draft.facts["name"] = settings.source
    return draft.done()


def _bring(source: str, split: str, settings: DataSettings, directory: Path) -> str:
    if not is_file(source):
        download(source, settings, directory / f"{split}.parquet")
        return f"{split}.parquet"
    path = checked_file(source)
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
