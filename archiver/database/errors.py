"""Classify database errors."""

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, StatementError


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of the error; None if it is not from Postgres."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return original.sqlstate if isinstance(original, psycopg.Error) else None


def as_of_engine(connection: Connection, statement: str, error: psycopg.Error) -> StatementError:
    """Convert a driver error to the engine's error class; a lost connection is invalidated."""
    is_lost = connection.connection.driver_connection.closed  # type: ignore[union-attr]  # there is one until then
    if is_lost:
        connection.invalidate(error)
    return DBAPIError.instance(
        statement, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=is_lost
    )


def explain(error: BaseException) -> str:
    """Return why Postgres was unreachable, or the SQLSTATE of its error; never message content."""
    state = sqlstate(error)
    original = error.orig if isinstance(error, DBAPIError) else error
    if state is None and isinstance(original, psycopg.OperationalError):
        return " ".join(str(original).split())
    if state in _MEANINGS:
        return f"SQLSTATE {state}: {_MEANINGS[state]}"
    return f"SQLSTATE {state or 'unknown'}"


NO_ROOM_FOR_LOCKS = (
    "Postgres has no room for more locks: raise max_locks_per_transaction in postgresql.conf, or end the session that"
    " holds the most: SELECT pid, count(*) FROM pg_locks GROUP BY pid ORDER BY 2 DESC LIMIT 1;"
)
_MEANINGS = {
    "53200": f"out of memory. If it is shared memory: {NO_ROOM_FOR_LOCKS}",
    "55P03": "another session holds a lock that is needed; `archiver doctor` names it",
}


CERTIFICATE_ADVICE = (
    "The server's certificate is not accepted: if it has expired, renew it and reload Postgres; otherwise set"
    " sslrootcert in DATABASE_URL to the certificate of the authority that signed it, and write the host as in the"
    " server's certificate."
)


def is_untrusted(error: BaseException) -> bool:
    """Return whether the server's certificate was rejected."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.OperationalError) and "certificate" in str(original)


def is_connection_failure(error: BaseException) -> bool:
    """Return whether connecting failed: unknown host, wrong password, rejected certificate or stopped server."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.OperationalError) and original.sqlstate is None


# English messages of a server that is starting, stopping or full; in other languages they count as a refusal.
_NOT_YET = (
    "starting up",
    "shutting down",
    "recovery",
    "not accepting",
    "not yet accepting",
    "too many",
    "remaining",
    "out of shared memory",
)


def is_unreachable(error: BaseException) -> bool:
    """Return whether Postgres is temporarily unreachable; False if it rejects the configuration."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(original, psycopg.OperationalError) or original.sqlstate is not None:
        return False
    message = str(original)
    if is_untrusted(error) or "does not support SSL" in message:
        return False
    return "FATAL: " not in message or any(words in message for words in _NOT_YET)


# Classes of https://www.postgresql.org/docs/current/errcodes-appendix.html for errors that the data itself causes:
# cardinality violation, data exception, integrity violation, check option violation, program limit exceeded, and
# exceptions raised by triggers.
_DATA_CLASSES = frozenset({"21", "22", "23", "44", "54", "P0"})
_CONFLICTS = frozenset({"40001", "40P01"})
_LOCK_NOT_AVAILABLE, _QUERY_CANCELED = "55P03", "57014"


def is_data_error(error: BaseException) -> bool:
    """Return whether the rows themselves can never be stored."""
    state = sqlstate(error)
    if state is not None:
        return state[:2] in _DATA_CLASSES
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.DataError | UnicodeError)


def is_conflict(error: BaseException) -> bool:
    """Return whether a concurrent transaction caused the error, so that a retry may succeed."""
    return sqlstate(error) in _CONFLICTS


def is_lock_timeout(error: BaseException) -> bool:
    """Return whether a lock was not granted within `lock_timeout`."""
    return sqlstate(error) == _LOCK_NOT_AVAILABLE


def is_cancelled(error: BaseException) -> bool:
    """Return whether a statement was cancelled, usually because it exceeded `statement_timeout`."""
    return sqlstate(error) == _QUERY_CANCELED
