"""What a command shows of its stages, on a terminal and in a file, and what goes into its log instead."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tqdm import tqdm

from flows.support import terminal as shown
from flows.support.log_file import BarReader, printing_into
from flows.support.terminal import Terminal, duration, terminal_for
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.display import TrainingProgress, announce, display
from tasks.engine.errors import UserError
from tasks.engine.logs import run_logger

WIDTH = 100
PROGRESS = TrainingProgress(step=1234, steps=2000, loss=0.12345, tokens_per_second=12345.6, seconds_left=5400)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "a.log"
    path.touch()
    return path


@pytest.fixture
def result(tmp_path: Path) -> Artifact:
    return Artifact(kind="adapter", path=tmp_path, files={}, size=19_600_000)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "MINUTE", 0.0)
    monkeypatch.setattr(shown, "LOOK_SECONDS", 0.01)


@pytest.fixture
def screen(log: Path) -> Iterator[io.StringIO]:
    """What is drawn on a terminal while the stage `train` of a comparison's branch runs."""
    stream = io.StringIO()
    with Terminal(Console(file=stream, force_terminal=True, width=WIDTH), BarReader(log), 20) as terminal:
        terminal.begins("train baseline, seed 3407")
        sys.stdout.write("by a library\n")
        terminal.trains(PROGRESS)
        time.sleep(0.5)
        yield stream


def test_what_is_printed_below_python_goes_into_the_log(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with printing_into(log) as stream:
        os.write(1, b"by this process")
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'by a child')"], check=True)
        stream.write("for the user\n")
    os.write(1, b"afterwards\n")
    assert capfd.readouterr() == ("for the user\nafterwards\n", "")
    text = log.read_text()
    assert "by this process" in text
    assert "by a child" in text


def test_the_output_comes_back_after_an_error(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), printing_into(log):
        raise ValueError("broken")
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"


def meter(count: int, elapsed: float, label: str = "Answers") -> str:
    return "\r" + tqdm.format_meter(count, 20, elapsed, prefix=label, unit="batch")


@pytest.mark.parametrize(
    ("printed", "text"),
    [
        (meter(9, 42), "Answers 9/20, 00:51 left"),
        (meter(9, 3), None),
        (meter(20, 42), None),
        (meter(9, 3600), "Answers 9/20, 1:13:20 left"),
        (meter(3, 10, "first") + meter(5, 12, "second"), "second 5/20, 00:36 left"),
        ("a line\n" + meter(9, 42) + "\nWARNING of a library\n", "Answers 9/20, 00:51 left"),
        (f"\r{tqdm.format_meter(2 * 10**9, 16 * 10**9, 20, unit='B', unit_scale=True)}", "2.00G/16.0G, 02:20 left"),
        ("100% of the rows | all [good]", None),
    ],
)
def test_bars_of_libraries_count_after_some_seconds(log: Path, printed: str, text: str | None) -> None:
    reader = BarReader(log)
    log.write_text(printed)
    bar = reader.newest()
    assert (bar and bar.text.strip()) == text


def test_a_bar_that_is_cut_in_two_is_read_when_it_is_whole(log: Path) -> None:
    reader, state = BarReader(log), meter(9, 42)
    log.write_text(state[:30])
    assert reader.newest() is None
    log.write_text(state)
    bar = reader.newest()
    assert bar is not None
    assert bar.share == 0.45


def test_each_stage_is_a_line_and_cached_ones_say_since_when(log: Path, result: Artifact) -> None:
    stream = io.StringIO()
    with Terminal(Console(file=stream, width=WIDTH), BarReader(log), 20) as terminal:
        for stage, seconds, is_cached in (("fetch_model", 0.2, True), ("train", 252.0, False)):
            terminal.begins(stage)
            terminal.ends(stage, seconds, result, is_cached=is_cached)
        try:
            raise ValueError
        except ValueError:
            terminal.ends("merge", 7330.0, None, is_cached=False)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            terminal.ends("merge", 1.0, None, is_cached=False)
    heading, cached, done, failed, stopped = stream.getvalue().splitlines()
    assert heading.split() == ["stage", "time", "result"]
    assert re.fullmatch(r"fetch_model +cached   adapter, 19\.6 MB, of \d{4}-\d\d-\d\d \d\d:\d\d", cached)
    assert re.fullmatch(r"train +4 min 12 s   adapter, 19\.6 MB", done)
    assert re.fullmatch(r"merge +2 h 2 min   failed", failed)
    assert re.fullmatch(r"merge +1\.0 s   stopped", stopped)
    assert len({line.rindex("   ") for line in (cached, done, failed, stopped)}) == 1, "in columns"


def test_a_training_draws_one_bar_with_loss_rate_and_time_left(screen: io.StringIO) -> None:
    drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    bars = [line for line in drawn if "train baseline" in line]
    assert "step 1234/2000, loss 0.1235, 12346 tokens/s, 90.0 min left" in bars[-1]
    assert all(len(line.rstrip()) <= WIDTH for line in bars)
    assert set(map(str.strip, drawn)) <= {"", *map(str.strip, bars)}, "nothing beside the bar"


@pytest.mark.usefixtures("quick")
def test_a_file_gets_a_line_of_a_long_training_and_of_a_long_bar_each_minute(log: Path, result: Artifact) -> None:
    stream = io.StringIO()
    with Terminal(Console(file=stream, width=WIDTH), BarReader(log), 20) as terminal:
        terminal.begins("score")
        with log.open("a") as file:
            file.write(meter(9, 42))
        time.sleep(0.2)
        terminal.ends("score", 80, result, is_cached=False)
        terminal.begins("train")
        terminal.trains(PROGRESS)
        time.sleep(0.2)
    assert "\nscore: Answers 9/20, 00:51 left\n" in f"\n{stream.getvalue()}"
    assert "\ntrain: step 1234/2000, loss 0.1235, 12346 tokens/s, 90.0 min left\n" in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_warnings_of_this_project_are_shown_and_those_of_libraries_logged(
    store: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("prefect.task_runs")
    for name, value in {"level": logging.INFO, "propagate": False, "handlers": []}.items():
        monkeypatch.setattr(logger, name, value)  # Prefect's own go to standard error, past what pytest replaces
    with terminal_for("finetune", store) as log:
        logger.warning("of this project")
        logger.info("Task run failed with exception: OSError('gone') - Retry 1/3 will start 2 second(s) from now")
        exec(compile("logger.warning('of Prefect')", "/lib/prefect/engine.py", "exec"))  # noqa: S102, has another file
        os.write(1, b"{'loss': '0.1'}\n")
        announce("Waiting for another run")
    out, err = capfd.readouterr()
    assert out == (
        "warning: of this project\nwarning: OSError('gone') Retry 1/3 will start 2 second(s) from now\n"
        "Waiting for another run.\n"
    )
    assert not err
    assert "{'loss': '0.1'}" in log.read_text()
    assert log.parent == store.root / "logs"


def test_the_path_of_the_log_is_printed_when_a_run_ends_in_an_error(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="broken"), terminal_for("finetune", store):
        run_logger().error("a traceback")
        raise ValueError("broken")
    (log,) = (store.root / "logs").iterdir()
    assert capfd.readouterr().out == f"\nLog:    {log}\n"


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot be written to: Not a directory"),
        terminal_for("finetune", Store(tmp_path / "file")),
    ):
        pass


def test_nothing_is_shown_where_no_command_asked_for_it(capfd: pytest.CaptureFixture[str], result: Artifact) -> None:
    display().begins("train")
    display().trains(PROGRESS)
    display().ends("train", 1.0, result, is_cached=False)
    announce("quietly")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (26, "26 s")]
)
def test_a_period_is_said_in_units_that_fit_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
