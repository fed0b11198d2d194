"""Open the books by URL: an embedded SQLite file, or a PostgreSQL server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from remoe.accounts.schema import METADATA, SCHEMA, SCHEMA_VERSION
from remoe.errors import SettingsError

__all__ = ["open_database"]

_BUSY_TIMEOUT_S = 5.0


def open_database(url: str, *, create: bool = True) -> Engine:
    """Open and check the books; raises SettingsError, which never shows a password.

    With `create`, missing files and tables are made; without, a missing SQLite file is an error.
    """
    parsed = _parsed(url)
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite(parsed, create=create)
    else:
        # A connection that the server has dropped meanwhile is replaced, not handed out.
        engine = create_engine(parsed, pool_pre_ping=True, pool_size=4)
    try:
        _prepare(engine)
    except SQLAlchemyError as error:
        engine.dispose()
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise SettingsError(f"cannot use the ledger {shown}: {reason}") from error
    except SettingsError:
        engine.dispose()
        raise
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SettingsError(
            f"'{url}' is not a database URL; use sqlite:////path/ledger.db or "
            "postgresql://user:password@host/database"
        ) from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or parsed.database in {None, "", ":memory:"}:
        raise SettingsError(
            f"the ledger is a SQLite file or a PostgreSQL database, not "
            f"{parsed.render_as_string(hide_password=True)}"
        )
    return parsed


def _sqlite(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "")
    if create:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot make {path.parent}: {error.strerror}") from error
    elif not path.exists():
        raise SettingsError(
            f"there is no ledger at {path} yet. `remoe up` makes it, and so does `remoe key create`."
        )
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        # Readers never wait for the writer; a commit is on the disk before it returns, so that
        # neither kill -9 nor a power cut undoes it.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


def _prepare(engine: Engine) -> None:
    """Make the tables, or check that they are ours."""
    METADATA.create_all(engine)
    with engine.begin() as connection:
        version = connection.execute(select(SCHEMA.c.version)).scalar()
        if version is None:
            try:
                with connection.begin_nested():
                    connection.execute(insert(SCHEMA).values(version=SCHEMA_VERSION))
            except IntegrityError:  # another program has just made them
                version = SCHEMA_VERSION
    if version not in {None, SCHEMA_VERSION}:
        raise SettingsError(
            f"the ledger has schema version {version}, this program knows {SCHEMA_VERSION}. "
            "Use the Remoe that wrote it, or another REMOE_GATEWAY_LEDGER."
        )
