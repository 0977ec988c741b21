"""Create deliveries from the feed with set-based SQL, one page per statement."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
import structlog
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from archiver import database, telemetry
from archiver.archive.unassigned import current_sessions
from archiver.outbound.followups.schedule import ATTEMPTS
from archiver.outbound.followups.subscriptions import Subscription

log = structlog.get_logger(__name__)

PAGE = 1_000  # maximum number of changes examined per statement
SEARCH_SECONDS = 2.0  # limit of a text search; after a timeout, fewer changes are examined per statement
MAX_SEARCH_SECONDS = 8.0  # limit for a single change
_CANCELLED = "57014"
MAX_PENDING = 10_000  # per subscription; further changes wait in the feed


class Page(msgspec.Struct, frozen=True):
    """The result of a statement: number of changes examined, last cursor, and number of deliveries created."""

    examined: int
    through: int
    matched: int
    missed: int  # changes that the feed no longer contains


# Changes of a subject: a session, an unassigned turn, or else the change itself.
_IS_OF = """(session_id = ANY (CAST(:subjects AS text[]))
    OR coalesce(chat_id = ANY (CAST(:subjects AS text[])), false)
    OR (session_id = '' AND chat_id IS NULL AND CAST(cursor AS text) = ANY (CAST(:subjects AS text[]))))"""
_PAGE = f"""
    WITH page AS MATERIALIZED (
        SELECT cursor, type, session_id, chat_id, seal_id, changed_at FROM archiver.changes
         WHERE cursor > :cursor AND cursor <= :until {{only}} ORDER BY cursor LIMIT :most
    ), matched AS MATERIALIZED (
        SELECT * FROM page WHERE type = ANY (CAST(:events AS text[])) {{but}}
    ), {current_sessions("matched", "sought")}, candidates AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM sought
    )
"""  # noqa: S608  # only a constant is inserted, never input
# Each turn and session once, however often it changed; the first matching row is enough.
_FOUND = """
    SELECT w.session_id, w.chat_id FROM candidates w, LATERAL
           (SELECT FROM {table} x WHERE x.session_id = w.session_id {of_turn} AND {condition} LIMIT 1) AS first_one
     WHERE {kind}
"""
_TURNS = {"of_turn": "AND x.chat_id = w.chat_id", "kind": "w.chat_id IS NOT NULL"}
_SESSIONS = {"of_turn": "", "kind": "w.chat_id IS NULL AND w.session_id <> ''"}
_CONDITIONS: Mapping[str, tuple[str, str]] = {
    "assistant_id": ("archiver.chats", "x.assistant_id = :assistant_id"),
    "variable": ("archiver.chats", "x.variables ->> CAST(:variable AS text) = CAST(:value AS text)"),
    "contains": ("archiver.messages", "position(lower(:contains) IN lower(x.content)) > 0"),
}
_INSERT_DELIVERIES = """
    , made AS (
        INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, seal_id, changed_at,
                                         created_at, last_attempt, due_at)
        SELECT :id, cursor, type, s.session_id, t.chat_id, seal_id, changed_at, now(), :attempts, now()
          FROM matched t JOIN sought s USING (cursor){where}
         ORDER BY cursor ON CONFLICT DO NOTHING RETURNING 1
    )
    SELECT count(*) AS examined, min(cursor) AS since, max(cursor) AS through, (SELECT count(*) FROM made) AS matched
      FROM page
"""


def _matching(name: str) -> str:
    table, condition = _CONDITIONS[name]
    result = [_FOUND.format(table=table, condition=condition, **kind) for kind in (_TURNS, _SESSIONS)]
    if name == "assistant_id":  # a session may have an assistant although none of its turns has one
        result.append(_FOUND.format(table="archiver.sessions", condition=condition, **_SESSIONS))
    return f""", by_{name} AS MATERIALIZED (
        SELECT s.cursor FROM sought s JOIN ({" UNION ".join(result)}) AS f
            ON f.session_id = s.session_id AND f.chat_id IS NOT DISTINCT FROM s.chat_id
    )"""  # noqa: S608  # internal texts


_ONLY, _BUT = f"AND {_IS_OF}", f"AND NOT {_IS_OF}"


@lru_cache
def _statement(names: tuple[str, ...], *, is_only: bool) -> TextClause:
    conditions = " AND ".join(f"cursor IN (SELECT cursor FROM by_{name})" for name in names)  # noqa: S608  # only constant names are inserted, never input
    where = f" WHERE {conditions}" if names else ""
    page = _PAGE.format(only=_ONLY if is_only else "", but="" if is_only else _BUT)
    return text(page + "".join(map(_matching, names)) + _INSERT_DELIVERIES.format(where=where))


# When an unassigned turn gets its session, its pending deliveries precede the later ones of that session.
_MOVE_IN = """
    WITH found AS MATERIALIZED (
        SELECT DISTINCT ON (chat_id) chat_id, session_id FROM archiver.changes
         WHERE cursor > :cursor AND cursor <= :through AND session_id <> '' AND chat_id IS NOT NULL {which}
         ORDER BY chat_id, session_id
    )
    UPDATE archiver.deliveries d SET session_id = f.session_id FROM found f
     WHERE d.subscription_id = :id AND d.state = 'pending' AND d.session_id = '' AND d.chat_id = f.chat_id
"""
_MOVE_ALL_BUT, _MOVE_ONLY = text(_MOVE_IN.format(which=_BUT)), text(_MOVE_IN.format(which=_ONLY))
_ADVANCE = text("UPDATE archiver.subscriptions SET cursor = :through WHERE id = :id")


_SELECT_NEXT = text(
    "SELECT cursor, session_id, chat_id FROM archiver.changes WHERE cursor > :cursor ORDER BY cursor LIMIT 1"
)
_END = 2**63 - 1


def select_subject(connection: Connection, after: int) -> tuple[int, str] | None:
    """Return the first change after this cursor and its subject; None if there is none."""
    row = connection.execute(_SELECT_NEXT, {"cursor": after}).one_or_none()
    return None if row is None else (row.cursor, row.session_id or row.chat_id or str(row.cursor))


def search(
    connection: Connection,
    subscription: Subscription,
    after: int,
    limit: int,
    *,
    deferred: Sequence[str] = (),
    advances: bool = True,
    statement_seconds: float = database.STATEMENT_SECONDS,
) -> Page | None:
    """Run `fan_out` with a text filter; return None if it timed out.

    `statement_seconds`: the limit of the caller's other statements, which is restored.

    A single change that cannot be searched in time is delivered without the filter, so that none is lost.
    """
    try:
        with connection.begin_nested():
            database.limit(connection, SEARCH_SECONDS if limit > 1 else MAX_SEARCH_SECONDS)
            page = fan_out(connection, subscription, after, limit, deferred=deferred, advances=advances)
            database.limit(connection, statement_seconds)
            return page
    except DBAPIError as error:
        if database.sqlstate(error) != _CANCELLED:
            raise
    telemetry.followup_waits.inc()
    if limit > 1:
        return None
    log.error(
        "text search timed out; change delivered without the text filter", subscription=subscription.id, after=after
    )
    unsearched = msgspec.structs.replace(subscription.filter, contains=None)
    unfiltered = msgspec.structs.replace(subscription, filter=unsearched)
    return fan_out(connection, unfiltered, after, 1, deferred=deferred, advances=advances)


def fan_out(
    connection: Connection,
    subscription: Subscription,
    after: int,
    limit: int = PAGE,
    *,
    deferred: Sequence[str] = (),
    advances: bool = True,
) -> Page:
    """Create deliveries for at most `limit` changes after this cursor. Requires the lease.

    `deferred`: subjects whose changes are skipped. `advances`: also advance the cursor of the subscription. A
    former lease holder would create the same deliveries, which has no effect.
    """
    page = _make(
        connection, subscription, after, limit=min(limit, PAGE), until=_END, subjects=deferred, is_only=False
    )
    if page.examined and advances:
        advance(connection, subscription.id, page.through)
    return page


def fan_out_subject(
    connection: Connection, subscription: Subscription, subject: str, *, after: int, until: int, limit: int = PAGE
) -> Page:
    """Create deliveries for at most `limit` changes of this subject in a skipped part of the feed."""
    return _make(connection, subscription, after, limit=limit, until=until, subjects=[subject], is_only=True)


def advance(connection: Connection, subscription_id: int, through: int) -> None:
    """Record that all deliveries up to this cursor exist."""
    connection.execute(_ADVANCE, {"id": subscription_id, "through": through})


def _make(
    connection: Connection,
    subscription: Subscription,
    after: int,
    *,
    limit: int,
    until: int,
    subjects: Sequence[str],
    is_only: bool,
) -> Page:
    filters = {
        name: value for name, value in msgspec.structs.asdict(subscription.filter).items() if value is not None
    }
    names = tuple(name for name in _CONDITIONS if name in filters)
    values = {
        **filters,
        "id": subscription.id,
        "cursor": after,
        "until": until,
        "subjects": list(subjects),
        "most": limit,
        "events": list(subscription.events),
        "attempts": ATTEMPTS,
    }
    row = connection.execute(_statement(names, is_only=is_only), values).one()
    if not row.examined:
        return Page(0, after, 0, 0)
    if subscription.is_ordered:
        moved = {"id": subscription.id, "cursor": after, "through": row.through, "subjects": list(subjects)}
        connection.execute(_MOVE_ONLY if is_only else _MOVE_ALL_BUT, moved)
    return Page(row.examined, row.through, row.matched, max(0, row.since - after - 1))
