"""The way back to a former model, what is removed, and kills at any moment."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flows import rollback
from tasks.engine.artifacts import Store, file_sha256
from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY
from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import parse_name
from tasks.ollama.tag_history import TAGS, TagRecord, remember_tag, same_place
from tasks.settings.export import OllamaSettings
from tests.support.versions import LATEST, Pipeline, failed, tag_of, write_gguf


def test_rollback_goes_to_the_one_before_and_no_run_undoes_it(pipeline: Pipeline) -> None:
    for number in (1, 2, 3):
        assert pipeline.run(number, gain=3 + number).facts["promoted"]
    first, second, third = (pipeline.registered(number).facts["digest"] for number in (1, 2, 3))
    left, taken = pipeline.versions().roll_back()
    assert (str(left), str(taken)) == (tag_of(pipeline, 3), tag_of(pipeline, 2))
    assert pipeline.in_use() == second
    assert failed(pipeline.run(3, gain=6)) == ["rollback"]
    assert pipeline.states() == {first: "was in use", second: "in use", third: "withdrawn"}
    pipeline.versions().roll_back()
    assert pipeline.in_use() == first
    with pytest.raises(UserError, match="no version was in use before"):
        pipeline.versions().roll_back()
    pipeline.versions().roll_back(to=tag_of(pipeline, 3).partition(":")[2])
    assert pipeline.in_use() == third
    assert pipeline.run(3, gain=6).facts["promoted"], "it was put back by name"
    with pytest.raises(UserError, match="there is no version it:other"):
        pipeline.versions().roll_back(to="other")


def test_what_was_rolled_back_does_not_come_back_by_another_rollback(on_disk: Pipeline) -> None:
    for number in (1, 2, 3):
        on_disk.run(number, gain=3 + number)
    on_disk.versions().roll_back()
    assert on_disk.run(4, gain=8, keep=1).facts["promoted"]
    assert str(on_disk.versions().roll_back()[1]) == tag_of(on_disk, 2), "and the third stays withdrawn"
    on_disk.versions().roll_back(to=tag_of(on_disk, 4).partition(":")[2])
    assert str(on_disk.versions().roll_back()[1]) == tag_of(on_disk, 2), "what was in use before that"


def test_versions_that_an_earlier_version_has_judged_are_gone_back_to(on_disk: Pipeline) -> None:
    """Its checks had no keys; a new model is still compared with what is in use."""
    for number in (1, 2):
        on_disk.run(number, gain=3 + number)
    for path in (on_disk.store.root / TAGS).iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"checks": [check[:4] for check in record["checks"]]}))
    assert str(on_disk.versions().roll_back()[1]) == tag_of(on_disk, 1)
    assert failed(on_disk.run(2, gain=5)) == ["rollback"]
    assert failed(on_disk.run(3, gain=1)) == ["validation_loss:present"]
    assert on_disk.run(4, gain=9).facts["promoted"]


def test_one_place_by_another_name_has_the_same_history(on_disk: Pipeline, tmp_path: Path) -> None:
    on_disk.run(1, gain=9)
    (tmp_path / "link").symlink_to(on_disk.ollama.models)
    linked = Pipeline(on_disk.store, on_disk.ollama.model_copy(update={"models": tmp_path / "link"}))
    linked.registrations = on_disk.registrations
    assert not linked.run(2, gain=1).facts["promoted"]
    assert [version.state for version in linked.versions().all()] == ["never in use", "in use"]


@pytest.mark.parametrize(
    ("place", "other", "same"),
    [
        ("http://localhost:11434", "127.0.0.1", True),
        ("http://127.0.0.1:11434/", "0.0.0.0:11434", True),
        ("http://[::1]:11434", "localhost:11434", True),
        ("http://127.0.0.1:11434", "http://127.0.0.1:11435", False),
        ("https://gpu.example", "https://gpu.example:443/", True),
        ("https://gpu.example", "http://gpu.example", False),
        ("/tmp/../tmp/x", "/tmp/x", True),  # noqa: S108, never opened
    ],
)
def test_names_of_one_place(place: str, other: str, same: bool) -> None:
    assert (same_place(place) == same_place(other)) is same


def test_a_name_in_other_letters_is_the_same_name(store: Store, tmp_path: Path) -> None:
    """Ollama keeps the spelling that it has seen first."""
    settings = OllamaSettings(name="it", target="store", models=tmp_path / "models")
    pipeline = Pipeline(store, settings)
    pipeline.place.create(parse_name("It:other"), *whole_gguf(tmp_path), OllamaModel("", None, {}, None))
    for number in (1, 2):
        pipeline.run(number, gain=3 + number)
    assert {name.model for name in pipeline.place.models()} == {"It"}
    assert [version.state for version in pipeline.versions().all()] == ["in use", "was in use"]
    assert pipeline.versions().roll_back()[1].is_same(parse_name(tag_of(pipeline, 1)))


def whole_gguf(directory: Path) -> tuple[Path, str]:
    write_gguf(directory / "other.gguf", 99)
    return directory / "other.gguf", file_sha256(directory / "other.gguf")


def test_files_that_are_no_manifests_keep_nothing_from_being_removed(on_disk: Pipeline) -> None:
    for number in (1, 2):
        on_disk.run(number, gain=4 + number)
    manifests = on_disk.ollama.models / "manifests"
    (manifests / ".DS_Store").write_bytes(b"\x00\x01")
    damaged = manifests / "registry.ollama.ai" / "library" / "other" / "latest"
    damaged.parent.mkdir()
    damaged.write_text("{")
    blobs = {blob.name for blob in (on_disk.ollama.models / "blobs").iterdir()}
    for number in (3, 4):
        on_disk.run(number, gain=1, keep=1)
    names = {str(name) for name in on_disk.place.models()}
    assert str(on_disk.registrations[3].facts["model"]) not in names
    assert blobs <= {blob.name for blob in (on_disk.ollama.models / "blobs").iterdir()}


def test_killed_while_it_takes_an_unknown_ones_place_the_way_back_is_kept(
    on_disk: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = on_disk.registered(77)
    on_disk.place.copy(parse_name(foreign.facts["model"]), LATEST)
    on_disk.place.delete(parse_name(foreign.facts["model"]))
    remembered: list[TagRecord] = []

    def once(store: Store, record: TagRecord) -> None:
        if remembered:
            raise KeyboardInterrupt
        remembered.append(record)
        remember_tag(store, record)

    monkeypatch.setattr("tasks.promote.remember_tag", once)
    with pytest.raises(KeyboardInterrupt):
        on_disk.run(1, gain=5)
    assert on_disk.in_use() == on_disk.registered(1).facts["digest"]
    on_disk.versions().roll_back()
    assert on_disk.in_use() == foreign.facts["digest"]


def test_the_command_line_rolls_back_and_lists(on_disk: Pipeline, tmp_path: Path, capsys: Any) -> None:
    on_disk.run(1, gain=4)
    on_disk.run(2, gain=5)
    in_use = on_disk.in_use()
    preset = tmp_path / "preset.yaml"
    section = {"name": "it", "target": "store", "models": str(on_disk.ollama.models)}
    preset.write_text(json.dumps({"store": str(on_disk.store.root), "ollama": section}))
    words = ["--preset", str(preset)]
    assert rollback.run([*words, "--plan"]) == 0
    assert "in use" in capsys.readouterr().out and on_disk.in_use() == in_use
    assert rollback.run(words) == 0
    assert "withdrawn" in capsys.readouterr().out and on_disk.in_use() != in_use
    assert rollback.run(words) == 2
    assert "no version was in use before. Name a version by --to" in capsys.readouterr().err
    assert rollback.run([*words, "--ollama.target", "none"]) == 2
    assert "nothing is registered by these settings" in capsys.readouterr().err


def test_what_is_said_where_nothing_is_in_use(on_disk: Pipeline, tmp_path: Path, capsys: Any) -> None:
    preset = tmp_path / "preset.yaml"
    section = {"name": "it", "target": "store", "models": str(on_disk.ollama.models)}
    preset.write_text(json.dumps({"store": str(on_disk.store.root), "ollama": section}))
    assert rollback.run(["--preset", str(preset), "--plan"]) == 0
    assert "No versions of it:latest are known here." in capsys.readouterr().out
    on_disk.run(1, gain=5, faithful=False)
    tag = tag_of(on_disk, 1)
    assert rollback.run(["--preset", str(preset), "--plan"]) == 0
    assert tag in capsys.readouterr().out, "whole, also in a pipe"
    assert rollback.run(["--preset", str(preset), "--to", tag.partition(":")[2]]) == 0
    output = capsys.readouterr().out
    assert f"it:latest is {tag} now." in output and "not promoted again" not in output


def test_old_tags_go_but_never_the_one_in_use_nor_the_one_before(on_disk: Pipeline) -> None:
    for number in (1, 2):
        on_disk.run(number, gain=4 + number)
    blobs = on_disk.ollama.models / "blobs"
    for number in (3, 4, 5):
        for blob in blobs.iterdir():
            os.utime(blob, (time.time() - 7200,) * 2)
        assert not on_disk.run(number, gain=1, keep=2).facts["promoted"]
    there = {str(name) for name in on_disk.place.models()}
    names = {number: str(on_disk.registrations[number].facts["model"]) for number in range(1, 6)}
    assert there == {"it:latest", *(names[number] for number in (1, 2, 4, 5))}
    models = [blob for blob in blobs.iterdir() if blob.read_bytes()[:4] == b"GGUF"]
    assert len(models) == 4, "the file of the third is gone"
    assert all(on_disk.place.is_whole(name) for name in on_disk.place.models())


PROMOTER = """
import sys
from pathlib import Path
from tasks.engine.artifacts import Store
from tasks.settings.export import OllamaSettings
from tests.support.versions import Pipeline
store, models, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
pipeline = Pipeline(Store(store), OllamaSettings(name="it", target="store", models=models))
print("begun", flush=True)
for number in range(first, first + 1000):
    pipeline.run(number, gain=1 + 0.01 * number, keep=2)
"""


def test_killed_while_it_judges_and_prunes_the_next_run_goes_on(on_disk: Pipeline, tmp_path: Path) -> None:
    chance = random.Random(1)  # noqa: S311, no secret
    for attempt in range(5):
        command = [sys.executable, "-c", PROMOTER, str(on_disk.store.root), str(on_disk.ollama.models)]
        command.append(str(1 + 1000 * attempt))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as promoter:
            assert promoter.stdout is not None and promoter.stdout.readline() == b"begun\n"
            before = on_disk.in_use()
            while on_disk.in_use() == before:
                assert promoter.poll() is None
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.3))
            promoter.kill()
        assert on_disk.place.is_whole(LATEST)
        assert all(on_disk.place.is_whole(name) for name in on_disk.place.models())
    last = on_disk.in_use()
    assert on_disk.run(9000, gain=200).facts["promoted"]
    on_disk.versions().roll_back()
    assert on_disk.in_use() is not None and on_disk.in_use() != on_disk.registered(9000).facts["digest"]
    assert last is not None


WRITER = """
import sys
from pathlib import Path
import llama_cpp  # for which the first model else waits while it should be killed
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName
from tasks.ollama.server import Answer, OllamaServer
from tasks.ollama.directory import OllamaDirectory
from tasks.engine.artifacts import file_sha256
place, name = OllamaDirectory(Path(sys.argv[1])), ModelName("it")
print("begun", flush=True)
for number in range(10**6):
    gguf = Path(sys.argv[2 + number % 2])
    tag = ModelName("it", tag=f"v{number % 2}")
    place.create(tag, gguf, file_sha256(gguf), OllamaModel("{{ .Prompt }}", None, {"number": number}, None))
    place.copy(tag, name)
"""


def test_killed_at_any_moment_the_model_in_use_is_whole(tmp_path: Path) -> None:
    ggufs = []
    for number in (1, 2):
        ggufs.append(tmp_path / f"{number}.gguf")
        write_gguf(ggufs[-1], number)
    place, chance = OllamaDirectory(tmp_path / "models"), random.Random(0)  # noqa: S311, no secret
    command = [sys.executable, "-c", WRITER, str(place.directory), *map(str, ggufs)]
    absent, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if place.digest(LATEST) is None:
                absent.append(time.time())

    watching: threading.Thread | None = None
    digests = set()
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPOSITORY) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
            while place.digest(LATEST) is None:
                time.sleep(0.01)
            if watching is None:
                watching = threading.Thread(target=watch, daemon=True)
                watching.start()
            time.sleep(chance.uniform(0.0, 0.2))
            writer.kill()
        assert place.is_whole(LATEST)
        digests.add(place.digest(LATEST))
    done.set()
    assert watching is not None
    watching.join()
    assert not absent
    assert len(digests) > 1, "it was killed between different models"
