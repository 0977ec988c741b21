"""The database of a command: DATABASE_URL, or the embedded database, which runs while it is needed."""

import asyncio
import shlex
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import uvloop
from sqlalchemy import Connection, Engine

from archiver import database, embedded
from archiver.database import identity, lock_waits, schema
from archiver.database.connections import Connections
from archiver.settings import Settings, SettingsError, unknown_variables

log = structlog.get_logger(__name__)

WATCH_SECONDS = 2  # between two checks of the embedded Postgres


@contextmanager
def database_url(configuration: Settings, *, create: bool = False) -> Iterator[str]:
    """Yield the database URL; if none is set, run the embedded Postgres during the block.

    Raises `SettingsError` if no embedded database exists, unless `create` is set.
    """
    if configuration.database_url is not None:
        yield configuration.database_url.get_secret_value()
        return
    with running(configuration, create=create) as postgres:
        yield postgres.url


@contextmanager
def running(configuration: Settings, *, create: bool = False) -> Iterator[embedded.Postgres]:
    """Run the embedded Postgres during the block; raise `SettingsError` if there is none, unless `create` is set.

    A read-only command must not create an empty database.
    """
    if not create and not _has_embedded(configuration.home):
        home = configuration.home.resolve()
        demo = home / "demo"
        hint = (
            f" The database of `archiver demo` is in {demo}: set ARCHIVER_HOME={shlex.quote(str(demo))} to use it."
            if _has_embedded(demo)
            else ""
        )
        raise SettingsError(
            f"no embedded database in {home} (ARCHIVER_HOME). Set DATABASE_URL,"
            f" or run this command where `archiver serve` runs.{hint}"
        )
    with embedded.running(configuration.home) as postgres:
        yield postgres


def _has_embedded(home: Path) -> bool:
    try:
        (home / "postgres").lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # perhaps another user's: starting it reports why it cannot be used
    return True


@contextmanager
def supervised_database_url(configuration: Settings, *, create: bool = True) -> Iterator[str]:
    """Yield the database URL for a long-running program; an embedded Postgres that exits is restarted."""
    if configuration.database_url is not None:
        yield configuration.database_url.get_secret_value()
        return
    with running(configuration, create=create) as postgres:
        ending = threading.Event()
        watcher = threading.Thread(target=_keep, args=(postgres, ending), name="embedded", daemon=True)
        watcher.start()
        try:
            yield postgres.url
        finally:
            ending.set()
            watcher.join()


def _keep(postgres: embedded.Postgres, ending: threading.Event) -> None:
    while not ending.wait(WATCH_SECONDS):
        try:
            if postgres.restart_if_ended():
                log.error("embedded Postgres exited unexpectedly; restarted", log=str(postgres.data.parent))
        except embedded.EmbeddedError as error:
            log.error("embedded Postgres exited; restart failed", error=str(error))  # noqa: TRY400  # a traceback would add nothing


@contextmanager
def engine(configuration: Settings, *, create: bool = True) -> Iterator[Engine]:
    """Yield an engine with one connection for a short command."""
    with database_url(configuration, create=create) as url, engine_at(configuration, url) as made:
        yield made


@contextmanager
def engine_at(configuration: Settings, url: str) -> Iterator[Engine]:
    """Yield an engine with one connection to this URL, which reports lock waits."""
    connections = Connections(database.database_url(url), configuration.prepared_statements)
    with connections.synchronous() as made, lock_waits.watching(made):
        yield made


@contextmanager
def ready(configuration: Settings) -> Iterator[Engine]:
    """Yield an engine for an existing archive. Raises `SchemaError` unless the schema is at head."""
    with engine(configuration, create=False) as made:
        with database.transaction(made) as connection:
            schema.check(connection)
        yield made


@contextmanager
def opened(configuration: Settings, *, statement_seconds: float = database.STATEMENT_SECONDS) -> Iterator[Connection]:
    """Yield one transaction on an existing archive. Raises `SchemaError` unless the schema is at head."""
    with (
        engine(configuration, create=False) as made,
        database.transaction(made, statement_seconds=statement_seconds) as connection,
    ):
        schema.check(connection)
        yield connection


def identity_fault(configuration: Settings, engine: Engine, opened: Connection) -> str:
    """Return why this database may not be served; empty if it may, or if this user may not check."""
    if not identity.may_select(opened):
        return ""
    return identity.Guard(configuration.home.resolve(), engine.url).examine(opened)


def report_identity(configuration: Settings, engine: Engine) -> str:
    """Return the same as `identity_fault`, and record the fault, so that other machines stop as well."""
    guard = identity.Guard(configuration.home.resolve(), engine.url)
    with database.transaction(engine) as opened:
        return guard.report(opened) if identity.may_select(opened) else ""


def where(configuration: Settings, opened: Connection) -> str:
    """Describe the database of a command, without password."""
    if configuration.database_url is None:
        return f"embedded in {configuration.home.resolve()}"
    return schema.where(opened)


def named(configuration: Settings) -> str:
    """Describe the configured database for logs, without connecting."""
    if configuration.database_url is None:
        return f"embedded in {configuration.home.resolve()}"
    return database.describe(database.database_url(configuration.database_url.get_secret_value()))


def warn_of_unknown_variables() -> None:
    """Warn about environment variables that look like misspelt settings."""
    for name, suggestion in unknown_variables():
        log.warning("unknown setting ignored", variable=name, **{"meant": suggestion} if suggestion else {})


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run asynchronous work on uvloop, like the receiver, at half the cost of asyncio's loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
