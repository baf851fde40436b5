"""`serve`, `down` and `recover` where there is a server already, or none; test_deployment.py starts real ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import control, serving
from flows.support.own_server import address, environment
from flows.support.pasting import typed

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
    running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control, "API", "http://127.0.0.1:4300/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4300/api"}):
        assert serving.serve(["--port", "4300"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    message = f"error: {OWN}: the server runs already, here. Use it, or stop it first: "
    assert line.startswith(message) and line.endswith(" down")


@pytest.mark.parametrize("port", ["0", "99999", "-1", "x"])
def test_what_is_no_port_is_one_line(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        serving.serve([f"--port={port}"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == f"error: argument --port: {port}: a port is a number from 1 to 65535\n"


def test_a_directory_that_cannot_be_made_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("PREFECT_HOME", str(home / "file/home"))
    monkeypatch.setattr(control, "HOME", home / "file/home")
    with temporary_settings({PREFECT_API_URL: OWN}):
        for command in (serving.serve, serving.down, serving.recover):
            assert command([]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {home}/file/") and ": Not a directory. " in line


def test_another_users_process_is_one_line(
    running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "terminate", refuse)
    assert serving.down([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: process {running.pid}: ")


def test_a_server_that_ends_as_it_starts_leaves_no_address(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control, "PREFECT", "/bin/false")
    monkeypatch.setattr(control, "API", "http://127.0.0.1:9/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert serving.serve(["--port", "9"]) == 2
    problem = "http://127.0.0.1:9/api: the server does not start"
    assert capsys.readouterr().err == f"error: {problem}. See {home}/server.log\n"
    assert address(home) is None


def test_the_own_server_that_does_not_answer_is_to_be_started(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr("flows.recover.recover", refuse)
    with temporary_settings({PREFECT_API_URL: OWN}):
        assert serving.recover([]) == 2
        assert capsys.readouterr().err.endswith("Start it, or unset PREFECT_API_URL.\n")
        (home / "server.url").write_text(OWN)
        assert serving.recover([]) == 2
    assert capsys.readouterr().err.endswith(f"error: {OWN}: no Prefect server answers. Start it: {typed('serve')}\n")


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
    assert line.startswith("error: PREFECT_API_URL: it names no Prefect server, ")
    assert line.endswith(f". Start one: {typed('serve')}")


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
