"""The way to Postgres: engine, transactions, and what an error means for the caller.

Holds no session state, so that PgBouncer in transaction mode serves: what a transaction needs is set inside it.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine, Row, bindparam, create_engine, text
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.sql.dml import ReturningInsert

from archiver import telemetry
from archiver.settings import SettingsError

T = TypeVar("T")

CONNECT_SECONDS = 5
CONNECT_SECONDS_EACH = 2  # of several hosts: one that fell silent must leave time for the next; libpq's least
STATEMENT_SECONDS = 30
LOCK_SECONDS = 10
CONFLICT_RETRIES = 3
# Placeholders as Postgres has them ($1): the driver would else parse each long statement anew, in Python.
PARAMSTYLE = "numeric_dollar"
_DIALECT = create_engine("postgresql+psycopg://", paramstyle=PARAMSTYLE).dialect

# Said once a transaction, in one round trip. I1: whatever the role's default, a commit here is a durable one; and a
# time near the end of the calendar must not leave it on the way through another time zone. And compiling a statement
# takes Postgres 200 ms where it guesses it to be costly, which never pays for the few rows of ours.
_OPEN = text(
    "SELECT set_config('synchronous_commit', 'on', true), set_config('TimeZone', 'UTC', true),"
    " set_config('jit', 'off', true),"
    " set_config('statement_timeout', :statement_timeout, true),"
    " set_config('lock_timeout', :lock_timeout, true)"
)


def database_url(value: str) -> URL:
    """A SQLAlchemy URL from `postgres://`, `postgresql://` or `postgresql+psycopg://`.

    Raises `SettingsError` for anything else; the text never repeats the value, which may hold a password.
    """
    try:
        url = _make_url(value.strip())
    except (ArgumentError, ValueError):
        raise SettingsError(
            "DATABASE_URL: not a URL; write postgresql://USER:PASSWORD@HOST:5432/DATABASE,"
            " with special characters in the password percent-encoded."
        ) from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise SettingsError("DATABASE_URL: must begin with postgres:// or postgresql://.")
    if value.count("@") > 1:
        raise SettingsError("DATABASE_URL: an @ in the user or the password must be written %40.")
    return url.set(drivername="postgresql+psycopg")


_SEVERAL_HOSTS = re.compile(
    r"(?P<before>[^:/?#]+://(?:[^@/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<rest>(?:[/?#].*)?)", re.DOTALL
)


def _make_url(value: str) -> URL:
    """SQLAlchemy's, which knows several hosts only in the query: libpq's HOST1:5432,HOST2:5432 is brought there."""
    several = _SEVERAL_HOSTS.fullmatch(value)
    if several is None:
        return make_url(value)
    told = [_HOST.fullmatch(each) for each in several["hosts"].split(",")]
    hosts = [unquote(each["name"].strip("[]")) for each in told if each]
    ports = [each["port"] or "" for each in told if each]
    if len(hosts) < len(told) or not all(hosts):
        raise ValueError
    url = make_url(several["before"] + several["rest"])
    return url.update_query_dict({"host": ",".join(hosts)} | ({"port": ",".join(ports)} if any(ports) else {}))


_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(?::(?P<port>[0-9]*))?")


def place(url: URL) -> str:
    """Which database a URL names, and as whom, for people; nothing of it that may be secret."""
    told = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    host = url.host or told.get("host") or "the default host"
    port = f":{url.port}" if url.port else ""
    user = url.username or told.get("user")
    return f"{url.database or told.get('dbname') or user or 'the default'} at {host}{port}" + (
        f" as {user}" if user else ""
    )


def conninfo(url: URL, application_name: str) -> str:
    """The same place in libpq's words, for those who connect without SQLAlchemy."""
    _, arguments = _DIALECT.create_connect_args(url)
    arguments.pop("context", None)  # the driver's own
    return make_conninfo(**{"application_name": application_name, **arguments})


def connect(url: URL, *, pool_size: int = 2, prepared_statements: bool = True) -> Engine:
    """An engine with at most `pool_size` connections; none is opened yet."""
    return create_engine(
        url,
        pool_pre_ping=True,  # a connection lost while idle must not fail whoever comes next
        **_options(url, psycopg.RawCursor, pool_size, prepared_statements),
    )


def connect_async(url: URL, *, pool_size: int = 2, prepared_statements: bool = True) -> AsyncEngine:
    """The same for an event loop."""
    return create_async_engine(url, **_options(url, psycopg.AsyncRawCursor, pool_size, prepared_statements))


def _options(url: URL, cursor: type[Any], pool_size: int, prepared_statements: bool) -> dict[str, Any]:
    has_several_hosts = not isinstance(hosts := url.query.get("host", ""), str) or "," in hosts
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS_EACH if has_several_hosts else CONNECT_SECONDS,
        "application_name": "callhq-archiver",
        "cursor_factory": cursor,
        # A host that fell silent, or a firewall that forgot the connection, shows itself within a minute or so.
        "keepalives_idle": 15,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,  # milliseconds
    }
    if not prepared_statements:
        arguments["prepare_threshold"] = None
    # What the URL says goes before what we would say.
    arguments |= {name: value for name, value in url.query.items() if name in arguments}
    return {
        "paramstyle": PARAMSTYLE,
        # Whatever the role's default: after the ledger's lock a statement must see what was committed before it.
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
    """One durable transaction with bounded waits; commits at the end of the block, rolls back on an error."""
    with engine.begin() as connection:
        _open(connection, statement_seconds, lock_seconds)
        yield connection


@contextmanager
def snapshot(engine: Engine, *, statement_seconds: float) -> Iterator[Connection]:
    """One transaction that only reads, and sees the database as it was at its start, however long it reads."""
    frozen = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with transaction(frozen, statement_seconds=statement_seconds) as connection:
        yield connection


async def run_in_transaction(engine: AsyncEngine, work: Callable[[Connection], T], seconds: float | None = None) -> T:
    """What `work` answers, after the commit of the one durable transaction that it runs in.

    `work` is ordinary code; the event loop goes on wherever it waits for Postgres. It may run several times: where
    another transaction was in the way it is done again. After so many `seconds` it is a `TimeoutError`, and nobody
    knows whether it was committed.
    """
    if seconds is None:
        return await _run(engine, work)
    running = asyncio.ensure_future(_run(engine, work))
    try:
        await asyncio.wait({running}, timeout=seconds)
        if not running.done():
            raise TimeoutError
        return running.result()
    finally:
        if not running.done():
            # The driver tries for seconds to tell a silent server that nobody waits any more; nobody waits for that.
            running.cancel()
            _abandoned.add(running)
            running.add_done_callback(_forget)


_abandoned: set[asyncio.Future[Any]] = set()


def _forget(abandoned: asyncio.Future[Any]) -> None:
    _abandoned.discard(abandoned)
    if not abandoned.cancelled():
        abandoned.exception()  # looked at, so that nothing complains


async def _run(engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
    for attempt in range(CONFLICT_RETRIES + 1):
        try:
            return await _run_once(engine, work)
        except DBAPIError as error:
            telemetry.commit_failures.labels(sqlstate(error) or "none").inc()
            if not is_conflict(error) or attempt == CONFLICT_RETRIES:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _run_once(engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
    started = False

    def opened(connection: Connection) -> T:
        nonlocal started
        _open(connection, STATEMENT_SECONDS, LOCK_SECONDS)
        started = True
        return work(connection)

    try:
        async with engine.begin() as connection:
            return await connection.run_sync(opened)
    except DBAPIError as error:
        if started or not error.connection_invalidated:
            raise
    # Lost while idle, before anything was asked of it: the next connection is a new one, and nothing is done twice.
    async with engine.begin() as connection:
        return await connection.run_sync(opened)


def _open(connection: Connection, statement_seconds: float, lock_seconds: float) -> None:
    limits = {"statement_timeout": statement_seconds, "lock_timeout": lock_seconds}
    connection.execute(_OPEN, {name: str(round(seconds * 1000)) for name, seconds in limits.items()})


def sqlstate(error: BaseException) -> str | None:
    """The five characters that tell what Postgres refused; None where the error is not Postgres's."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return original.sqlstate if isinstance(original, psycopg.Error) else None


class RowsInsert:
    """A Core INSERT, with its ON CONFLICT and RETURNING, for many rows in one statement.

    Written as multi-row VALUES, rendered once for each number of rows. SQLAlchemy's own way to the same statement
    (insertmanyvalues) handles each parameter of each row several times, which cost half of what an event costs here.
    """

    ROWS = 1_000  # of one statement: Postgres takes at most 65,535 parameters

    def __init__(self, statement: Insert | ReturningInsert[Any], columns: Sequence[str]) -> None:
        of_one = statement.values({name: bindparam(name) for name in columns})
        text_of_one = str(of_one.compile(dialect=_DIALECT))
        self._head, _, rest = text_of_one.partition(" VALUES (")
        self._tail = rest.partition(")")[2]
        self._names = self._head.rpartition("(")[2].rstrip(")").split(", ")
        self._values = itemgetter(*self._names)
        self._render = lru_cache(maxsize=128)(self._text)

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[Row[Any]]:
        """Insert these rows, and answer what the statement returns: in any order, so to be matched by key."""
        answered: list[Row[Any]] = []
        for start in range(0, len(rows), self.ROWS):
            page = rows[start : start + self.ROWS]
            values = tuple(chain.from_iterable(map(self._values, page)))
            # Postgres reads times and decimals as text as well, with two gains: the driver writes them in Python,
            # slowly; and a value has the type of a null, so that a statement prepared for one serves the other.
            parameters = msgspec.to_builtins(values, builtin_types=(bytes,))
            result = connection.exec_driver_sql(self._render(len(page)), parameters)
            answered += result if result.returns_rows else ()
        return answered

    def _text(self, count: int) -> str:
        width = len(self._names)
        rows = (
            "(" + ", ".join(f"${number}" for number in range(first, first + width)) + ")"
            for first in range(1, count * width + 1, width)
        )
        return f"{self._head} VALUES {', '.join(rows)}{self._tail}"


def explain(error: BaseException) -> str:
    """Why Postgres could not be reached, in the driver's words, or what SQLSTATE it refused with; no content."""
    state = sqlstate(error)
    original = error.orig if isinstance(error, DBAPIError) else error
    if state is None and isinstance(original, psycopg.OperationalError):
        return " ".join(str(original).split())
    return f"SQLSTATE {state or 'unknown'}"


CERTIFICATE_ADVICE = (
    "The server's certificate is not accepted: if it has expired, renew it and reload Postgres; otherwise let"
    " sslrootcert in DATABASE_URL name the authority that signed it, and write the host as the certificate has it."
)


def is_untrusted(error: BaseException) -> bool:
    """Whether it is a certificate for which no connection came about."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.OperationalError) and "certificate" in str(original)


# What a server says that will let us in before long; in other languages it is taken for a refusal.
_NOT_YET = ("starting up", "shutting down", "recovery", "not accepting", "not yet accepting", "too many", "remaining")


def is_unreachable(error: BaseException) -> bool:
    """Whether Postgres cannot be reached at present; not where it, or its certificate, says that we are wrong."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(original, psycopg.OperationalError) or original.sqlstate is not None:
        return False
    said = str(original)
    if is_untrusted(error) or "does not support SSL" in said:
        return False
    return "FATAL: " not in said or any(words in said for words in _NOT_YET)


# Classes of https://www.postgresql.org/docs/current/errcodes-appendix.html that the data itself caused:
# cardinality violation, data exception, integrity violation, check option violation, program limit exceeded, and
# what a trigger raises.
_DATA_CLASSES = frozenset({"21", "22", "23", "44", "54", "P0"})
_CONFLICTS = frozenset({"40001", "40P01"})


def is_data_error(error: BaseException) -> bool:
    """Whether the rows themselves cannot be stored, now or later."""
    state = sqlstate(error)
    if state is not None:
        return state[:2] in _DATA_CLASSES
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.DataError | UnicodeError)


def is_conflict(error: BaseException) -> bool:
    """Whether another transaction was in the way, so that the same again may succeed at once."""
    return sqlstate(error) in _CONFLICTS
