"""Keep the rollups: the contributions of each session per 15 minutes, and their sums per bucket and UTC day.

No sum is ever incremented or decremented. The publisher of the feed recomputes all contributions of each changed
session and marks the buckets whose contributions changed as stale; `sum_stale` sums stale buckets again. The views
compute missing contributions and sums themselves, so that they are exact at any time. Unassigned turns have no
session and no contributions: the views always compute theirs.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec
from sqlalchemy import Connection

from archiver.database import Lock, RawStatement, as_json, execute, now, privileges

BUCKETS_PER_PAGE = 200
SESSIONS_PER_PAGE = 200  # few, because the publisher of the feed waits

_COUNTS = (
    "conversations",
    "conversations_started",
    "chats",
    "messages",
    "cost",
    "deleted_chats",
    "repaired_messages",
)
_FIGURES = (*_COUNTS, "latency")
_FIGURES_BY_VALUE = _FIGURES[1:]
_VALUE_KEYS = ("variable_id", "bucket", "assistant_id", "value_id")
_STEPS = range(1, 14)  # of `latency`
_SUM_OF_COUNTS = ", ".join(f"sum({name}) AS {name}" for name in _COUNTS)
_SUM_BY_VALUE = ", ".join(f"sum({name}) AS {name}" for name in _COUNTS[1:])
_SUM_OF_LATENCY = f"ARRAY[{', '.join(f'sum(latency[{step}])' for step in _STEPS)}] AS latency"


def _replaced(table: str, keys: Sequence[str], figures: Sequence[str], scope: str) -> str:
    """Return SQL of CTEs that replace rows of a table whose first key is in `scope` with the rows of `wanted`.

    They write only rows that differ; `removed` and `written` return the buckets or days of these rows.
    """
    of_key, of_scope = ", ".join(keys), keys[0]
    returned = "bucket" if "bucket" in keys else of_scope
    names = ", ".join(f"t.{name}" for name in keys)
    return f"""
    removed AS (
        DELETE FROM archiver.{table} t
         WHERE t.{of_scope} = ANY (ARRAY(SELECT {of_scope} FROM {scope}))
           AND ({names}) NOT IN (SELECT {of_key} FROM wanted)
        RETURNING t.{returned}
    ), {_written(table, keys, figures, returned)}
    """  # noqa: S608  # only constant names are inserted, never input


def _written(table: str, keys: Sequence[str], figures: Sequence[str], returned: str) -> str:
    """Return SQL of a CTE that writes the rows of `wanted` that differ from those of a table."""
    of_key = ", ".join(keys)
    return f"""
    written AS (
        INSERT INTO archiver.{table} AS t ({of_key}, {", ".join(figures)})
        SELECT {of_key}, {", ".join(figures)} FROM wanted ORDER BY {of_key}
        ON CONFLICT ({of_key}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in figures)}
         WHERE ({", ".join(f"t.{name}" for name in figures)})
               IS DISTINCT FROM ({", ".join(f"excluded.{name}" for name in figures)})
        RETURNING t.{returned}
    )
    """  # noqa: S608  # only constant names are inserted, never input


_REFRESH = RawStatement(
    f"""
    WITH listed AS MATERIALIZED (
        SELECT json_array_elements_text($1) AS session_id
    ), wanted AS MATERIALIZED (
        SELECT c.* FROM listed CROSS JOIN LATERAL (
            SELECT * FROM archiver.contributed c WHERE c.session_id = listed.session_id OFFSET 0
        ) c
    ), {_replaced("contributions", ("session_id", "bucket", "assistant_id"), _FIGURES, "listed")}, contributed AS (
        DELETE FROM archiver.uncontributed WHERE session_id = ANY (ARRAY(SELECT session_id FROM listed))
    )
    INSERT INTO archiver.stale_buckets (bucket, since)
    SELECT bucket, CAST($2 AS timestamptz)
      FROM (SELECT bucket FROM removed UNION SELECT bucket FROM written) changed ORDER BY bucket
    ON CONFLICT (bucket) DO UPDATE SET id = DEFAULT
    """  # noqa: S608  # only constant names are inserted, never input
)


def refresh(connection: Connection, session_ids: Sequence[str]) -> None:
    """Compute the contributions of these sessions from their turns, and mark the changed buckets as stale.

    The caller holds `Lock.PUBLISHING`.
    """
    _REFRESH.execute(connection, as_json(session_ids), now().isoformat())


# The next attempt follows after a pause as long as the session has been failing: at least a minute, at most an hour.
_SET_ASIDE = RawStatement(
    """
    WITH removed AS (
        DELETE FROM archiver.contributions WHERE session_id = $1 RETURNING bucket
    ), recorded AS (
        INSERT INTO archiver.uncontributed AS known (session_id, failed_at, retry_at, reason)
        VALUES ($1, CAST($2 AS timestamptz), CAST($2 AS timestamptz) + interval '1 minute', $3)
        ON CONFLICT (session_id) DO UPDATE
           SET failed_at = coalesce(known.failed_at, excluded.failed_at), reason = excluded.reason,
               retry_at = excluded.failed_at
                   + greatest(least(excluded.failed_at - coalesce(known.failed_at, excluded.failed_at),
                                    interval '1 hour'), interval '1 minute')
    )
    INSERT INTO archiver.stale_buckets (bucket, since)
    SELECT DISTINCT bucket, CAST($2 AS timestamptz) FROM removed ORDER BY bucket
    ON CONFLICT (bucket) DO UPDATE SET id = DEFAULT
    """
)


def set_aside(connection: Connection, session_id: str, reason: str) -> None:
    """Delete the contributions of a session, so that the views compute them, and schedule the next attempt.

    The caller holds `Lock.PUBLISHING`.
    """
    _SET_ASIDE.execute(connection, session_id, now().isoformat(), reason)


_SELECT_SET_ASIDE = RawStatement(
    """
    SELECT session_id FROM archiver.uncontributed
     WHERE session_id IN (SELECT json_array_elements_text($1)) AND retry_at > CAST($2 AS timestamptz)
    """
)


def select_set_aside(connection: Connection, session_ids: Collection[str]) -> set[str]:
    """Return which of these sessions are set aside and have no attempt due."""
    rows = _SELECT_SET_ASIDE.execute(connection, as_json(sorted(session_ids)), now().isoformat())
    return {row.session_id for row in rows}


_SELECT_UNCONTRIBUTED = RawStatement(
    """
    SELECT session_id FROM archiver.uncontributed
     WHERE retry_at IS NULL OR retry_at <= CAST($2 AS timestamptz) ORDER BY session_id LIMIT $1
    """
)


def select_uncontributed(connection: Connection) -> list[str]:
    """Return the next sessions without contributions, except those that are set aside and have no attempt due."""
    return [row.session_id for row in _SELECT_UNCONTRIBUTED.execute(connection, SESSIONS_PER_PAGE, now().isoformat())]


class StaleBucket(msgspec.Struct, frozen=True):
    """A bucket whose contributions changed since they were summed, and the id of its latest change."""

    bucket: datetime
    id: int


_SELECT_STALE = RawStatement("SELECT bucket, id FROM archiver.stale_buckets ORDER BY bucket LIMIT $1")


def select_stale(connection: Connection) -> list[StaleBucket]:
    """Return the earliest stale buckets."""
    return [StaleBucket(row.bucket, row.id) for row in _SELECT_STALE.execute(connection, BUCKETS_PER_PAGE)]


_MARKS = """
    marks AS MATERIALIZED (
        SELECT bucket, id FROM json_to_recordset($1) AS m (bucket timestamptz, id bigint)
    )
"""
_SUM_BUCKETS = RawStatement(
    f"""
    WITH {_MARKS}, wanted AS MATERIALIZED (
        SELECT bucket, assistant_id, {_SUM_OF_COUNTS}, {_SUM_OF_LATENCY} FROM archiver.contributions
         WHERE bucket = ANY (ARRAY(SELECT bucket FROM marks)) GROUP BY bucket, assistant_id
    ), {_replaced("rollups", ("bucket", "assistant_id"), _FIGURES, "marks")}
    SELECT
    """  # noqa: S608  # only constant names are inserted, never input
)
_SUM_DAYS = RawStatement(
    f"""
    WITH {_MARKS}, listed AS MATERIALIZED (
        SELECT DISTINCT CAST(bucket AT TIME ZONE 'UTC' AS date) AS day FROM marks
    ), wanted AS MATERIALIZED (
        SELECT l.day, r.assistant_id, {_SUM_OF_COUNTS}
          FROM listed l CROSS JOIN LATERAL (
              SELECT * FROM archiver.rollups r
               WHERE r.bucket >= CAST(l.day AS timestamp) AT TIME ZONE 'UTC'
                 AND r.bucket < CAST(l.day + 1 AS timestamp) AT TIME ZONE 'UTC' OFFSET 0
          ) r
         GROUP BY l.day, r.assistant_id
    ), {_replaced("days", ("day", "assistant_id"), _COUNTS, "listed")}
    SELECT
    """  # noqa: S608  # only constant names are inserted, never input
)
_SUM_VALUES = RawStatement(
    f"""
    WITH {_MARKS}, variables AS MATERIALIZED (
        SELECT id FROM archiver.promoted_variables
    ), wanted AS MATERIALIZED (
        SELECT p.id AS variable_id, c.bucket, c.assistant_id, coalesce(v.value_id, 0) AS value_id,
               {_SUM_BY_VALUE}, {_SUM_OF_LATENCY}
          FROM archiver.promoted_variables p CROSS JOIN archiver.contributions c
          LEFT JOIN archiver.session_values v ON v.session_id = c.session_id AND v.variable_id = p.id
         WHERE p.state <> 'removed' AND c.bucket = ANY (ARRAY(SELECT bucket FROM marks))
         GROUP BY p.id, c.bucket, c.assistant_id, coalesce(v.value_id, 0)
    ), removed AS (
        DELETE FROM archiver.variable_rollups t
         WHERE t.variable_id = ANY (ARRAY(SELECT id FROM variables))
           AND t.bucket = ANY (ARRAY(SELECT bucket FROM marks))
           AND ({", ".join(f"t.{name}" for name in _VALUE_KEYS)}) NOT IN (SELECT {", ".join(_VALUE_KEYS)} FROM wanted)
    ), {_written("variable_rollups", _VALUE_KEYS, _FIGURES_BY_VALUE, "bucket")}
    SELECT
    """  # noqa: S608  # only constant names are inserted, never input
)
# The last statement, because the publisher waits for its locks; it locks in the order of the publisher, so that there
# is no deadlock. A bucket that changed again since it was selected has another id and stays stale.
_CLEAR = RawStatement(
    f"""
    WITH {_MARKS}, summed AS MATERIALIZED (
        SELECT s.bucket FROM marks m JOIN archiver.stale_buckets s ON s.bucket = m.bucket AND s.id = m.id
         ORDER BY s.bucket FOR UPDATE OF s
    )
    DELETE FROM archiver.stale_buckets WHERE bucket IN (SELECT bucket FROM summed)
    """  # noqa: S608  # only constant names are inserted, never input
)


def sum_stale(connection: Connection, stale: Sequence[StaleBucket]) -> int:
    """Sum the contributions to these buckets and to their UTC days; return the number of buckets."""
    Lock.ROLLUPS.take(connection, exclusive=True)
    marks = as_json(stale)
    execute(connection, *(each.bind(marks) for each in (_SUM_BUCKETS, _SUM_DAYS, _SUM_VALUES, _CLEAR)))
    return len(stale)


def may_select_failing(connection: Connection) -> bool:
    """Return whether this user may read which sessions were set aside; False also if the schema is older."""
    return privileges.may_select(connection, "uncontributed", "failed_at")


class Failing(msgspec.Struct, frozen=True):
    """The number of sessions that are set aside, and the session that has failed for the longest time."""

    count: int
    session_id: str
    since: datetime
    reason: str


_SELECT_FAILING = RawStatement(
    """
    SELECT count(*) OVER () AS count, session_id, failed_at, reason FROM archiver.uncontributed
     WHERE failed_at IS NOT NULL ORDER BY failed_at, session_id LIMIT 1
    """
)


def select_failing(connection: Connection) -> Failing | None:
    """Return how many sessions are set aside, and since when and why; None if no session is."""
    return next((Failing(*row) for row in _SELECT_FAILING.execute(connection)), None)
