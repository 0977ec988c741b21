"""Access to Postgres: engines, transactions, statements, locks, and classification of errors.

`session` documents the settings of each transaction and the reasons for them.
"""

from archiver.database import clock, locks, session
from archiver.database.clock import now
from archiver.database.engine import connect, connect_async, conninfo, redirect
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
from archiver.database.session import EncodingError, is_behind_pooler
from archiver.database.statements import BulkInsert, RawStatement, Statement, as_json, defer, execute, flush
from archiver.database.transactions import (
    LOCK_SECONDS,
    STATEMENT_SECONDS,
    limit,
    limit_locks,
    run,
    run_async,
    run_split,
    run_split_async,
    run_until_locked,
    snapshot,
    transaction,
)
from archiver.database.urls import database_url, describe, libpq_variables, what_to_check

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
    "as_json",
    "clock",
    "connect",
    "connect_async",
    "conninfo",
    "database_url",
    "defer",
    "describe",
    "execute",
    "explain",
    "flush",
    "is_behind_pooler",
    "is_cancelled",
    "is_conflict",
    "is_connection_failure",
    "is_data_error",
    "is_lock_timeout",
    "is_unreachable",
    "is_untrusted",
    "libpq_variables",
    "limit",
    "limit_locks",
    "locks",
    "now",
    "redirect",
    "run",
    "run_async",
    "run_split",
    "run_split_async",
    "run_until_locked",
    "session",
    "snapshot",
    "sqlstate",
    "transaction",
    "what_to_check",
]
