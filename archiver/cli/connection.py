"""The database of a command: the one that DATABASE_URL names, or the embedded one, started for as long as needed."""

import asyncio
import shlex
import sys
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import structlog
import uvloop
from sqlalchemy import Connection, Engine

from archiver import database, embedded, events, identity, schema, waits
from archiver.settings import Settings, SettingsError, strangers

log = structlog.get_logger(__name__)

WATCH_SECONDS = 2  # between two looks at the embedded Postgres


@contextmanager
def database_url(configuration: Settings, *, create: bool = False) -> Iterator[str]:
    """The URL to use; an embedded Postgres runs meanwhile where none is set.

    Raises `SettingsError` where there is no embedded database yet, unless it may be created.
    """
    if configuration.database_url is not None:
        yield configuration.database_url.get_secret_value()
        return
    with running(configuration, create=create) as postgres:
        yield postgres.url


@contextmanager
def running(configuration: Settings, *, create: bool = False) -> Iterator[embedded.Postgres]:
    """The embedded Postgres. A command that only looks must not leave an empty one wherever it was called."""
    if not create and not _has_embedded(configuration.home):
        home = configuration.home.resolve()
        demo = home / "demo"
        hint = (
            f" The database of `archiver demo` is in {demo}: set ARCHIVER_HOME={shlex.quote(str(demo))} to use it."
            if _has_embedded(demo)
            else ""
        )
        raise SettingsError(
            f"There is no embedded database in {home} (ARCHIVER_HOME); set DATABASE_URL,"
            f" or run this where `archiver serve` runs.{hint}"
        )
    with embedded.running(configuration.home) as postgres:
        yield postgres


def _has_embedded(home: Path) -> bool:
    try:
        (home / "postgres").lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # somebody else's, perhaps: starting it says why it cannot be had
    return True


@contextmanager
def lasting_database_url(configuration: Settings, *, create: bool = True) -> Iterator[str]:
    """The same for a program that goes on for long: an embedded Postgres that ends meanwhile is started again."""
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
            if postgres.revive():
                log.error("the embedded Postgres had ended and was started again", log=str(postgres.data.parent))
        except embedded.EmbeddedError as error:
            log.error("the embedded Postgres has ended", error=str(error))  # noqa: TRY400  # there is nothing to trace


@contextmanager
def engine(configuration: Settings, *, create: bool = True) -> Iterator[Engine]:
    """An engine of one connection for a short command."""
    with database_url(configuration, create=create) as url, engine_at(configuration, url) as made:
        yield made


@contextmanager
def engine_at(configuration: Settings, url: str) -> Iterator[Engine]:
    """The same where the URL is known."""
    made = database.connect(
        database.database_url(url), pool_size=1, prepared_statements=configuration.prepared_statements
    )
    try:
        with waits.watching(made):
            yield made
    finally:
        made.dispose()


@contextmanager
def ready(configuration: Settings) -> Iterator[Engine]:
    """The engine of a command that asks an archive. Raises `SchemaError` unless its schema is at head."""
    with engine(configuration, create=False) as made:
        with database.transaction(made) as connection:
            schema.check(connection)
        yield made


@contextmanager
def opened(configuration: Settings, *, statement_seconds: float = database.STATEMENT_SECONDS) -> Iterator[Connection]:
    """The same for a command that asks in one transaction."""
    with (
        engine(configuration, create=False) as made,
        database.transaction(made, statement_seconds=statement_seconds) as connection,
    ):
        schema.check(connection)
        yield connection


def identity_fault(configuration: Settings, engine: Engine, opened: Connection) -> str:
    """Why this is not the database served before, in words; empty where it is, or this user may not ask."""
    if not identity.may_select(opened):
        return ""
    return identity.Guard(configuration.home.resolve(), engine.url).examine(opened)


def where(configuration: Settings, opened: Connection) -> str:
    """Which database a command talks to, for people; no password."""
    if configuration.database_url is None:
        return f"embedded in {configuration.home.resolve()}"
    return schema.where(opened)


def named(configuration: Settings) -> str:
    """The same for the log, as the settings say it: nobody has to reach it."""
    if configuration.database_url is None:
        return f"embedded in {configuration.home.resolve()}"
    return database.place(database.database_url(configuration.database_url.get_secret_value()))


def warn_of_strangers() -> None:
    """A setting whose name is misspelt does nothing, which is not to be found out by what is missing."""
    for name, meant in strangers():
        log.warning("there is no such setting: it does nothing", variable=name, **{"meant": meant} if meant else {})


def run(work: Coroutine[Any, Any, None]) -> None:
    """Asynchronous work on the event loop that the receiver has as well: it costs half of what asyncio's own does."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")

actor_option = click.option(
    "--actor", metavar="NAME", help="Who does it, for the audit trail.  [default: your user and machine]"
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed; exit 1 where the answer is no. Without a terminal stdin answers."""
    if not yes and not click.confirm(question, err=True):
        click.echo("archiver: nothing was done", err=True)
        sys.exit(1)


def moment(told: str | None, option: str) -> datetime | None:
    """A time as people write it, in UTC unless it says otherwise."""
    if told is None:
        return None
    try:
        found = datetime.fromisoformat(told.upper())
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter("write 2024-01-15 or 2024-01-15T09:30:00Z", param_hint=option) from None


def period(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """The times of `--since` and `--until`; wrong usage where nothing is between them."""
    first, end = moment(since, "--since"), moment(until, "--until")
    if first is not None and end is not None and first >= end:
        raise click.UsageError("Nothing is at or after --since and before --until: give the earlier time to --since.")
    return first, end


def check_ids(ids: Iterable[str], what: str) -> None:
    """Wrong usage where one of these can be no id; `what` says of what."""
    for each in ids:
        try:
            found = events.identifier(each)
        except events.UnreadableError as error:
            raise click.UsageError(f"{each[:80]!r} is no {what} id. {events.REASONS[str(error)]}") from None
        if found is None:
            raise click.UsageError(f"{each[:80]!r} is no {what} id. It is empty.")


def name_and_value(told: str, option: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE."""
    name, is_given, value = told.partition("=")
    if not is_given or not name.strip():
        raise click.BadParameter("write NAME=VALUE", param_hint=option)
    return name.strip(), value
