"""Session settings of the archiver's connections, which override defaults of role, database and pooler.

Behind PgBouncer in transaction mode, the settings that a transaction needs are set inside it. Without a pooler they
are set once per session, and limits that apply between transactions, or before the first statement of a transaction,
are removed. The encoding is always a startup parameter, because the driver encodes the very first statement. A
default of read-only transactions stays in force: administrators and managed services protect a full database with it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import psycopg
import structlog
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import AdaptedConnection, Connection

from archiver.settings import SettingsError

log = structlog.get_logger(__name__)

ENCODING = "UTF8"
STARTUP: Mapping[str, str] = {"client_encoding": ENCODING}

# Settings whose default per role or database could change the meaning or the result of statements, or end them.
SETTINGS: Mapping[str, str] = {
    # I1: a commit is durable.
    "synchronous_commit": "on",
    # Unqualified names are those of Postgres; names of the archiver are qualified.
    "search_path": "pg_catalog, pg_temp",
    # How values are written and read as text. A time near the end of the calendar must not leave it in
    # another time zone.
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "array_nulls": "on",
    # How statements are read.
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # A transaction may be idle between two statements: while a file is written, or another snapshot is read. Each
    # statement has its own limit.
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",
    # An error ends the transaction, not the connection.
    "exit_on_error": "off",
    # Index scans return all rows, and views are readable.
    "gin_fuzzy_search_limit": "0",
    "restrict_nonsystem_relation_kind": "",
    # JIT compilation takes 200 ms for a high estimated cost, which never pays off for a few rows.
    "jit": "off",
    "plan_cache_mode": "auto",
}
_SINCE_17 = (
    "transaction_timeout",
    "restrict_nonsystem_relation_kind",
)  # the latter also in later minor releases of older versions


def settings_sql(**others: str) -> str:
    """Return the select list that applies the settings to a transaction.

    `others`: additional settings, or other values for these, each with the SQL of its value.
    """
    values = {name: f"'{value}'" for name, value in SETTINGS.items()} | others
    return ", ".join(
        f"CASE WHEN current_setting('{name}', true) IS NOT NULL THEN set_config('{name}', {value}, true) END"
        if name in _SINCE_17
        else f"set_config('{name}', {value}, true)"
        for name, value in values.items()
    )


class EncodingError(SettingsError):
    """The database does not store text as UTF-8."""


def require_utf8(info: psycopg.ConnectionInfo) -> None:
    """Raise `EncodingError` unless the database uses UTF-8."""
    encoding = info.parameter_status("server_encoding")
    if encoding != ENCODING:
        raise EncodingError(
            f"DATABASE_URL: the database {info.dbname} has the encoding {encoding}, which cannot store every"
            " character; create one with ENCODING 'UTF8' TEMPLATE template0"
        )


# Limits that end a session between two transactions, or before the first statement of a transaction has set its own.
LIMITS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",  # since Postgres 17
)
_VERSION_17 = 170_000


def is_pooled(backend_pid: int, info: psycopg.ConnectionInfo) -> bool:
    """Return whether a pooler is between this process and the backend process.

    Poolers such as PgBouncer issue their own cancellation keys, with a number that is not a process id.
    """
    return backend_pid != info.backend_pid


def _first_statement(info: psycopg.ConnectionInfo, settings: Mapping[str, str]) -> str:
    """Return the query for the backend's process id.

    Unless the session is pooled, it also removes the session's limits and applies the settings.
    """
    ended = ", ".join(
        f"CASE WHEN own AND pg_catalog.current_setting('{name}', true) IS NOT NULL"
        f" THEN pg_catalog.set_config('{name}', '{value}', false) END"
        for name, value in {**dict.fromkeys(LIMITS, "0"), **settings}.items()
    )
    pid = "pg_catalog.pg_backend_pid()"
    own = f"{pid} OPERATOR(pg_catalog.=) {info.backend_pid}"
    return f"SELECT pid, {ended} FROM (SELECT {pid} AS pid, {own} AS own) backend"  # noqa: S608  # constants and a number


def _without_limits(arguments: Mapping[str, Any], server_version: int) -> dict[str, Any]:
    """Return the arguments with startup parameters for a session without limits.

    They are for a second attempt only, because PgBouncer rejects them.
    """
    names = LIMITS if server_version >= _VERSION_17 else LIMITS[:-1]
    given = arguments.get("options") or os.environ.get("PGOPTIONS", "")
    return {**arguments, "options": " ".join((given, *(f"-c {name}=0" for name in names))).strip()}


def open_connection(
    dialect: Any,
    record: Any,
    positional: Sequence[Any],
    arguments: Mapping[str, Any],
    *,
    prepared_statements: bool | None,
) -> Any:
    """Return a new connection of an engine, set up for use."""
    adapted = dialect.connect(*positional, **arguments)
    version = _driver(adapted).info.server_version
    try:
        pid = _set_up(adapted)
    except psycopg.Error as error:
        try:
            adapted = dialect.connect(*positional, **_without_limits(arguments, version))
            pid = _set_up(adapted)
        except psycopg.Error:
            raise error from None
    driver = _driver(adapted)
    record.info[_POOLED] = is_pooled(pid, driver.info)
    if record.info[_POOLED] and prepared_statements is None:
        driver.prepare_threshold = None
        _report_pooler()
    return adapted


def _driver(adapted: Any) -> Any:
    return adapted.driver_connection if isinstance(adapted, AdaptedConnection) else adapted


def _set_up(adapted: Any) -> int:
    """Set up a connection and return the process id of its backend; close it on an error."""
    info = _driver(adapted).info
    try:
        require_utf8(info)
        adapted.autocommit = True  # without a transaction no limit of one applies
        cursor = adapted.cursor()
        cursor.execute(_first_statement(info, SETTINGS))
        (pid, *_) = cursor.fetchone()
        cursor.close()
        adapted.autocommit = False
    except BaseException:
        adapted.close()
        raise
    return int(pid)


class PoolConnection(psycopg.AsyncConnection[Any]):
    """A connection that is used without an engine, but set up in the same way as an engine's connections."""

    pid = 0

    @classmethod
    async def connect(cls, conninfo: str = "", **arguments: Any) -> Self:
        """Return a new connection."""
        connection = await super().connect(conninfo, **arguments)
        version = connection.info.server_version
        try:
            await connection.set_up()
        except psycopg.Error as error:
            given = {"options": conninfo_to_dict(conninfo).get("options")} | arguments
            try:
                connection = await super().connect(conninfo, **_without_limits(given, version))
                await connection.set_up()
            except psycopg.Error:
                raise error from None
        return connection

    async def set_up(self) -> None:
        """Set up the new connection; close it on an error."""
        try:
            require_utf8(self.info)
            await self.set_autocommit(True)
            cursor = await self.execute(_first_statement(self.info, {}))
            (self.pid, *_) = await cursor.fetchone() or (0,)
            await self.set_autocommit(False)
            await self.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        except BaseException:
            await self.close()
            raise


async def configure(connection: PoolConnection, *, prepared_statements: bool | None) -> None:
    """Disable prepared statements of a connection behind a pooler if `prepared_statements` is None."""
    if prepared_statements is None and is_pooled(connection.pid, connection.info):
        connection.prepare_threshold = None
        _report_pooler()


_POOLED = "archiver: behind a pooler"
_reported = False


def is_behind_pooler(connection: Connection) -> bool:
    """Return whether a connection pooler such as PgBouncer is in use."""
    return bool(connection.info.get(_POOLED))


def _report_pooler() -> None:
    """Log once per process, if logging is configured, that a pooler is in use."""
    global _reported  # noqa: PLW0603  # of the process, like the log
    if _reported or not structlog.is_configured():
        return
    _reported = True
    log.info(
        "connection pooler detected; prepared statements disabled",
        setting="ARCHIVER_PREPARED_STATEMENTS",
        advice="set it to false, or to true if the pooler supports prepared statements (PgBouncer 1.22 or newer)",
    )
