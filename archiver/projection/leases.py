"""Who reads which session, and when: the columns of `sessions` that steer readings.

A lease is taken by compare-and-set, so that no two workers ever read one session at a time; it ends by itself, so
that a worker that was killed loses nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import ColumnElement, Connection, bindparam, func, not_, or_, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from archiver import tables
from archiver.projection.facts import UNPLACED

_sessions = tables.sessions.c
_AMONG = _sessions.session_id == func.any(bindparam("session_ids", type_=ARRAY(TEXT)))
_HAS_NEWS = _sessions.last_event_at > _sessions.read_at
_FREE = or_(_sessions.leased_until.is_(None), _sessions.leased_until < bindparam("now"))


READ = timedelta(seconds=120)  # for one history, once it is its turn; retries included
RECORD = timedelta(seconds=300)  # for its commit, with all that may delay it
LEASE = 2 * READ + RECORD


class Standing(msgspec.Struct, frozen=True, gc=False):
    """Where a session stands: its coverage, and how many messages history supplied."""

    session_id: str
    coverage: str
    reason: str
    repaired_messages: int


_STANDING = (_sessions.session_id, _sessions.coverage, _sessions.reason, _sessions.repaired_messages)

_DUE = (
    select(_sessions.session_id)
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
# Only its own: whoever overslept may find that another has leased the session meanwhile.
_OWN = _sessions.leased_until == bindparam("lease")
_RELEASE = update(tables.sessions).where(_AMONG, _OWN).values(leased_until=None)
_POSTPONE = (
    update(tables.sessions)
    .where(_sessions.session_id == bindparam("of_session"), _OWN)
    .values(leased_until=None, reconcile_at=bindparam("until"), failing_since=bindparam("since"))
)


def hand_out_due(connection: Connection, now: datetime, until: datetime, most: int) -> list[str]:
    """Sessions whose reading is due, those first that upstream forgets first; handed out again from `until` on."""
    due = list(connection.scalars(_DUE, {"now": now, "most": most}))
    handed = {"session_ids": sorted(due), "now": now, "until": until}
    mine = set(connection.scalars(_HAND_OUT, handed)) if due else set()
    return [session_id for session_id in due if session_id in mine]


def claim(connection: Connection, session_ids: Sequence[str], now: datetime, until: datetime) -> dict[str, Standing]:
    """Lease these sessions until then; answers those that were free, and where they stand."""
    claimed = {"session_ids": sorted(session_ids), "now": now, "until": until}
    return {row.session_id: Standing(*row) for row in connection.execute(_CLAIM, claimed)}


def release(connection: Connection, leased: Mapping[str, datetime]) -> None:
    """Give leases back; each session with the time until which it was leased."""
    sessions: dict[datetime, list[str]] = defaultdict(list)
    for session_id, lease in leased.items():
        sessions[lease].append(session_id)
    for lease, session_ids in sessions.items():
        connection.execute(_RELEASE, {"session_ids": sorted(session_ids), "lease": lease})


def postpone(
    connection: Connection, session_id: str, lease: datetime, *, until: datetime, failing_since: datetime | None
) -> None:
    """Give the lease back after a reading that failed; the next is due then. `failing_since`: the first that did."""
    postponed = {"of_session": session_id, "lease": lease, "until": until, "since": failing_since}
    connection.execute(_POSTPONE, postponed)


def hasten(connection: Connection, session_ids: Sequence[str], now: datetime) -> None:
    """Make these sessions due at once, those that still are to be read at all; whoever has them leased keeps them."""
    hastened = update(tables.sessions).where(_AMONG, _sessions.reconcile_at > now).values(reconcile_at=now)
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


def _unread(before: datetime, since: datetime | None, *, every: bool) -> list[ColumnElement[bool]]:
    """Sessions not read since `before`, or with news; of those with an event `since`, or `every` one, or the open."""
    is_stale = or_(_sessions.read_at.is_(None), _sessions.read_at < before, _HAS_NEWS)
    conditions = [_sessions.session_id != UNPLACED, is_stale]
    if since is not None:
        conditions.append(_sessions.last_event_at >= since)
    elif not every:
        conditions.append(_sessions.coverage == "open")
    return conditions


def select_unread(
    connection: Connection, *, before: datetime, since: datetime | None, every: bool, after: str, most: int
) -> list[str]:
    """A page of session ids, in their order, that were not read since `before`; which, as `count_unread` has it."""
    statement = (
        select(_sessions.session_id)
        .where(_sessions.session_id > after, *_unread(before, since, every=every))
        .order_by(_sessions.session_id)
        .limit(most)
    )
    return list(connection.scalars(statement))


def count_unread(connection: Connection, *, before: datetime, since: datetime | None, every: bool) -> int:
    """How many sessions with an event `since`, or `every` one, or those whose coverage is open, are to be read."""
    statement = select(func.count()).select_from(tables.sessions).where(*_unread(before, since, every=every))
    return connection.scalar(statement) or 0


def select_read(connection: Connection, session_ids: Sequence[str], since: datetime) -> set[str]:
    """Those of these sessions that were read from then on, and of which nothing was heard after that."""
    statement = select(_sessions.session_id).where(_AMONG, _sessions.read_at >= since, not_(_HAS_NEWS))
    return set(connection.scalars(statement, {"session_ids": list(session_ids)}))


_COUNT_DUE = text("SELECT count(*) FROM archiver.sessions WHERE reconcile_at <= :now")


def count_due(connection: Connection, now: datetime) -> int:
    """Sessions whose reading is due."""
    return int(connection.scalar(_COUNT_DUE, {"now": now}) or 0)
