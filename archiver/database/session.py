"""Session settings of our connections, regardless of defaults of role, database or pooler.

Nothing is kept in the session, so that PgBouncer in transaction mode serves: what a transaction needs is set inside
it. The encoding alone is a startup parameter: the driver encodes the very first statement.
"""

from collections.abc import Mapping
from typing import Any

import psycopg
import structlog
from sqlalchemy import AdaptedConnection, Connection

from archiver.settings import SettingsError

log = structlog.get_logger(__name__)

ENCODING = "UTF8"
STARTUP: Mapping[str, str] = {"client_encoding": ENCODING}

# Each is a setting with a default per role or database that would change the meaning, the result or the end of
# statements.
SETTINGS: Mapping[str, str] = {
    # I1: a commit is durable.
    "synchronous_commit": "on",
    # Unqualified names are those of Postgres; names of the archiver are qualified.
    "search_path": "pg_catalog, pg_temp",
    # How values are written and read as text. A time near the end of the calendar must not leave it on the way
    # through another time zone.
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
    # A transaction waits for us between two statements: while a file is written, or another snapshot is read. Each
    # statement has a limit of its own.
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
)  # the latter also in later minors of older ones


def settings_sql(**others: str) -> str:
    """Return the select list that applies the settings to a transaction.

    `others`: more of them, or others for these, each with the SQL of its value.
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
            " character; create one with ENCODING 'UTF8' TEMPLATE template0."
        )


_PID = "SELECT pg_catalog.pg_backend_pid()"


def is_pooled(backend_pid: int, info: psycopg.ConnectionInfo) -> bool:
    """Return whether a pooler is between us and the backend process.

    PgBouncer and its like hand out cancellation keys of their own, with a number that is no process's.
    """
    return backend_pid != info.backend_pid


def check_connection(adapted: Any, record: Any, *, prepared_statements: bool | None) -> None:
    """Examine a new connection of an engine, as its listener for `connect`."""
    driver = adapted.driver_connection if isinstance(adapted, AdaptedConnection) else adapted
    try:
        require_utf8(driver.info)
    except EncodingError:
        adapted.close()
        raise
    cursor = adapted.cursor()
    cursor.execute(_PID)
    (backend_pid,) = cursor.fetchone()
    cursor.close()
    adapted.rollback()
    record.info[_POOLED] = is_pooled(backend_pid, driver.info)
    if record.info[_POOLED] and prepared_statements is None:
        driver.prepare_threshold = None
        _report_pooler()


async def configure(connection: psycopg.AsyncConnection[Any], *, prepared_statements: bool | None) -> None:
    """Apply the settings to a connection that is used without an engine."""
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
    require_utf8(connection.info)
    cursor = await connection.execute(_PID)
    row = await cursor.fetchone()
    await connection.rollback()
    if prepared_statements is None and row is not None and is_pooled(row[0], connection.info):
        connection.prepare_threshold = None
        _report_pooler()


_POOLED = "archiver: behind a pooler"
_reported = False


def is_behind_pooler(connection: Connection) -> bool:
    """Return whether a connection pooler such as PgBouncer is in use."""
    return bool(connection.info.get(_POOLED))


def _report_pooler() -> None:
    """Configure this once in each process that logs."""
    global _reported  # noqa: PLW0603  # of the process, like the log
    if _reported or not structlog.is_configured():
        return
    _reported = True
    log.info(
        "connection pooler detected; prepared statements disabled",
        setting="ARCHIVER_PREPARED_STATEMENTS",
        advice="set it to false, or to true where the pooler keeps prepared statements (PgBouncer 1.22 or newer)",
    )
