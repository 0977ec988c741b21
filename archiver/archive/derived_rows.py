"""Keep the derived rows of sessions up to date: summaries, contributions to the rollups, and values of variables.

The caller holds `Lock.PUBLISHING`. A session whose rows Postgres rejects, or cannot compute in time, is set aside:
until a later attempt succeeds, it has no derived rows, and the views compute its figures. So it delays neither the
feed nor an erasure.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from archiver import telemetry
from archiver.archive import rollups, summaries, variable_values
from archiver.database import explain, is_cancelled, is_data_error

SESSIONS_PER_STATEMENT = 50  # so that a statement is fast even if all of them are long

_warning = telemetry.Recurring("session set aside; its derived rows cannot be stored")


def refresh(connection: Connection, cursors: Mapping[str, int]) -> None:
    """Recompute the rows of these sessions, each with the cursor of its last change.

    Skips a session that is set aside until its next attempt is due.
    """
    waiting = rollups.select_set_aside(connection, cursors)
    sessions = [each for each in sorted(cursors) if each not in waiting]
    for start in range(0, len(sessions), SESSIONS_PER_STATEMENT):
        page = sessions[start : start + SESSIONS_PER_STATEMENT]
        if _store(connection, page, cursors) is not None:
            for each in page:
                if (fault := _store(connection, [each], cursors)) is not None:
                    _set_aside(connection, each, fault)


def _store(connection: Connection, session_ids: Sequence[str], cursors: Mapping[str, int]) -> DBAPIError | None:
    """Store the rows of these sessions; if those of one cannot be stored, store none and return the error."""
    try:
        with connection.begin_nested():
            summaries.refresh(connection, session_ids, cursors)
            rollups.refresh(connection, session_ids)
            variable_values.refresh(connection, session_ids)
    except DBAPIError as error:
        if not is_cancelled(error) and not is_data_error(error):
            raise
        return error
    return None


def _set_aside(connection: Connection, session_id: str, fault: DBAPIError) -> None:
    """Delete the rows of a session, which are outdated, and schedule the next attempt."""
    telemetry.sessions_set_aside.inc()
    _warning.warn(session_id=session_id, reason=explain(fault))
    summaries.delete(connection, session_id)
    rollups.set_aside(connection, session_id, explain(fault))
    variable_values.refresh(connection, [session_id])


def add_missing(connection: Connection, cursor: int) -> int:
    """Store the rows of the next sessions that have none, with this cursor; return the number of these sessions."""
    missing = rollups.select_uncontributed(connection)
    refresh(connection, dict.fromkeys(missing, cursor))
    return len(missing)
