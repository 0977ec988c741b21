"""Keep the value of each promoted variable in each session, by which the rollups are also summed.

A value is a number in these rows and in the sums; only `archiver.variable_values` has its text, until no session has
the value any longer. So an erasure removes the text at once, and the sums need not be computed before. A variable
keeps at most `MAX_VALUES` values. Once a session had another one, no further value is kept: it counts as `(other)`,
as values of more than 200 bytes do.

The caller of each function holds `Lock.PUBLISHING`.
"""

from collections.abc import Sequence

from sqlalchemy import Connection

from archiver.database import Lock, RawStatement, as_json, execute, now

MAX_VALUES = 100
MAX_BYTES = 200  # as in analytics.variable_rollups
SESSIONS_PER_PAGE = 200  # few, because the publisher of the feed waits
DELETED_PER_PAGE = 5_000

# No row unless a variable is promoted, so that the publisher then does no work.
_LISTED = """
    listed AS MATERIALIZED (
        SELECT json_array_elements_text($1) AS session_id WHERE EXISTS (SELECT FROM archiver.promoted_variables)
    )
"""
_OF_SUMMARY = """
    FROM listed CROSS JOIN LATERAL (
        SELECT s.variables FROM archiver.summaries s WHERE s.session_id = listed.session_id OFFSET 0
    ) s
"""
_KEEP_VALUES = RawStatement(
    f"""
    WITH {_LISTED}, fresh AS MATERIALIZED (
        SELECT DISTINCT p.id AS variable_id, s.variables ->> p.name AS value
          {_OF_SUMMARY}
          JOIN archiver.promoted_variables p ON p.state <> 'removed' AND NOT p.is_full
         WHERE octet_length(s.variables ->> p.name) <= {MAX_BYTES}
           AND NOT EXISTS (SELECT FROM archiver.variable_values k
                            WHERE k.variable_id = p.id AND k.value = s.variables ->> p.name)
    ), numbered AS MATERIALIZED (
        SELECT variable_id, value,
               row_number() OVER (PARTITION BY variable_id ORDER BY value)
                   + (SELECT count(*) FROM archiver.variable_values k
                       WHERE k.variable_id = fresh.variable_id) AS number
          FROM fresh
    ), added AS (
        INSERT INTO archiver.variable_values (variable_id, value)
        SELECT variable_id, value FROM numbered WHERE number <= $2 ORDER BY variable_id, value
    )
    UPDATE archiver.promoted_variables SET is_full = true
     WHERE id IN (SELECT variable_id FROM numbered WHERE number > $2)
    """  # noqa: S608  # only constants are inserted, never input
)
# Marks the buckets of sessions whose values changed as stale, and returns the values that they no longer have.
_REFRESH = RawStatement(
    f"""
    WITH {_LISTED}, wanted AS MATERIALIZED (
        SELECT listed.session_id, p.id AS variable_id,
               CASE WHEN (s.variables ->> p.name) IS NULL THEN 0 ELSE coalesce(k.id, -1) END AS value_id
          {_OF_SUMMARY}
          JOIN archiver.promoted_variables p ON p.state <> 'removed'
          LEFT JOIN archiver.variable_values k ON k.variable_id = p.id AND k.value = s.variables ->> p.name
    ), earlier AS MATERIALIZED (
        SELECT v.* FROM listed CROSS JOIN LATERAL (
            SELECT * FROM archiver.session_values v WHERE v.session_id = listed.session_id OFFSET 0
        ) v
    ), removed AS (
        DELETE FROM archiver.session_values t
         WHERE t.session_id = ANY (ARRAY(SELECT session_id FROM listed))
           AND (t.session_id, t.variable_id) NOT IN (SELECT session_id, variable_id FROM wanted)
        RETURNING t.session_id
    ), written AS (
        INSERT INTO archiver.session_values AS t (session_id, variable_id, value_id)
        SELECT session_id, variable_id, value_id FROM wanted ORDER BY session_id, variable_id
        ON CONFLICT (session_id, variable_id) DO UPDATE SET value_id = excluded.value_id
         WHERE t.value_id <> excluded.value_id
        RETURNING t.session_id
    ), marked AS (
        INSERT INTO archiver.stale_buckets (bucket, since)
        SELECT DISTINCT c.bucket, CAST($2 AS timestamptz)
          FROM (SELECT session_id FROM removed UNION SELECT session_id FROM written) changed
         CROSS JOIN LATERAL (
              SELECT c.bucket FROM archiver.contributions c WHERE c.session_id = changed.session_id OFFSET 0
         ) c ORDER BY c.bucket
        ON CONFLICT (bucket) DO UPDATE SET id = DEFAULT
    )
    SELECT DISTINCT e.value_id FROM earlier e
     WHERE e.value_id > 0 AND NOT EXISTS (
         SELECT FROM wanted w
          WHERE w.session_id = e.session_id AND w.variable_id = e.variable_id AND w.value_id = e.value_id)
    """  # noqa: S608  # only constants are inserted, never input
)
_DELETE_UNUSED = RawStatement(
    """
    DELETE FROM archiver.variable_values k
     WHERE k.id IN (SELECT CAST(json_array_elements_text($1) AS integer))
       AND NOT EXISTS (SELECT FROM archiver.session_values v
                        WHERE v.variable_id = k.variable_id AND v.value_id = k.id)
    """
)


def refresh(connection: Connection, session_ids: Sequence[str]) -> None:
    """Store the values of these sessions, as in their summaries; delete values that no session has any longer.

    Call it after the summaries and contributions of the sessions were stored or deleted.
    """
    listed = as_json(session_ids)
    _, dropped = execute(connection, _KEEP_VALUES.bind(listed, MAX_VALUES), _REFRESH.bind(listed, now().isoformat()))
    if dropped:
        _DELETE_UNUSED.execute(connection, as_json([row.value_id for row in dropped]))


_SELECT_COLLECTING = RawStatement("SELECT id FROM archiver.promoted_variables WHERE state = 'collecting' LIMIT 1")
_SELECT_PAGE = RawStatement(
    """
    SELECT s.session_id FROM archiver.summaries s
     WHERE s.session_id > (SELECT min(collected_through) FROM archiver.promoted_variables WHERE state = 'collecting')
     ORDER BY s.session_id LIMIT $1
    """
)
# A variable that is further on keeps its place: all sessions up to there have its value.
_ADVANCE = RawStatement(
    """
    UPDATE archiver.promoted_variables
       SET collected_through = greatest(collected_through, $1),
           state = CASE WHEN CAST($2 AS boolean) THEN 'complete' ELSE state END
     WHERE state = 'collecting'
    """
)
_SELECT_REMOVED = RawStatement(
    "SELECT id FROM archiver.promoted_variables WHERE state = 'removed' ORDER BY id LIMIT 1"
)
_DELETE_SESSION_VALUES = RawStatement(
    """
    WITH page AS MATERIALIZED (
        SELECT session_id FROM archiver.session_values WHERE variable_id = $1 LIMIT $2
    )
    DELETE FROM archiver.session_values v USING page WHERE v.session_id = page.session_id AND v.variable_id = $1
    RETURNING 1
    """
)
_DELETE_ROLLUPS = RawStatement(
    """
    WITH page AS MATERIALIZED (
        SELECT bucket, assistant_id, value_id FROM archiver.variable_rollups WHERE variable_id = $1 LIMIT $2
    )
    DELETE FROM archiver.variable_rollups r USING page
     WHERE r.variable_id = $1 AND r.bucket = page.bucket AND r.assistant_id = page.assistant_id
       AND r.value_id = page.value_id
    RETURNING 1
    """
)
_DELETE_VARIABLE = RawStatement("DELETE FROM archiver.promoted_variables WHERE id = $1")


def collect(connection: Connection) -> bool:
    """Store the values of the next sessions for newly promoted variables, or delete rows of a removed one.

    Returns False if nothing is left to do.
    """
    if _SELECT_COLLECTING.execute(connection):
        _collect_page(connection)
        return True
    for variable in _SELECT_REMOVED.execute(connection):
        _delete_page(connection, variable.id)
        return True
    return False


def _collect_page(connection: Connection) -> None:
    page = [row.session_id for row in _SELECT_PAGE.execute(connection, SESSIONS_PER_PAGE)]
    refresh(connection, page)
    _ADVANCE.execute(connection, page[-1] if page else "", len(page) < SESSIONS_PER_PAGE)


def _delete_page(connection: Connection, variable_id: int) -> None:
    Lock.ROLLUPS.take(connection, exclusive=True)  # a transaction that sums might still add rows
    statements = (_DELETE_SESSION_VALUES, _DELETE_ROLLUPS)
    deleted = execute(connection, *(each.bind(variable_id, DELETED_PER_PAGE) for each in statements))
    if not any(deleted):
        _DELETE_VARIABLE.execute(connection, variable_id)
