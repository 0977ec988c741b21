"""Engines: connections to Postgres with the archiver's options."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from archiver.database import session
from archiver.database.statements import DIALECT, PARAMSTYLE, discard, flush_first

CONNECT_SECONDS = 5
CONNECT_SECONDS_PER_HOST = 2  # per host, so that a silent host leaves time for the next one; libpq's minimum


def conninfo(url: URL, application_name: str) -> str:
    """Return the URL as a libpq connection string, for connections without SQLAlchemy."""
    _, arguments = DIALECT.create_connect_args(url)
    arguments.pop("context", None)  # the driver's own
    own: dict[str, Any] = {"application_name": application_name, "connect_timeout": _connect_seconds(url)}
    return make_conninfo(**{**own, **arguments, **session.STARTUP})


def connect(url: URL, *, pool_size: int = 2, prepared_statements: bool | None = None) -> Engine:
    """Return an engine with at most `pool_size` connections; opens none.

    `prepared_statements`: None enables them unless a pooler such as PgBouncer is in use. Connecting raises
    `EncodingError` if the database is not UTF-8.
    """
    engine = create_engine(
        url,
        pool_pre_ping=True,  # a connection lost while idle must not fail the next caller
        **_options(url, psycopg.RawCursor, pool_size, prepared_statements),
    )
    _listen(engine, prepared_statements)
    return engine


def connect_async(url: URL, *, pool_size: int = 2, prepared_statements: bool | None = None) -> AsyncEngine:
    """Return an engine for an event loop; options as for `connect`."""
    engine = create_async_engine(url, **_options(url, psycopg.AsyncRawCursor, pool_size, prepared_statements))
    _listen(engine.sync_engine, prepared_statements)
    return engine


def _listen(engine: Engine, prepared_statements: bool | None) -> None:
    opener = _openers[engine] = _Opener(prepared_statements)
    event.listen(engine, "do_connect", opener.open)
    event.listen(engine, "before_cursor_execute", flush_first)
    event.listen(engine, "rollback", discard)


class _Opener:
    """The listener that opens an engine's connections. `redirected`: connection arguments of another URL, if any."""

    redirected: Mapping[str, Any] | None = None

    def __init__(self, prepared_statements: bool | None) -> None:
        self._prepared_statements = prepared_statements

    def open(self, dialect: Any, record: Any, positional: Sequence[Any], arguments: dict[str, Any]) -> Any:
        """Return a new connection with its settings, as the engine's listener for `do_connect`."""
        if self.redirected is not None:
            kept = ("prepare_threshold", "context")
            arguments = {**self.redirected, **{name: value for name, value in arguments.items() if name in kept}}
        return session.open_connection(
            dialect, record, positional, arguments, prepared_statements=self._prepared_statements
        )


_openers: WeakKeyDictionary[Engine, _Opener] = WeakKeyDictionary()


def redirect(engine: Engine | AsyncEngine, url: URL) -> None:
    """Direct new connections to this URL. Existing connections are kept."""
    made = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    _, arguments = made.dialect.create_connect_args(url)
    own = _options(url, psycopg.AsyncRawCursor, 1, prepared_statements=True)["connect_args"]
    _openers[made].redirected = arguments | own


def _connect_seconds(url: URL) -> int:
    has_several_hosts = not isinstance(hosts := url.query.get("host", ""), str) or "," in hosts
    return CONNECT_SECONDS_PER_HOST if has_several_hosts else CONNECT_SECONDS


def _options(url: URL, cursor: type[Any], pool_size: int, prepared_statements: bool | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "connect_timeout": _connect_seconds(url),
        "application_name": "callhq-archiver",
        "cursor_factory": cursor,
        # Detects a silent host, or a firewall that dropped the connection, within about a minute.
        "keepalives_idle": 15,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,  # milliseconds
    }
    if prepared_statements is False:
        arguments["prepare_threshold"] = None
    # Parameters of the URL take precedence.
    arguments |= {name: value for name, value in url.query.items() if name in arguments}
    arguments |= session.STARTUP  # the URL must not change these
    return {
        "paramstyle": PARAMSTYLE,
        # Regardless of the role's default: after the ledger's lock a statement must see all earlier commits.
        "isolation_level": "READ COMMITTED",
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": CONNECT_SECONDS,
        "connect_args": arguments,
        "hide_parameters": True,  # the text of an error must never contain message content
        "json_serializer": lambda value: msgspec.json.encode(value).decode(),
        "json_deserializer": msgspec.json.decode,
    }
