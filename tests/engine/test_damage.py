"""Damaged files, a disk that is full or cannot be written to, a clock that was set back: what a run makes of them."""

from __future__ import annotations

import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from flows.finetune import Finetuned, finetune, stages
from tasks.engine.artifacts import artifacts_in
from tasks.engine.errors import UserError, is_temporary, unwritable
from tasks.engine.planning import Plan, planning
from tasks.settings.presets import load_settings

Preset = Callable[..., str]
pytestmark = pytest.mark.usefixtures("in_this_process")


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finetuned(make_preset: Preset, prefect_server: None) -> Finetuned:
    finetuned = finetune(make_preset(), "grit")
    assert isinstance(finetuned, Finetuned)
    return finetuned


def plan_of(preset: str, **overrides: Any) -> Plan:
    with planning() as plan:
        stages(load_settings(preset, {"method": "grit", **overrides}))
    return plan


def to_run(preset: str) -> list[str]:
    return [name for name, state in plan_of(preset).stages if state == "to run"]


@pytest.mark.parametrize("damage", [delete, truncate, flip_one_bit])
def test_damage_to_any_file_of_any_artifact_is_seen(
    finetuned: Finetuned, make_preset: Preset, workplace: Path, damage: Callable[[Path], None]
) -> None:
    preset = make_preset()
    all_artifacts = [
        (stage, artifact) for stage, result in plan_of(preset).results for artifact in artifacts_in(result)
    ]
    own = [(stage, artifact) for stage, artifact in all_artifacts if artifact.path.is_relative_to(workplace / "store")]
    files = [(stage, artifact.path / name) for stage, artifact in own for name in artifact.files]
    kinds = {artifact.kind for _, artifact in own}
    exported = {"merged", "gguf", "fidelity", "registration", "promotion", "report"}
    assert kinds == {"source", "dataset", "vocabulary", "scores", "adapter", "history"} | exported
    for stage, path in files:
        whole = path.read_bytes()
        damage(path)
        # What follows waits for what the stage will make: the same, most likely.
        assert to_run(preset)[:1] == [stage], path
        path.write_bytes(whole)
    assert to_run(preset) == []


@pytest.mark.parametrize("kind", ["source", "dataset", "adapter", "merged", "gguf"])
def test_what_is_damaged_is_made_again_and_nothing_else(
    finetuned: Finetuned, make_preset: Preset, workplace: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    preset = make_preset()
    before = plan_of(preset)
    artifacts = [(stage, artifact) for stage, result in before.results for artifact in artifacts_in(result)]
    owner, damaged = next((stage, artifact) for stage, artifact in artifacts if artifact.kind == kind)
    flip_one_bit(damaged.path / max(damaged.files, key=lambda name: (damaged.path / name).stat().st_size))
    assert finetune(preset, "grit").gguf.digest == finetuned.gguf.digest
    computed, begun = (
        {r.__dict__["task_run_name"] for r in caplog.records if r.name == "prefect.task_runs" and words in r.message}
        for words in ("Finished in state Comp", "Running.")
    )
    assert computed == begun, "one sees in the log what is being done"
    names = {str(name).split()[0] for name in computed}
    assert names == {owner, *({"write_report"} if owner == "train" else ())}, "seconds differ in the report"
    assert to_run(preset) == []


def test_where_the_disk_is_full_half_way_nothing_is_lost(
    finetuned: Finetuned,
    make_preset: Preset,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The tiny model's weights have 6 MB and no file may have more than 4: the merge is the first that fails."""
    store = workplace / "full"
    preset = make_preset(store=str(store))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["flows.finetune", "--preset", preset, "--method", "grit"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
        try:
            runpy.run_module("flows.finetune", run_name="__main__")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capfd.readouterr().err
    last = printed.strip().splitlines()[-1]
    assert ended.value.code == 2, printed
    assert last.startswith(f"error: {store}: this cannot be written to: File too large. Free some space"), last
    assert "Traceback" not in printed
    assert not list((store / "drafts").iterdir())
    assert dict(plan_of(preset).stages)["train"] == "cached"
    assert finetune(preset, "grit").gguf.digest == finetuned.gguf.digest
    make_preset()


@pytest.mark.usefixtures("prefect_server")
def test_a_store_that_cannot_be_written_to(make_preset: Preset, workplace: Path) -> None:
    for store, reason in (
        ("/proc/store", "0.0 GB are free"),
        (str(workplace / "rows.jsonl"), "cannot be written to: File"),
    ):
        with pytest.raises(UserError, match=f"{store}: .*{reason}.*point `store`"):
            finetune(make_preset(store=store), "grit")
    make_preset()


def test_libraries_tell_of_a_full_disk_in_many_ways() -> None:
    try:
        try:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        except RuntimeError as inner:
            raise ValueError("cannot save") from inner
    except ValueError as error:
        assert words_for(error) == "/store: this cannot be written to: No space left on device"
    assert words_for(OSError(30, "x")) == "/store: this cannot be written to: Read-only file system"
    assert words_for(PermissionError(13, "x", "/store/a")) == "/store: this cannot be written to: Permission denied"
    assert words_for(OSError(28, "x", "/cache/a")) == "/cache/a: this cannot be written to: No space left on device"
    assert words_for(FileNotFoundError(2, "x")) is None
    assert words_for(ValueError("Operation not permitted in this state")) is None
    assert words_for(PermissionError(1, "a firewall forbids the connection")) is None


def words_for(error: BaseException) -> str | None:
    clear = unwritable(error, Path("/store"))
    return f"{clear.where}: {clear.what}" if clear else None


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (requests.ConnectionError("nobody answers"), True),
        (requests.Timeout("too slow"), True),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), True),
        (RuntimeError("CUDA out of memory"), False),
        (OSError(28, "No space left on device"), False),
        (UserError("wrong", where="here", fix="Mend it."), False),
    ],
)
def test_what_may_pass_is_told_from_what_does_not(error: Exception, passes: bool) -> None:
    assert is_temporary(error) is passes


def test_a_clock_that_was_set_back_is_no_matter(finetuned: Finetuned, make_preset: Preset, workplace: Path) -> None:
    preset, future = make_preset(), time.time() + 3 * 86400
    for path in (workplace / "store").rglob("*"):
        os.utime(path, (future, future))
    assert to_run(preset) == []
    state = finetune(preset, "grit", skip_unchanged=True, return_state=True)
    assert state.name == "Skipped"
