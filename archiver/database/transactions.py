"""Transactions with time limits, retried after a conflict with another transaction."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import sleep
from typing import Any, TypeVar

from psycopg import sql
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.database import clock, session
from archiver.database.errors import is_cancelled, is_conflict, is_lock_timeout, sqlstate
from archiver.database.statements import RawStatement, commit, defer, flush

T = TypeVar("T")
Item = TypeVar("Item")

STATEMENT_SECONDS = 30
LOCK_SECONDS = 10
CONFLICT_RETRIES = 3

# The first statement of each transaction. Without a pooler the session has the other settings.
_LIMITS = {"statement_timeout": "$1", "lock_timeout": "$2"}
_AT = "extract(epoch FROM clock_timestamp())::float8 AS at"
_OPEN = RawStatement(
    f"SELECT {', '.join(f'set_config({name!r}, {value}, true)' for name, value in _LIMITS.items())}, {_AT}"
)
_OPEN_POOLED = RawStatement(f"SELECT {session.settings_sql(**_LIMITS)}, {_AT}")


@contextmanager
def transaction(
    engine: Engine, *, statement_seconds: float = STATEMENT_SECONDS, lock_seconds: float = LOCK_SECONDS
) -> Iterator[Connection]:
    """Run the block in one durable transaction with time limits; commit at its end, roll back on an error."""
    with engine.begin() as connection:
        _open(connection, statement_seconds, lock_seconds)
        yield connection
        commit(connection)


@contextmanager
def snapshot(
    engine: Engine, *, statement_seconds: float, exported: str | None = None, keeps_time: bool = True
) -> Iterator[Connection]:
    """Run the block in one read-only transaction that sees the database as of its start.

    `exported`: the id from `pg_export_snapshot` of another open transaction, whose snapshot this one shares.
    `keeps_time`: the database's clock becomes that of this process, which is wrong for a replica.
    """
    frozen = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with frozen.begin() as connection:
        if exported is not None:  # must precede all other statements
            connection.exec_driver_sql(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(exported).as_string())
        _open(connection, statement_seconds, LOCK_SECONDS, keeps_time=keeps_time)
        flush(connection)  # its first statement takes the snapshot
        yield connection


def run(
    engine: Engine,
    work: Callable[[Connection], T],
    *,
    statement_seconds: float = STATEMENT_SECONDS,
    lock_seconds: float = LOCK_SECONDS,
    retries: int = CONFLICT_RETRIES,
) -> T:
    """Return the result of `work` after its commit, as `run_async` does, but without an event loop.

    After a conflict with another transaction, `work` is retried up to `retries` times.
    """
    while True:
        try:
            with transaction(engine, statement_seconds=statement_seconds, lock_seconds=lock_seconds) as connection:
                return work(connection)
        except DBAPIError as error:
            if not _is_conflict(error) or not retries:
                raise
        retries -= 1


def run_until_locked(
    engine: Engine, work: Callable[[Connection], T], *, lock_seconds: float, attempts: int, pause_seconds: float
) -> T:
    """Run `work`, which begins by acquiring a lock behind which all other sessions would queue.

    If the lock is not free within `lock_seconds`, `work` is retried after a pause, in which the other sessions
    proceed. Raises the lock timeout or the conflict of the last attempt.
    """
    while True:
        attempts -= 1
        try:
            with transaction(engine, lock_seconds=lock_seconds) as connection:
                return work(connection)
        except DBAPIError as error:
            if not (is_lock_timeout(error) or _is_conflict(error)) or not attempts:
                raise
        sleep(pause_seconds * random.uniform(0.5, 1.5))  # noqa: S311  # so that two processes do not stay in step


# Limits of a statement and of a lock wait: with several items, and with a single one.
SPLIT_SECONDS, SPLIT_LOCK_SECONDS = 10.0, 2.0
SINGLE_SECONDS, SINGLE_LOCK_SECONDS = 120.0, 10.0
SPLIT_RETRIES = 10


def run_split(
    engine: Engine,
    items: Sequence[Item],
    work: Callable[[Connection, Sequence[Item]], T],
    slow: list[DBAPIError],
) -> Iterator[T]:
    """Run `work` on items as `run_split_async` does, but without an event loop; yield each result after its commit.

    The limits for a single item are longer. An item that is locked or too slow is skipped; its error is added to
    `slow`.
    """
    if not items:
        return
    is_single = len(items) == 1
    try:
        answer = run(
            engine,
            lambda connection: work(connection, items),
            statement_seconds=SINGLE_SECONDS if is_single else SPLIT_SECONDS,
            lock_seconds=SINGLE_LOCK_SECONDS if is_single else SPLIT_LOCK_SECONDS,
            retries=SPLIT_RETRIES,
        )
    except DBAPIError as error:
        if not _is_timeout(error):
            raise
        if is_single:
            slow.append(error)
            return
    else:
        yield answer
        return
    for half in _halves(items):
        yield from run_split(engine, half, work, slow)


async def run_async(
    engine: AsyncEngine,
    work: Callable[[Connection], T],
    seconds: float | None = None,
    *,
    statement_seconds: float = STATEMENT_SECONDS,
    lock_seconds: float = LOCK_SECONDS,
) -> T:
    """Return the result of `work` after the commit of its durable transaction.

    `work` is synchronous code; the event loop continues while it waits for Postgres. It may run several times: after
    a conflict with another transaction it is retried. Raises `TimeoutError` after `seconds`; it is then unknown
    whether the transaction was committed. Postgres cancels a statement after `statement_seconds`, and one that waits
    for a lock after `lock_seconds`.
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
        else:
            _forget(running)  # it may have failed at the moment at which the caller was cancelled


_abandoned: set[asyncio.Future[Any]] = set()


def _forget(abandoned: asyncio.Future[Any]) -> None:
    _abandoned.discard(abandoned)
    if not abandoned.cancelled():
        abandoned.exception()  # retrieved, so that asyncio does not log it


ASYNC_SPLIT_LOCK_SECONDS = 0.5


async def run_split_async(
    engine: AsyncEngine,
    items: Sequence[Item],
    work: Callable[[Connection, Sequence[Item]], T],
    *,
    statement_seconds: float = SPLIT_SECONDS,
) -> tuple[list[T], list[Item]]:
    """Run `work` for all items in one transaction, or in halves if one item delays it.

    If a lock or a statement takes too long, each half has its own transaction, and so on. Returns the results, and
    the items that take too long even in their own transaction; nothing was done for these.
    """
    if not items:
        return [], []
    try:
        answer = await run_async(
            engine,
            lambda connection: work(connection, items),
            statement_seconds=statement_seconds,
            lock_seconds=ASYNC_SPLIT_LOCK_SECONDS,
        )
    except DBAPIError as error:
        if not _is_timeout(error):
            raise
        if len(items) == 1:
            return [], list(items)
    else:
        return [answer], []
    answers, waiting = list[T](), list[Item]()
    for half in _halves(items):
        half_answers, half_waiting = await run_split_async(engine, half, work, statement_seconds=statement_seconds)
        answers += half_answers
        waiting += half_waiting
    return answers, waiting


def _halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    middle = len(items) // 2
    return items[:middle], items[middle:]


def _is_conflict(error: DBAPIError) -> bool:
    """Count the failed transaction; return whether a retry may succeed."""
    telemetry.commit_failures.labels(sqlstate(error) or "none").inc()
    return is_conflict(error)


def _is_timeout(error: DBAPIError) -> bool:
    return is_lock_timeout(error) or is_cancelled(error)


async def _run(engine: AsyncEngine, work: Callable[[Connection], T], limits: tuple[float, float]) -> T:
    retries = CONFLICT_RETRIES
    while True:
        try:
            return await _run_once(engine, work, limits)
        except DBAPIError as error:
            if not _is_conflict(error) or not retries:
                raise
        retries -= 1


async def _run_once(engine: AsyncEngine, work: Callable[[Connection], T], limits: tuple[float, float]) -> T:
    started = False

    def on_start() -> None:
        nonlocal started
        started = True

    def opened(connection: Connection) -> T:
        _open(connection, *limits, on_start=on_start)
        answer = work(connection)
        on_start()  # it is then unknown whether the transaction was committed
        commit(connection)
        return answer

    try:
        async with engine.begin() as connection:
            return await connection.run_sync(opened)
    except DBAPIError as error:
        if started or not error.connection_invalidated:
            raise
    # Lost while idle, before the first statement, so nothing runs twice. The pool's other connections are lost too.
    await engine.dispose()
    async with engine.begin() as connection:
        return await connection.run_sync(opened)


def _open(
    connection: Connection,
    statement_seconds: float,
    lock_seconds: float,
    *,
    keeps_time: bool = True,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Set the limits of a transaction and read the database's clock, together with its first statement.

    `on_start` is called after Postgres answered. If this process does not know the database's time, it is read at
    once.
    """

    def on_answer(rows: Sequence[Any], sent_at: float) -> None:
        on_start()
        if keeps_time:
            clock.look(rows[0].at, sent_at)

    statement = _OPEN_POOLED if session.is_behind_pooler(connection) else _OPEN
    defer(
        connection,
        statement.bind(*(str(round(seconds * 1000)) for seconds in (statement_seconds, lock_seconds))),
        on_answer=on_answer,
    )
    if keeps_time and not clock.is_known():
        flush(connection)


_LIMIT = RawStatement("SELECT set_config('statement_timeout', $1, true)")


def limit(connection: Connection, statement_seconds: float = STATEMENT_SECONDS) -> None:
    """Set the statement timeout until the transaction ends, or the nested transaction is rolled back."""
    _LIMIT.execute(connection, str(round(statement_seconds * 1000)))


_LIMIT_LOCKS = RawStatement("SELECT set_config('lock_timeout', $1, true)")


def limit_locks(connection: Connection, lock_seconds: float = LOCK_SECONDS) -> None:
    """Set the lock timeout until the transaction ends, or the nested transaction is rolled back."""
    _LIMIT_LOCKS.execute(connection, str(round(lock_seconds * 1000)))
