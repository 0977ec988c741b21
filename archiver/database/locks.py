"""Locks of the archiver, each an empty table in `archiver_jobs`, and the sessions that block them.

A table lock needs a privilege on the table, and one on its schema to find it by name: `archiver_writer` and the owner
have both, and no other login has either. An advisory lock would require no privilege. A lock ends with its
transaction, so that PgBouncer in transaction mode can be used, and the wait for it is limited by `lock_timeout`.
"""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum

import msgspec
from sqlalchemy import Connection, text

from archiver.database.statements import RawStatement, Statement, execute

# For transactions that look up rows by key: Postgres may have cached a plan that scans tables, made while they were
# empty.
_BY_KEY = RawStatement(
    "SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),"
    " set_config('enable_mergejoin', 'off', true)"
)


def by_key() -> Statement:
    """Return the statement that makes Postgres look up rows by key, in indexes, until the transaction ends."""
    return _BY_KEY.bind()


class Lock(StrEnum):
    """The locks, each named after what it protects; the value is its table, on which operators grant privileges.

    RECORDING: shared by all transactions that record, erase or send content. Exclusive in transactions during which
    nothing else may be recorded: they record or rebuild unassigned turns, which may belong to any session, order an
    erasure, or place a hold.
    SEALING: exclusive, so that one seal at a time is created.
    PUBLISHING: exclusive, so that one page of the change feed at a time is published, with the summaries and
    contributions of its sessions and their values of promoted variables. Also in transactions that delete content
    from these, or that promote a variable.
    INDEXING: exclusive in transactions that write the search table; acquired before PUBLISHING. Erasures acquire
    these two before all other locks, because their holders never wait for the locks of receiving.
    ROLLUPS: exclusive, so that one transaction at a time sums stale buckets.
    """

    RECORDING = "lock_placement"
    SEALING = "lock_sealing"
    PUBLISHING = "lock_publishing"
    INDEXING = "lock_indexing"
    ROLLUPS = "lock_rollups"

    def statements(self, *, exclusive: bool) -> tuple[Statement, ...]:
        """Return the statements that acquire the lock until the end of the transaction; `by_key` is one of them."""
        return (_EXCLUSIVE if exclusive else _SHARED)[self].bind(), by_key()

    def take(self, connection: Connection, *, exclusive: bool) -> None:
        """Acquire the lock until the end of the transaction, in one round trip."""
        execute(connection, *self.statements(exclusive=exclusive))


_SHARED = {each: RawStatement(f"LOCK TABLE archiver_jobs.{each} IN ROW EXCLUSIVE MODE") for each in Lock}
_EXCLUSIVE = {each: RawStatement(f"LOCK TABLE archiver_jobs.{each} IN EXCLUSIVE MODE") for each in Lock}


SCHEMAS = ("archiver", "archiver_search", "analytics", "archiver_jobs")
# Shorter waits are normal.
MIN_WAIT_SECONDS = 2.0


class LockHolder(msgspec.Struct, frozen=True):
    """A session that blocks others on the archiver's tables.

    `pid` 0: a prepared transaction. `since`: when its transaction began; None if Postgres does not show that to
    this user. `relations`: the tables that others wait for. `waiting`: how many sessions are waiting, the first since
    `waiting_since`.
    """

    pid: int
    user: str | None
    application: str | None
    since: datetime | None
    relations: Sequence[str]
    waiting: int
    waiting_since: datetime

    @property
    def advice(self) -> str:
        """Return how to end the wait."""
        if not self.pid:
            return "End it: COMMIT PREPARED or ROLLBACK PREPARED."
        return f"End that session's transaction; as an administrator: SELECT pg_terminate_backend({self.pid});"

    def __str__(self) -> str:
        held = f"since {_shown(self.since)}" if self.since else f"at least since {_shown(self.waiting_since)}"
        who = (
            f"process {self.pid} (user {self.user or 'unknown'}, application {self.application or 'unnamed'})"
            if self.pid
            else "a prepared transaction (see pg_prepared_xacts)"
        )
        what = ", ".join(self.relations) or "a row"
        return f"{who} holds a lock on {what} {held}; {self.waiting} waiting since {_shown(self.waiting_since)}"


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


# A session that queues behind a waiting session is blocked by the holder of the lock, not by that session.
# Postgres shows locks, users and applications of all sessions to all users, but not when a transaction began.
_HOLDERS = text(
    """
    WITH locks AS MATERIALIZED (
        SELECT pid, granted, waitstart, relation FROM pg_locks
         WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database()) OR NOT granted
    ), tables AS MATERIALIZED (
        SELECT c.oid, n.nspname || '.' || c.relname AS name
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY (:schemas)
    ), waiting AS MATERIALIZED (
        SELECT w.pid, w.waitstart, t.name
          FROM locks w LEFT JOIN tables t ON t.oid = w.relation
         WHERE NOT w.granted AND w.waitstart <= clock_timestamp() - make_interval(secs => :seconds)
           AND (t.oid IS NOT NULL
                OR w.pid IN (SELECT l.pid FROM locks l JOIN tables t ON t.oid = l.relation WHERE l.granted))
    ), blocking AS MATERIALIZED (
        SELECT DISTINCT w.pid AS waiter, w.waitstart, w.name, b.pid
          FROM waiting w CROSS JOIN LATERAL unnest(pg_blocking_pids(w.pid)) AS b (pid)
         WHERE b.pid NOT IN (SELECT pid FROM waiting)
    )
    SELECT b.pid, a.usename, a.application_name, a.xact_start,
           array_remove(array_agg(DISTINCT b.name), NULL) AS relations,
           count(DISTINCT b.waiter) AS waiting, min(b.waitstart) AS waiting_since
      FROM blocking b LEFT JOIN pg_stat_activity a ON a.pid = b.pid
     GROUP BY b.pid, a.usename, a.application_name, a.xact_start
     ORDER BY min(b.waitstart), b.pid
    """
).bindparams(schemas=list(SCHEMAS))


_USAGE = text(
    """
    WITH room AS (
        SELECT current_setting('max_locks_per_transaction')::float8
               * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int) AS most
    ), held AS MATERIALIZED (
        SELECT pid, count(*) AS locks FROM pg_locks WHERE NOT fastpath GROUP BY pid
    )
    SELECT (SELECT coalesce(sum(locks), 0) FROM held) / most AS usage, h.pid, h.locks,
           a.usename, a.application_name
      FROM room LEFT JOIN (SELECT * FROM held ORDER BY locks DESC LIMIT 1) AS h ON true
      LEFT JOIN pg_stat_activity a ON a.pid = h.pid
    """
)


class LockUsage(msgspec.Struct, frozen=True):
    """The share of the Postgres lock table in use (1: full), and the session that holds the most locks."""

    usage: float
    pid: int | None
    locks: int | None
    user: str | None
    application: str | None


def select_usage(connection: Connection) -> LockUsage:
    """Return the usage of the lock table, which all databases of the server share."""
    return LockUsage(*connection.execute(_USAGE).one())


def select_holders(connection: Connection, seconds: float = MIN_WAIT_SECONDS) -> list[LockHolder]:
    """Return sessions that others have waited for at least `seconds`, longest wait first."""
    return [LockHolder(*row) for row in connection.execute(_HOLDERS, {"seconds": seconds})]
