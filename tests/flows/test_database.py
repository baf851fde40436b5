"""Databases of other versions of Prefect: an older one is taken, a newer one refused at once.

test_recover.py has the real one of a server."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings

from flows.finetune import finetune, stages
from flows.support import database as module
from flows.support.command_line import run
from flows.support.database import check_database, check_database_of_temporary_server
from tasks.engine.errors import UserError

OF_PREFECT_3_8_8 = "a3b9c7d2e5f1"
OF_ANOTHER_TIME = "0123456789ab"


def database(path: Path, revision: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        connection.commit()
    return path


def check(path: Path) -> None:
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{path}"}):
        check_database()


def test_a_newer_prefects_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = database(tmp_path / "prefect.db", OF_ANOTHER_TIME)
    with pytest.raises(UserError) as error:
        check(path)
    assert str(error.value).startswith(f"{path}: a Prefect newer than ")
    assert "an empty directory by PREFECT_HOME" in str(error.value)


def test_an_older_prefects_database_is_taken(tmp_path: Path) -> None:
    check(database(tmp_path / "prefect.db", OF_PREFECT_3_8_8))


def test_what_tells_no_revision_is_left_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("no database, though as long as the header of one would be " * 20)
    check(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "empty.db").close()
    check(tmp_path / "empty.db")
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: "postgresql+asyncpg://elsewhere/prefect"}):
        check_database()
    monkeypatch.setattr(module, "MIGRATIONS", tmp_path / "nowhere")
    check(database(tmp_path / "prefect.db", OF_ANOTHER_TIME))


def test_a_server_elsewhere_has_a_database_of_its_own(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{database(tmp_path / 'prefect.db', OF_ANOTHER_TIME)}"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url, PREFECT_API_URL: "http://elsewhere/api"}):
        check_database_of_temporary_server()
    with (
        temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(UserError),
    ):
        check_database_of_temporary_server()


def test_a_run_ends_with_the_one_line_and_starts_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite+aiosqlite:///{database(tmp_path / 'prefect.db', OF_ANOTHER_TIME)}"
    monkeypatch.setattr("flows.support.command_line.check_settings", lambda _: None)
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}, restore_defaults={PREFECT_API_URL}):
        assert run(finetune, stages, ["--preset", "demo"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/prefect.db: a Prefect newer than ") and printed.count("\n") == 1
