"""Access to Postgres: engines, transactions, and classification of errors.

`session` says what is set in each transaction, and why.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import msgspec
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from archiver import telemetry
from archiver.database import clock, locks, session
from archiver.database.bulk_insert import DIALECT, PARAMSTYLE, BulkInsert
from archiver.database.clock import now
from archiver.database.errors import (
    CERTIFICATE_ADVICE,
    NO_ROOM_FOR_LOCKS,
    explain,
    is_cancelled,
    is_conflict,
    is_connection_failure,
    is_data_error,
    is_lock_timeout,
    is_unreachable,
    is_untrusted,
    sqlstate,
)
from archiver.database.locks import Lock
from archiver.database.raw_statement import RawStatement, Statement, execute
from archiver.database.session import EncodingError, is_behind_pooler
from archiver.database.urls import database_url, describe

__all__ = [
    "CERTIFICATE_ADVICE",
    "LOCK_SECONDS",
    "NO_ROOM_FOR_LOCKS",
    "STATEMENT_SECONDS",
    "BulkInsert",
    "EncodingError",
    "Lock",
    "RawStatement",
    "Statement",
    "clock",
    "connect",
    "connect_async",
    "conninfo",
    "database_url",
    "describe",
    "execute",
    "explain",
    "is_behind_pooler",
    "is_cancelled",
    "is_conflict",
    "is_connection_failure",
    "is_data_error",
    "is_lock_timeout",
    "is_unreachable",
    "is_untrusted",
    "limit",
    "limit_locks",
    "locks",
    "now",
    "redirect",
    "run",
    "run_in_transaction",
    "run_split",
    "session",
    "snapshot",
    "sqlstate",
    "transaction",
]

T = TypeVar("T")
Item = TypeVar("Item")

CONNECT_SECONDS = 5
CONNECT_SECONDS_PER_HOST = 2  # of several hosts: one that fell silent must leave time for the next; libpq's least
STATEMENT_SECONDS = 30
LOCK_SECONDS = 10
CONFLICT_RETRIES = 3

# Once a transaction, by one statement.
_OPEN = RawStatement(
    f"SELECT {session.settings_sql(statement_timeout='$1', lock_timeout='$2')},"  # noqa: S608  # constants
    " extract(epoch FROM clock_timestamp())::float8 AS at"
)


def conninfo(url: URL, application_name: str) -> str:
    """Return the URL as a libpq connection string, for connections without SQLAlchemy."""
    _, arguments = DIALECT.create_connect_args(url)
    arguments.pop("context", None)  # the driver's own
    return make_conninfo(**{"application_name": application_name, **arguments, **session.STARTUP})


def connect(url: URL, *, pool_size: int = 2, prepared_statements: bool | None = None) -> Engine:
    """Return an engine with at most `pool_size` connections; opens none.

    `prepared_statements`: None: unless a pooler such as PgBouncer is in between. Connecting raises `EncodingError`
    where the database is not UTF-8.
    """
    engine = create_engine(
        url,
        pool_pre_ping=True,  # a connection lost while idle must not fail the next caller
        **_options(url, psycopg.RawCursor, pool_size, prepared_statements),
    )
    event.listen(engine, "connect", partial(session.check_connection, prepared_statements=prepared_statements))
    return engine


def connect_async(url: URL, *, pool_size: int = 2, prepared_statements: bool | None = None) -> AsyncEngine:
    """Like `connect`, for an event loop."""
    engine = create_async_engine(url, **_options(url, psycopg.AsyncRawCursor, pool_size, prepared_statements))
    check = partial(session.check_connection, prepared_statements=prepared_statements)
    event.listen(engine.sync_engine, "connect", check)
    return engine


def redirect(engine: AsyncEngine, url: URL) -> None:
    """Let new connections go to this URL. Connections in use are kept."""
    dialect = engine.sync_engine.dialect
    _, arguments = dialect.create_connect_args(url)
    given = _options(url, psycopg.AsyncRawCursor, 1, prepared_statements=True)["connect_args"]

    def connect_there(_: Any, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
        preserved = {name: parameters[name] for name in ("prepare_threshold", "context") if name in parameters}
        parameters.clear()
        parameters.update(arguments | given | preserved)

    if engine.sync_engine in _redirected:
        event.remove(engine.sync_engine, "do_connect", _redirected[engine.sync_engine])
    event.listen(engine.sync_engine, "do_connect", connect_there)
    _redirected[engine.sync_engine] = connect_there


_redirected: WeakKeyDictionary[Engine, Callable[..., None]] = WeakKeyDictionary()


def _options(url: URL, cursor: type[Any], pool_size: int, prepared_statements: bool | None) -> dict[str, Any]:
    has_several_hosts = not isinstance(hosts := url.query.get("host", ""), str) or "," in hosts
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS_PER_HOST if has_several_hosts else CONNECT_SECONDS,
        "application_name": "callhq-archiver",
        "cursor_factory": cursor,
        # A host that fell silent, or a firewall that forgot the connection, shows itself within a minute or so.
        "keepalives_idle": 15,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,  # milliseconds
    }
    if prepared_statements is False:
        arguments["prepare_threshold"] = None
    # What the URL says goes before what we would say.
    arguments |= {name: value for name, value in url.query.items() if name in arguments}
    arguments |= session.STARTUP  # which the URL does not change
    return {
        "paramstyle": PARAMSTYLE,
        # Regardless of the role's default: after the ledger's lock a statement must see what was committed before it.
        "isolation_level": "READ COMMITTED",
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": CONNECT_SECONDS,
        "connect_args": arguments,
        "hide_parameters": True,  # an error's text must never hold a message
        "json_serializer": lambda value: msgspec.json.encode(value).decode(),
        "json_deserializer": msgspec.json.decode,
    }


@contextmanager
def transaction(
    engine: Engine, *, statement_seconds: float = STATEMENT_SECONDS, lock_seconds: float = LOCK_SECONDS
) -> Iterator[Connection]:
    """Run the block in one durable transaction with time limits; commit at its end, roll back on an error."""
    with engine.begin() as connection:
        _open(connection, statement_seconds, lock_seconds)
        yield connection


def run(
    engine: Engine,
    work: Callable[[Connection], T],
    *,
    statement_seconds: float = STATEMENT_SECONDS,
    lock_seconds: float = LOCK_SECONDS,
    retries: int = CONFLICT_RETRIES,
) -> T:
    """Like `run_in_transaction`, without an event loop; conflicts are retried."""
    for attempt in range(retries + 1):
        try:
            with transaction(engine, statement_seconds=statement_seconds, lock_seconds=lock_seconds) as connection:
                return work(connection)
        except DBAPIError as error:
            telemetry.commit_failures.labels(sqlstate(error) or "none").inc()
            if not is_conflict(error) or attempt == retries:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def snapshot(engine: Engine, *, statement_seconds: float, exported: str | None = None) -> Iterator[Connection]:
    """Run the block in one read-only transaction that sees the database as of its start.

    `exported`: the id from `pg_export_snapshot` of another open transaction, whose snapshot this one shares.
    """
    frozen = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with frozen.begin() as connection:
        if exported is not None:  # before anything else is said, or it is too late
            connection.exec_driver_sql(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(exported).as_string())
        _open(connection, statement_seconds, LOCK_SECONDS)
        yield connection


async def run_in_transaction(
    engine: AsyncEngine,
    work: Callable[[Connection], T],
    seconds: float | None = None,
    *,
    statement_seconds: float = STATEMENT_SECONDS,
    lock_seconds: float = LOCK_SECONDS,
) -> T:
    """Return the result of `work` after the commit of its durable transaction.

    `work` is ordinary code; the event loop goes on wherever it waits for Postgres. It may run several times: where
    another transaction was in the way it is done again. After so many `seconds` it is a `TimeoutError`, and nobody
    knows whether it was committed. Postgres cancels a statement after `statement_seconds`, and one that waits for a
    lock after `lock_seconds`.
    """
    limits = statement_seconds, lock_seconds
    if seconds is None:
        return await _run(engine, work, limits)
    running = asyncio.ensure_future(_run(engine, work, limits))
    try:
        await asyncio.wait({running}, timeout=seconds)
        if not running.done():
            raise TimeoutError
        return running.result()
    finally:
        if not running.done():
            # The driver tries for seconds to cancel on a silent server; no caller waits for that.
            running.cancel()
            _abandoned.add(running)
            running.add_done_callback(_forget)


SPLIT_LOCK_SECONDS, SPLIT_STATEMENT_SECONDS = 0.5, 10.0


async def run_split(
    engine: AsyncEngine,
    items: Sequence[Item],
    work: Callable[[Connection, Sequence[Item]], T],
    *,
    statement_seconds: float = SPLIT_STATEMENT_SECONDS,
) -> tuple[list[T], list[Item]]:
    """Run `work` for all items in one transaction, or in halves if one item makes it wait.

    Where a lock or a statement takes too long, each half has a transaction of its own, and so on. The items that
    still wait alone are returned, too: nothing was done for them.
    """
    if not items:
        return [], []
    try:
        answer = await run_in_transaction(
            engine,
            lambda connection: work(connection, items),
            statement_seconds=statement_seconds,
            lock_seconds=SPLIT_LOCK_SECONDS,
        )
    except DBAPIError as error:
        if not is_lock_timeout(error) and not is_cancelled(error):
            raise
        if len(items) == 1:
            return [], list(items)
    else:
        return [answer], []
    middle = len(items) // 2
    first, waiting = await run_split(engine, items[:middle], work, statement_seconds=statement_seconds)
    second, also_waiting = await run_split(engine, items[middle:], work, statement_seconds=statement_seconds)
    return first + second, waiting + also_waiting


_abandoned: set[asyncio.Future[Any]] = set()


def _forget(abandoned: asyncio.Future[Any]) -> None:
    _abandoned.discard(abandoned)
    if not abandoned.cancelled():
        abandoned.exception()  # looked at, so that nothing complains


async def _run(engine: AsyncEngine, work: Callable[[Connection], T], limits: tuple[float, float]) -> T:
    for attempt in range(CONFLICT_RETRIES + 1):
        try:
            return await _run_once(engine, work, limits)
        except DBAPIError as error:
            telemetry.commit_failures.labels(sqlstate(error) or "none").inc()
            if not is_conflict(error) or attempt == CONFLICT_RETRIES:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _run_once(engine: AsyncEngine, work: Callable[[Connection], T], limits: tuple[float, float]) -> T:
    started = False

    def opened(connection: Connection) -> T:
        nonlocal started
        _open(connection, *limits)
        started = True
        return work(connection)

    try:
        async with engine.begin() as connection:
            return await connection.run_sync(opened)
    except DBAPIError as error:
        if started or not error.connection_invalidated:
            raise
    # Lost while idle, before anything was asked of it, so nothing is done twice. The pool's others were lost with it.
    await engine.dispose()
    async with engine.begin() as connection:
        return await connection.run_sync(opened)


def _open(connection: Connection, statement_seconds: float, lock_seconds: float) -> None:
    began = monotonic()
    limits = (str(round(seconds * 1000)) for seconds in (statement_seconds, lock_seconds))
    clock.look(_OPEN.execute(connection, *limits)[0].at, began)


_LIMIT = RawStatement("SELECT set_config('statement_timeout', $1, true)")


def limit(connection: Connection, statement_seconds: float = STATEMENT_SECONDS) -> None:
    """Set the statement timeout for the rest of the transaction or of the nested one."""
    _LIMIT.execute(connection, str(round(statement_seconds * 1000)))


_LIMIT_LOCKS = RawStatement("SELECT set_config('lock_timeout', $1, true)")


def limit_locks(connection: Connection, lock_seconds: float = LOCK_SECONDS) -> None:
    """Set the lock timeout for the rest of the transaction or of the nested one."""
    _LIMIT_LOCKS.execute(connection, str(round(lock_seconds * 1000)))
