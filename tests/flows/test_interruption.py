"""Ctrl-C in a real run, which reaches every process of the terminal's group, and SIGTERM, which reaches only one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_stopped_run_leaves_a_checkpoint_and_says_how_to_go_on(
    make_preset: Callable[..., str], workplace: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    store = workplace / "store"
    former = set(store.glob("checkpoints/*/checkpoint-*"))
    command = [sys.executable, "-m", "flows.finetune", "--preset", make_preset()]
    command += ["--training.max_steps", f"{10**6 + number}"]  # a training of its own on what is prepared once
    printed = workplace / "printed"
    with printed.open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    # Only what is killed as a group would be left behind should this test fail.
    try:
        until = time.monotonic() + 200
        while not any(path.stat().st_size for path in store.glob("drafts/history-*/history.jsonl")):
            assert run.poll() is None and time.monotonic() < until, printed.read_text()
            time.sleep(0.2)
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert len(processes) >= 3, "the run, its server, its training"
        send(run.pid, number)
        assert run.wait(60) == 128 + number, printed.read_text()
        assert not psutil.wait_procs(processes, timeout=20)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    logs = [path.read_text() for path in (printed, *store.glob("logs/*.log"))]
    assert len(logs) > 1 and not any("'loss'" in text for text in logs), "no dictionary for each step"
    last = printed.read_text().strip().splitlines()[-1]
    assert last == "stopped: the same command goes on where this one was; finished stages are cached"
    assert len(set(store.glob("checkpoints/*/checkpoint-*")) - former) == 1
    assert not list((store / "drafts").iterdir())
