from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.files import read_rows
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.fetch_data import fetch_data, newest_commit
from tasks.settings.finetune import DataSettings

ROWS = [{"prompt": "Grüße,\n„hallo“", "completion": "a, b"}, {"prompt": "2", "completion": "😀"}]


def fetch(source: object, store: Store) -> Artifact:
    return fetch_data.function(DataSettings(source=str(source)), 1, store=store)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, store: Store, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    source = fetch(path, store)
    assert source.facts["train"] == f"train.{suffix}"
    assert list(read_rows(source.path / f"train.{suffix}", path)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file holds no rows"),
        ("a.json", b"  ", "the file holds no rows"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.csv", b"prompt,completion\n", "the file holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "broken JSON at line 2, column 7"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', "broken JSON at line 3"),
        ("a.json", b'{"rows": []}', "the file holds dict, not a list of rows"),
        ("a.jsonl", b"[1]\n", "row 1 is list, not an object"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ("a.csv", b"a,b\n1\n", "row 1 has another number of fields"),
        ("a.csv", b'a,b\n1,"2', "broken CSV at line 1"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.xlsx", b"", "unsupported kind of file"),
        ("a.json", b"[" * 100_000, "JSON nested too deeply to be read"),
        ("a.jsonl", b'{"a": 1}\n' + b'{"a":' * 100_000, "JSON nested too deeply to be read at line 2"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, store: Store, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        fetch(path, store)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (store.root / "source").exists()


def test_long_texts_in_a_csv_are_read(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "a" * 300_000 + ",b\n")
    source = fetch(path, store)
    assert len(read_rows(source.path / "train.csv", path)[0]["prompt"]) == 300_000


def test_without_faker_other_data_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    program = f"""
import importlib.metadata, sys
sys.modules["faker"] = None  # as if it were not installed
installed = importlib.metadata.distribution
def distribution(name):
    if name == "faker":
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.distribution = distribution
from pathlib import Path
from flows.finetune import stages
from tasks.engine.artifacts import Store
from tasks.settings.finetune import DataSettings
from tasks.fetch_data import fetch_data
store = Store(Path({str(tmp_path)!r}) / "store")
settings = DataSettings(source={str(tmp_path / "rows.json")!r})
fetch_data.key(settings, 1, store=store)
print(fetch_data.function(settings, 1, store=store).facts["train"])
try:
    fetch_data.key(DataSettings(source="generated:extraction"), 1, store=store)
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    message = "generated:extraction: the Python package faker is not installed. Run: pip install faker (or make setup)."
    assert done.stdout.splitlines() == ["train.json", message]


@pytest.mark.parametrize("name", ["missing.jsonl", "/no/such/place/rows.json", "rows.txt"])
def test_missing_files(store: Store, name: str) -> None:
    with pytest.raises(UserError, match=r"no such file|unsupported kind"):
        fetch(name, store)


def test_an_unreachable_hub_may_be_tried_again(store: Store) -> None:
    """The tests run with HF_HUB_OFFLINE=1, so the Hub is out of reach for real."""
    with pytest.raises(TemporaryError, match=r"nobody/nothing: the Hugging Face Hub cannot be reached"):
        fetch("nobody/nothing", store)


def test_generated_data_depends_on_the_seed_alone(store: Store) -> None:
    settings = DataSettings(source="generated:extraction")
    source, same, other = (fetch_data.function(settings, seed, store=store) for seed in (1, 1, 2))
    assert source.digest == same.digest != other.digest
    assert set(source.files) == {"train.jsonl", "validation.jsonl", "test.jsonl"}


def test_a_changed_file_is_noticed(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    settings = DataSettings(source=str(path))
    before = fetch_data.key(settings, 1, store=store)
    path.write_text(json.dumps(ROWS[1]) + "\n")
    assert fetch_data.key(settings, 1, store=store) != before


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    settings, stat = DataSettings(source=str(path)), path.stat()
    before = newest_commit(settings, 1)
    os.utime(path, (0, 0))
    assert newest_commit(settings, 1) == before
    path.write_text('{"prompt": "a", "completion": "c"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert newest_commit(settings, 1) != before
