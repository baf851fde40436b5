"""`serve`, `down` and `recover` where there is a server already, or none; test_deployment.py starts real ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import control, serving
from flows.support.own_server import address, environment

OWN = "http://127.0.0.1:4321/api"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the server's files are; it has its usual port, and no client a server."""
    for name, value in environment(None).items():
        monkeypatch.setenv(name, value)  # put back afterwards
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(control, "HOME", tmp_path)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield tmp_path


@pytest.fixture
def running(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What looks like the server that was started on a port of its own."""
    process = subprocess.Popen(["/bin/sh", "-c", "sleep 60; true", *control.SERVER])
    (home / "server.pid").write_text(str(process.pid))
    (home / "server.url").write_text(OWN)
    yield process
    for child in psutil.Process(process.pid).children() if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()


def test_a_server_on_another_port_is_named_and_none_is_started(
    running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "API", "http://127.0.0.1:4300/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4300/api"}), pytest.raises(SystemExit) as ending:
        serving.serve(["--port", "4300"])
    message = f"error: the server runs already, at {OWN}. Use it, or stop it first: "
    assert str(ending.value.code).startswith(message) and str(ending.value.code).endswith(" down")


def test_down_stops_the_server_and_forgets_its_port(
    running: subprocess.Popen[bytes], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (child,) = psutil.Process(running.pid).children()
    assert serving.down([]) == 0
    child.kill()
    assert capsys.readouterr().out == "Stopped the server.\n"
    assert running.poll() is not None and address(home) is None and not list(home.iterdir())
    assert serving.down([]) == 0
    assert capsys.readouterr().out == f"Neither server nor worker runs that was started from {home}.\n"


def test_recover_without_a_server_says_what_to_start(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.recover([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no Prefect server is set. Start one, or set PREFECT_API_URL: ")
    assert line.endswith(" serve")


def test_recover_looks_once_where_there_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    monkeypatch.setattr("flows.recover.recover", lambda: looked.append(True))
    with temporary_settings({PREFECT_API_URL: OWN}):
        assert serving.recover([]) == 0
    assert looked == [True]


def test_a_directory_that_prefect_is_told_relatively_is_the_current_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", "own")
    assert environment(4300)["PREFECT_HOME"] == str(tmp_path / "own")
