"""Who reads which session, and when: the columns of `sessions` that steer readings.

A lease is taken by compare-and-set, so that no two workers ever read one session at a time; it ends by itself unless
it is renewed, so that a worker that was killed loses nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, exists, func, not_, or_, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from archiver import history, tables
from archiver.database.clock import TOLERANCE
from archiver.projection.coverage import ERASED, NOT_SHOWN, Timing
from archiver.projection.facts import UNPLACED

_sessions = tables.sessions.c
_AMONG = _sessions.session_id == func.any(bindparam("session_ids", type_=ARRAY(TEXT)))
_HAS_NEWS = _sessions.last_event_at > _sessions.read_at
# The fact that the last reading made, or made again.
_IS_UNREADABLE = exists().where(
    tables.events.c.session_id == _sessions.session_id,
    tables.events.c.type == history.UNREADABLE,
    tables.events.c.last_received_at == _sessions.read_at,
)
# It may have been asked for at the wrong place, or at the wrong time.
_WAS_NOT_SHOWN = or_(_sessions.reason.in_(NOT_SHOWN), _sessions.reconciled_at.is_(None))
LEASE = timedelta(seconds=60)  # renewed by whoever lives
# One that is further ahead than a lease lasts was written by a clock that was ahead: it counts for nothing.
_FREE = or_(
    _sessions.leased_until.is_(None),
    _sessions.leased_until < bindparam("now"),
    _sessions.leased_until > bindparam("beyond"),
)


class Standing(msgspec.Struct, frozen=True, gc=False):
    """Where a session stands: its coverage, how many messages history supplied, and when it was last heard of."""

    session_id: str
    coverage: str
    reason: str
    repaired_messages: int
    heard_at: datetime


_STANDING = (
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
_HAND_OUT = (
    update(tables.sessions)
    .where(_AMONG, _sessions.reconcile_at <= bindparam("now"))
    .values(reconcile_at=bindparam("until"))
    .returning(_sessions.session_id)
)
_CLAIM = update(tables.sessions).where(_AMONG, _FREE).values(leased_until=bindparam("until")).returning(*_STANDING)
_CLAIM_DUE = _CLAIM.where(_sessions.reconcile_at == bindparam("due_at"))
# Only its own: whoever overslept may find that another has leased the session meanwhile.
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
        # It may have been erased while it was read: then it is never due.
        reconcile_at=case((_sessions.reason == ERASED, None), else_=bindparam("until")),
        failing_since=bindparam("since"),
    )
)


Due = tuple[str, datetime | None]  # a session, and by when it is to be read


def select_due(connection: Connection, now: datetime, most: int) -> list[Due]:
    """Sessions whose reading is due; those first that upstream forgets first."""
    return [(row.session_id, row.read_by) for row in connection.execute(_DUE, _at(now) | {"most": most})]


def hand_out(connection: Connection, due: Sequence[Due], now: datetime, until: datetime) -> list[Due]:
    """Take these sessions, if they are still due; they are due again from `until` on, if they were not read."""
    handed = {"session_ids": sorted(session_id for session_id, _ in due), "now": now, "until": until}
    mine = set(connection.scalars(_HAND_OUT, handed)) if due else set()
    return [(session_id, read_by) for session_id, read_by in due if session_id in mine]


def hand_out_due(connection: Connection, now: datetime, until: datetime, most: int) -> list[Due]:
    """Take sessions whose reading is due, in one transaction."""
    return hand_out(connection, select_due(connection, now, most), now, until)


def _at(now: datetime) -> dict[str, Any]:
    """The values by which a lease is judged."""
    return {"now": now, "beyond": now + LEASE + TOLERANCE}


def claim(
    connection: Connection,
    session_ids: Sequence[str],
    now: datetime,
    until: datetime,
    due_at: datetime | None = None,
) -> dict[str, Standing]:
    """Lease these sessions until then; answers those that were free, and where they stand.

    `due_at`: only those whose next reading is due exactly then, as they were handed out.
    """
    claimed = {"session_ids": sorted(session_ids), "until": until} | _at(now)
    if due_at is None:
        rows = connection.execute(_CLAIM, claimed)
    else:
        rows = connection.execute(_CLAIM_DUE, claimed | {"due_at": due_at})
    return {row.session_id: Standing(*row) for row in rows}


def release(connection: Connection, leased: Mapping[str, datetime]) -> None:
    """Give leases back; each session with the time until which it was leased."""
    for lease, session_ids in _by_lease(leased).items():
        connection.execute(_RELEASE, {"session_ids": session_ids, "lease": lease})


def renew(connection: Connection, leased: Mapping[str, datetime], until: datetime) -> set[str]:
    """Keep leases; answers the sessions of those that had not ended and gone to somebody else."""
    kept: set[str] = set()
    for lease, session_ids in _by_lease(leased).items():
        kept |= set(connection.scalars(_RENEW, {"session_ids": session_ids, "lease": lease, "until": until}))
    return kept


def _by_lease(leased: Mapping[str, datetime]) -> dict[datetime, list[str]]:
    sessions: dict[datetime, list[str]] = defaultdict(list)
    for session_id in sorted(leased):
        sessions[leased[session_id]].append(session_id)
    return sessions


def postpone(
    connection: Connection, session_id: str, lease: datetime, *, until: datetime, failing_since: datetime | None
) -> None:
    """Give the lease back after a reading that failed; the next is due then. `failing_since`: the first that did."""
    postponed = {"of_session": session_id, "lease": lease, "until": until, "since": failing_since}
    connection.execute(_POSTPONE, postponed)


def hasten(connection: Connection, session_ids: Sequence[str], handed: datetime, now: datetime) -> None:
    """Make those of these sessions due at once that were handed out until `handed` and not read since."""
    hastened = update(tables.sessions).where(_AMONG, _sessions.reconcile_at == handed).values(reconcile_at=now)
    connection.execute(hastened, {"session_ids": sorted(session_ids)})


def select_standings(connection: Connection, session_ids: Sequence[str]) -> dict[str, Standing]:
    """Where these sessions stand; those that nobody knows are missing."""
    rows = connection.execute(select(*_STANDING).where(_AMONG), {"session_ids": list(session_ids)})
    return {row.session_id: Standing(*row) for row in rows}


class Schedule(msgspec.Struct, frozen=True, gc=False):
    """The times by which a session that could not be read is judged; `failing_since`: not for the first time."""

    read_by: datetime | None
    failing_since: datetime | None


def select_schedule(connection: Connection, session_id: str) -> Schedule | None:
    """The times of one session."""
    statement = select(_sessions.read_by, _sessions.failing_since).where(_sessions.session_id == session_id)
    row = connection.execute(statement).one_or_none()
    return None if row is None else Schedule(*row)


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """Sessions to read: those with an event `since`; `every` one; or else those that another reading could complete.

    Of them those that were not read from `before` on, or of which something was heard after that, or whose answer
    was of an unexpected shape.
    """

    before: datetime
    since: datetime | None
    every: bool
    timing: Timing

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """What is true of such a session."""
        is_stale = or_(_sessions.read_at.is_(None), _sessions.read_at < self.before, _HAS_NEWS, _IS_UNREADABLE)
        conditions = [_sessions.session_id != UNPLACED, is_stale]
        if self.since is not None:
            conditions.append(_sessions.last_event_at >= self.since)
        elif not self.every:
            is_remembered = _sessions.read_by > self.before - self.timing.margin
            conditions.append(or_(_sessions.coverage == "open", and_(is_remembered, _WAS_NOT_SHOWN)))
        return conditions


def select_unread(connection: Connection, wanted: Wanted, *, after: str, most: int) -> list[str]:
    """A page of the ids of the sessions that are wanted, in their order."""
    statement = (
        select(_sessions.session_id)
        .where(_sessions.session_id > after, *wanted.conditions)
        .order_by(_sessions.session_id)
        .limit(most)
    )
    return list(connection.scalars(statement))


def count_unread(connection: Connection, wanted: Wanted) -> int:
    """How many sessions are wanted."""
    statement = select(func.count()).select_from(tables.sessions).where(*wanted.conditions)
    return connection.scalar(statement) or 0


def select_read(connection: Connection, session_ids: Sequence[str], since: datetime) -> set[str]:
    """Those of these sessions that were read from then on, so that nothing is left to be asked for."""
    statement = select(_sessions.session_id).where(
        _AMONG, _sessions.read_at >= since, not_(_HAS_NEWS), not_(_IS_UNREADABLE)
    )
    return set(connection.scalars(statement, {"session_ids": list(session_ids)}))


_COUNT_DUE = text("SELECT count(*) FROM archiver.sessions WHERE reconcile_at <= :now")


def count_due(connection: Connection, now: datetime) -> int:
    """Sessions whose reading is due."""
    return int(connection.scalar(_COUNT_DUE, {"now": now}) or 0)
