"""Whether Prefect can open the database of a server that is to start here."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import prefect
from prefect.settings import get_current_settings

from tasks.engine.errors import UserError

MIGRATIONS = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
"""A file for each revision of the database, which names it."""


def check_database_of_temporary_server() -> None:
    """Do what `check_database` does, unless the runs of this process are another server's.

    Raises:
        UserError: as there.
    """
    if get_current_settings().api.url is None:
        check_database()


def check_database() -> None:
    """Refuse at once a database that a newer Prefect has written; a server would try it for two minutes.

    An older one is no matter: a server brings it up to date as it starts.

    Raises:
        UserError: this Prefect does not have the database's revision.
    """
    url = get_current_settings().server.database.connection_url
    path = Path(urlsplit(url.get_secret_value() if url else "").path.removeprefix("/"))
    revision = _revision(path) if path.is_file() else None
    migrations = [file.read_text(encoding="utf-8") for file in MIGRATIONS.glob("*.py")] if revision else []
    if migrations and not any(f'"{revision}"' in text for text in migrations):
        what = f"a Prefect newer than {prefect.__version__} has written this database"
        fix = "Go back to the newer version of this project, or name an empty directory by PREFECT_HOME: it begins "
        raise UserError(what, where=path, fix=f"{fix}without runs and schedules, and artifacts and models stay.")


def _revision(path: Path) -> str | None:
    """What the database says of itself; nothing where it does not, which its server finds out."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            ((revision,),) = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except (sqlite3.Error, ValueError):
        return None
    return str(revision)
