"""Lease sessions and set the due times of their readings, in columns of `sessions`.

A lease is acquired by compare-and-set, so that two workers never read one session at the same time. It expires unless
it is renewed, so that nothing is lost if a worker is killed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, exists, func, not_, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from archiver.archive import UNASSIGNED
from archiver.archive.coverage import ERASED, NOT_SHOWN, Timing
from archiver.database import tables
from archiver.database.clock import TOLERANCE
from archiver.events import responses

_sessions = tables.sessions.c
_AMONG = _sessions.session_id == func.any(bindparam("session_ids", type_=ARRAY(TEXT)))
_HAS_NEWS = _sessions.last_event_at > _sessions.read_at
# The fact of the last reading, new or repeated.
_IS_UNREADABLE = exists().where(
    tables.events.c.session_id == _sessions.session_id,
    tables.events.c.type == responses.UNREADABLE,
    tables.events.c.last_received_at == _sessions.read_at,
)
# The URL or the time of the reading may have been wrong.
_WAS_NOT_SHOWN = or_(_sessions.reason.in_(NOT_SHOWN), _sessions.reconciled_at.is_(None))
LEASE = timedelta(seconds=60)  # renewed by its holder
# A lease that ends later than possible was written while a clock was ahead, and is ignored.
_FREE = or_(
    _sessions.leased_until.is_(None),
    _sessions.leased_until < bindparam("now"),
    _sessions.leased_until > bindparam("beyond"),
)


class SessionStatus(msgspec.Struct, frozen=True, gc=False):
    """The coverage of a session, the number of messages recovered from history, and the time of its last event."""

    session_id: str
    coverage: str
    reason: str
    repaired_messages: int
    last_event_at: datetime


_STATUS_COLUMNS = (
    _sessions.session_id,
    _sessions.coverage,
    _sessions.reason,
    _sessions.repaired_messages,
    _sessions.last_event_at,
)

_DUE = (
    select(_sessions.session_id, _sessions.read_by)
    .where(_sessions.reconcile_at <= bindparam("now"), _FREE)
    .order_by(_sessions.read_by, _sessions.session_id)
    .limit(bindparam("most"))
)
_DUE_FIRST = _DUE.where(_sessions.failing_since.is_(None))
_DUE_RETRY = _DUE.where(_sessions.failing_since.is_not(None))
_CLAIM_LISTED = (
    update(tables.sessions)
    .where(_AMONG, _sessions.reconcile_at <= bindparam("now"))
    .values(reconcile_at=bindparam("until"))
    .returning(_sessions.session_id)
)
_CLAIM = (
    update(tables.sessions).where(_AMONG, _FREE).values(leased_until=bindparam("until")).returning(*_STATUS_COLUMNS)
)
_CLAIM_DUE = _CLAIM.where(_sessions.reconcile_at == bindparam("due_at"))
# Only this process's lease: after a pause of this process, another may have leased the session.
_OWN = _sessions.leased_until == bindparam("lease")
_RELEASE = update(tables.sessions).where(_AMONG, _OWN).values(leased_until=None)
_RENEW = (
    update(tables.sessions)
    .where(_AMONG, _OWN)
    .values(leased_until=bindparam("until"))
    .returning(_sessions.session_id)
)
_POSTPONE = (
    update(tables.sessions)
    .where(_sessions.session_id == bindparam("of_session"), _OWN)
    .values(
        leased_until=None,
        # A session erased during the reading is never due.
        reconcile_at=case((_sessions.reason == ERASED, None), else_=bindparam("until")),
        failing_since=bindparam("since"),
    )
)


Due = tuple[str, datetime | None]  # a session, and the time by which it must be read


def select_due(connection: Connection, now: datetime, limit: int, *, is_retry: bool = False) -> list[Due]:
    """Return sessions with a due reading, in the order in which they expire at CallHQ.

    `is_retry`: only those whose previous reading failed; otherwise only the others.
    """
    rows = connection.execute(_DUE_RETRY if is_retry else _DUE_FIRST, _at(now) | {"most": limit})
    return [(row.session_id, row.read_by) for row in rows]


def claim_listed(connection: Connection, due: Sequence[Due], now: datetime, until: datetime) -> list[Due]:
    """Claim the sessions that are still due, and return them; unless read, they are due again at `until`."""
    claimed = {"session_ids": sorted(session_id for session_id, _ in due), "now": now, "until": until}
    claimed_ids = set(connection.scalars(_CLAIM_LISTED, claimed)) if due else set()
    return [(session_id, read_by) for session_id, read_by in due if session_id in claimed_ids]


def _at(now: datetime) -> dict[str, Any]:
    """Return the parameters that decide whether a lease is free."""
    return {"now": now, "beyond": now + LEASE + TOLERANCE}


def claim(
    connection: Connection,
    session_ids: Sequence[str],
    now: datetime,
    until: datetime,
    due_at: datetime | None = None,
) -> dict[str, SessionStatus]:
    """Lease the sessions that are free, and return their status.

    `due_at`: only sessions whose next reading is due exactly then, as claimed.
    """
    claimed = {"session_ids": sorted(session_ids), "until": until} | _at(now)
    if due_at is None:
        rows = connection.execute(_CLAIM, claimed)
    else:
        rows = connection.execute(_CLAIM_DUE, claimed | {"due_at": due_at})
    return {row.session_id: SessionStatus(*row) for row in rows}


def release(connection: Connection, leased: Mapping[str, datetime]) -> None:
    """Release leases, each identified by its session and its end."""
    for lease, session_ids in _by_lease(leased).items():
        connection.execute(_RELEASE, {"session_ids": session_ids, "lease": lease})


def renew(connection: Connection, leased: Mapping[str, datetime], until: datetime) -> set[str]:
    """Renew leases; return the sessions whose lease was not taken by another worker."""
    renewed: set[str] = set()
    for lease, session_ids in _by_lease(leased).items():
        renewed |= set(connection.scalars(_RENEW, {"session_ids": session_ids, "lease": lease, "until": until}))
    return renewed


def _by_lease(leased: Mapping[str, datetime]) -> dict[datetime, list[str]]:
    sessions: dict[datetime, list[str]] = defaultdict(list)
    for session_id in sorted(leased):
        sessions[leased[session_id]].append(session_id)
    return sessions


def postpone(
    connection: Connection, session_id: str, lease: datetime, *, until: datetime, failing_since: datetime | None
) -> None:
    """Release the lease after a failed reading, and schedule the next reading."""
    postponed = {"of_session": session_id, "lease": lease, "until": until, "since": failing_since}
    connection.execute(_POSTPONE, postponed)


def make_due(connection: Connection, session_ids: Sequence[str], claimed_until: datetime, now: datetime) -> None:
    """Make sessions due now that were claimed until `claimed_until` and not read since."""
    updated = update(tables.sessions).where(_AMONG, _sessions.reconcile_at == claimed_until).values(reconcile_at=now)
    connection.execute(updated, {"session_ids": sorted(session_ids)})


def make_due_beyond(connection: Connection, now: datetime, beyond: datetime) -> int:
    """Make readings due now that are due after `beyond`, which no reading can be; return their number."""
    return connection.execute(
        update(tables.sessions).where(_sessions.reconcile_at > beyond).values(reconcile_at=now)
    ).rowcount


def select_statuses(connection: Connection, session_ids: Sequence[str]) -> dict[str, SessionStatus]:
    """Return the status of each of these sessions; unknown sessions are omitted."""
    rows = connection.execute(select(*_STATUS_COLUMNS).where(_AMONG), {"session_ids": list(session_ids)})
    return {row.session_id: SessionStatus(*row) for row in rows}


class Schedule(msgspec.Struct, frozen=True, gc=False):
    """The times that decide the retry of an unreadable session.

    `failing_since`: None if the latest reading succeeded.
    """

    read_by: datetime | None
    failing_since: datetime | None


def select_schedule(connection: Connection, session_id: str) -> Schedule | None:
    """Return the schedule of one session."""
    statement = select(_sessions.read_by, _sessions.failing_since).where(_sessions.session_id == session_id)
    row = connection.execute(statement).one_or_none()
    return None if row is None else Schedule(*row)


class SessionFilter(msgspec.Struct, frozen=True, gc=False):
    """The sessions to read: those with an event `since`, `every` session, or those that a reading could complete.

    Of these, only the sessions that were not read since `before`, or had an event after their last reading, or whose
    last response had an unexpected form.
    """

    before: datetime
    since: datetime | None
    every: bool
    timing: Timing

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions for these sessions."""
        is_stale = or_(_sessions.read_at.is_(None), _sessions.read_at < self.before, _HAS_NEWS, _IS_UNREADABLE)
        conditions = [_sessions.session_id != UNASSIGNED, is_stale]
        if self.since is not None:
            conditions.append(_sessions.last_event_at >= self.since)
        elif not self.every:
            is_remembered = _sessions.read_by > self.before - self.timing.margin
            conditions.append(or_(_sessions.coverage == "open", and_(is_remembered, _WAS_NOT_SHOWN)))
        return conditions


def select_unread(connection: Connection, session_filter: SessionFilter, *, after: str, limit: int) -> list[str]:
    """Return a page of matching session ids, in order."""
    statement = (
        select(_sessions.session_id)
        .where(_sessions.session_id > after, *session_filter.conditions)
        .order_by(_sessions.session_id)
        .limit(limit)
    )
    return list(connection.scalars(statement))


def count_unread(connection: Connection, session_filter: SessionFilter) -> int:
    """Return the number of matching sessions."""
    statement = select(func.count()).select_from(tables.sessions).where(*session_filter.conditions)
    return connection.scalar(statement) or 0


def select_read(connection: Connection, session_ids: Sequence[str], since: datetime) -> set[str]:
    """Return the sessions, of these, that were read since then and need no further reading."""
    statement = select(_sessions.session_id).where(
        _AMONG, _sessions.read_at >= since, not_(_HAS_NEWS), not_(_IS_UNREADABLE)
    )
    return set(connection.scalars(statement, {"session_ids": list(session_ids)}))
