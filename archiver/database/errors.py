"""What an error of the database means for whoever asked."""

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, StatementError


def sqlstate(error: BaseException) -> str | None:
    """The five characters that tell what Postgres refused; None where the error is not Postgres's."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return original.sqlstate if isinstance(original, psycopg.Error) else None


def as_of_engine(connection: Connection, statement: str, error: psycopg.Error) -> StatementError:
    """The driver's error as that of a statement of SQLAlchemy's engine; a connection that is lost is given up."""
    is_lost = connection.connection.driver_connection.closed  # type: ignore[union-attr]  # there is one until then
    if is_lost:
        connection.invalidate(error)
    return DBAPIError.instance(
        statement, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=is_lost
    )


def explain(error: BaseException) -> str:
    """Why Postgres could not be reached, in the driver's words, or what SQLSTATE it refused with; no content."""
    state = sqlstate(error)
    original = error.orig if isinstance(error, DBAPIError) else error
    if state is None and isinstance(original, psycopg.OperationalError):
        return " ".join(str(original).split())
    if state in _MEANINGS:
        return f"SQLSTATE {state}: {_MEANINGS[state]}"
    return f"SQLSTATE {state or 'unknown'}"


NO_ROOM_FOR_LOCKS = (
    "Postgres has no room for more locks: raise max_locks_per_transaction in postgresql.conf, or end the session that"
    " holds most: SELECT pid, count(*) FROM pg_locks GROUP BY pid ORDER BY 2 DESC LIMIT 1;"
)
_MEANINGS = {
    "53200": f"out of memory. If of shared memory: {NO_ROOM_FOR_LOCKS}",
    "55P03": "another session holds a lock that is needed; archiver doctor names it",
}


CERTIFICATE_ADVICE = (
    "The server's certificate is not accepted: if it has expired, renew it and reload Postgres; otherwise let"
    " sslrootcert in DATABASE_URL name the authority that signed it, and write the host as the certificate has it."
)


def is_untrusted(error: BaseException) -> bool:
    """Whether it is a certificate for which no connection came about."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.OperationalError) and "certificate" in str(original)


def is_not_connected(error: BaseException) -> bool:
    """Whether no connection came about, for whatever reason: host, password, certificate, a server that is down."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.OperationalError) and original.sqlstate is None


# What a server says that will let us in before long; in other languages it is taken for a refusal.
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
_LOCK_NOT_AVAILABLE, _QUERY_CANCELED = "55P03", "57014"


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


def is_lock_timeout(error: BaseException) -> bool:
    """Whether a lock was waited for as long as the transaction may (`lock_timeout`)."""
    return sqlstate(error) == _LOCK_NOT_AVAILABLE


def is_cancelled(error: BaseException) -> bool:
    """Whether a statement took as long as it may (`statement_timeout`)."""
    return sqlstate(error) == _QUERY_CANCELED
