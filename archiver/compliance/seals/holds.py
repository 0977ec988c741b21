"""Replay the audit log and check holds, erasures and removals against it.

Only a hold whose sole criterion is a session id can be checked afterwards: the assistant, variables and turn times of
a session are content and were erased with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, select, text

from archiver.compliance import legal_holds
from archiver.compliance.legal_holds import LoggedHold
from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.findings import Finding
from archiver.database import tables

# Rows of older versions have no Postgres time: they count if their audit entry follows the hold and the hold was
# never released. When a delivery assigns an erased turn to a held session, an erasure is recorded for that session;
# this is not a fault as long as the content exists.
_ERASED = text(
    """
    SELECT x.id FROM archiver.erasures x
     WHERE x.session_id = CAST(:session_id AS text)
       AND CASE WHEN x.recorded_at IS NULL THEN x.act_id > :act_id AND CAST(:released_at AS timestamptz) IS NULL
                ELSE x.recorded_at >= :placed_at
                     AND (CAST(:released_at AS timestamptz) IS NULL OR x.recorded_at < :released_at) END
       AND NOT (
           x.chat_id <> ''
           AND EXISTS (SELECT FROM archiver.erasures u
                        WHERE u.session_id = '' AND u.chat_id = x.chat_id AND u.act_id = x.act_id AND u.id < x.id)
           AND (CAST(:released_at AS timestamptz) IS NOT NULL
                OR NOT EXISTS (SELECT FROM archiver.events f
                                WHERE f.session_id = x.session_id AND f.body IS NULL AND f.runs IS NULL
                                  AND (f.chat_id = x.chat_id OR f.source = 'history'))
                OR EXISTS (SELECT FROM archiver.erasures y
                            WHERE y.session_id = x.session_id AND y.act_id <> x.act_id AND y.id < x.id))
       )
     ORDER BY x.id
    """
)
_REMOVED = text(
    """
    SELECT r.id FROM archiver.removals r
     WHERE r.session_id = CAST(:session_id AS text) AND r.recorded_at >= :placed_at
       AND (CAST(:released_at AS timestamptz) IS NULL OR r.recorded_at < :released_at)
     ORDER BY r.id
    """
)


def check_holds(connection: Connection, _: Seal) -> Iterator[Finding]:
    """Yield a finding for each hold, erasure, removal or release that contradicts the audit log."""
    placed, unknown = legal_holds.select_placed(connection)
    for act_id in unknown:
        yield Finding("acts", act_id, "not_placed")
    yield from _compare_rows(connection, placed)
    for hold in placed.values():
        if not _names_a_session_alone(hold):
            continue
        fields: dict[str, Any] = {"session_id": hold.criteria.session_id, "act_id": hold.act_id}
        fields |= {"placed_at": hold.placed_at, "released_at": hold.released_at}
        for table, query in (("erasures", _ERASED), ("removals", _REMOVED)):
            for row_id in connection.scalars(query, fields):
                yield Finding(table, row_id, "held", hold=hold.id)


def _names_a_session_alone(hold: LoggedHold) -> bool:
    criteria = hold.criteria
    others = (criteria.assistant_id, criteria.variable, criteria.since, criteria.until)
    return criteria.session_id is not None and all(each is None for each in others)


def _compare_rows(connection: Connection, placed: Mapping[int, LoggedHold]) -> Iterator[Finding]:
    rows = {row["id"]: dict(row) for row in connection.execute(select(tables.holds)).mappings()}
    for hold_id in sorted(rows.keys() | placed.keys()):
        fault = _fault(placed.get(hold_id), rows.get(hold_id))
        if fault is not None:
            yield Finding("holds", hold_id, fault)


def _fault(hold: LoggedHold | None, row: Mapping[str, Any] | None) -> str | None:
    if hold is None:
        return "without_act"
    if row is None:
        return "missing"
    if row["released_at"] is not None and hold.release_id is None:
        return "released_without_act"
    if row["released_at"] is None and hold.release_id is not None:
        return "not_released"
    is_same = legal_holds.is_same(hold, row) and (row["author"], row["reason"]) == (hold.author, hold.reason or "")
    return None if is_same else "differs_from_log"
