"""From the feed to deliveries: which changes are told to a subscription, set-based, one page a statement."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
import structlog
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from archiver import database, telemetry
from archiver.followups.homes import homes
from archiver.followups.schedule import ATTEMPTS
from archiver.followups.subscriptions import Subscription

log = structlog.get_logger(__name__)

PAGE = 1_000  # changes looked at in one statement, at most
SEARCH_SECONDS = 2.0  # that a search for text may take; then fewer changes are looked at in one statement
LONGEST_SEARCH_SECONDS = 8.0  # of a single change
_CANCELLED = "57014"
MOST_PENDING = 10_000  # of one subscription; the rest waits in the feed


class Page(msgspec.Struct, frozen=True):
    """What a statement did: how many changes it looked at, up to which cursor, and how many are to be told."""

    looked_at: int
    through: int
    told: int
    missed: int  # of which the feed holds nothing any more


# Changes of a subject: a session, a turn without one, or else the change itself.
_IS_OF = """(session_id = ANY (CAST(:subjects AS text[]))
    OR coalesce(chat_id = ANY (CAST(:subjects AS text[])), false)
    OR (session_id = '' AND chat_id IS NULL AND CAST(cursor AS text) = ANY (CAST(:subjects AS text[]))))"""
_PAGE = f"""
    WITH page AS MATERIALIZED (
        SELECT cursor, type, session_id, chat_id, seal_id, changed_at FROM archiver.changes
         WHERE cursor > :cursor AND cursor <= :until {{only}} ORDER BY cursor LIMIT :most
    ), told AS MATERIALIZED (
        SELECT * FROM page WHERE type = ANY (CAST(:events AS text[])) {{but}}
    ), {homes("told", "sought")}, wanted AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM sought
    )
"""  # noqa: S608  # a constant
# Each turn and each session once, however often they changed; the first row that meets it is enough.
_FOUND = """
    SELECT w.session_id, w.chat_id FROM wanted w, LATERAL
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
_TELL = """
    , made AS (
        INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, seal_id, changed_at,
                                         created_at, last_attempt, due_at)
        SELECT :id, cursor, type, s.session_id, t.chat_id, seal_id, changed_at, now(), :attempts, now()
          FROM told t JOIN sought s USING (cursor){where}
         ORDER BY cursor ON CONFLICT DO NOTHING RETURNING 1
    )
    SELECT count(*) AS looked_at, min(cursor) AS since, max(cursor) AS through, (SELECT count(*) FROM made) AS told
      FROM page
"""


def _matching(name: str) -> str:
    table, condition = _CONDITIONS[name]
    found = [_FOUND.format(table=table, condition=condition, **kind) for kind in (_TURNS, _SESSIONS)]
    if name == "assistant_id":  # a session may tell its assistant though none of its turns does
        found.append(_FOUND.format(table="archiver.sessions", condition=condition, **_SESSIONS))
    return f""", by_{name} AS MATERIALIZED (
        SELECT s.cursor FROM sought s JOIN ({" UNION ".join(found)}) AS f
            ON f.session_id = s.session_id AND f.chat_id IS NOT DISTINCT FROM s.chat_id
    )"""  # noqa: S608  # texts of ours


_ONLY, _BUT = f"AND {_IS_OF}", f"AND NOT {_IS_OF}"


@lru_cache
def _statement(names: tuple[str, ...], *, is_only: bool) -> TextClause:
    conditions = " AND ".join(f"cursor IN (SELECT cursor FROM by_{name})" for name in names)  # noqa: S608  # names of ours
    where = f" WHERE {conditions}" if names else ""
    page = _PAGE.format(only=_ONLY if is_only else "", but="" if is_only else _BUT)
    return text(page + "".join(map(_matching, names)) + _TELL.format(where=where))


# Of a turn that has found its session: what waits of it from before comes first there, too.
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
    """The first change after this cursor, and its subject; None where there is none."""
    row = connection.execute(_SELECT_NEXT, {"cursor": after}).one_or_none()
    return None if row is None else (row.cursor, row.session_id or row.chat_id or str(row.cursor))


def search(
    connection: Connection,
    subscription: Subscription,
    after: int,
    most: int,
    *,
    aside: Sequence[str] = (),
    advances: bool = True,
    statement_seconds: float = database.STATEMENT_SECONDS,
) -> Page | None:
    """As `fan_out`, where text is sought: None if that took too long, of so many changes.

    `statement_seconds`: the limit of the caller's other statements, which is set again.

    What cannot be searched in time alone is told without having been searched: nothing is to be lost.
    """
    try:
        with connection.begin_nested():
            database.limit(connection, SEARCH_SECONDS if most > 1 else LONGEST_SEARCH_SECONDS)
            page = fan_out(connection, subscription, after, most, aside=aside, advances=advances)
            database.limit(connection, statement_seconds)
            return page
    except DBAPIError as error:
        if database.sqlstate(error) != _CANCELLED:
            raise
    telemetry.followup_waits.inc()
    if most > 1:
        return None
    log.error("a change cannot be searched in time and is told unsearched", subscription=subscription.id, after=after)
    unsearched = msgspec.structs.replace(subscription.filter, contains=None)
    unfiltered = msgspec.structs.replace(subscription, filter=unsearched)
    return fan_out(connection, unfiltered, after, 1, aside=aside, advances=advances)


def fan_out(
    connection: Connection,
    subscription: Subscription,
    after: int,
    most: int = PAGE,
    *,
    aside: Sequence[str] = (),
    advances: bool = True,
) -> Page:
    """Make deliveries of at most so many changes after this cursor, and move on. The caller holds its lease.

    `aside`: the subjects whose changes are passed over. `advances`: whether the cursor of the subscription moves on.
    Whoever else believed to hold it meanwhile would make the same deliveries again, of which none is added.
    """
    page = _make(connection, subscription, after, most=min(most, PAGE), until=_END, subjects=aside, is_only=False)
    if page.looked_at and advances:
        advance(connection, subscription.id, page.through)
    return page


def fan_out_subject(
    connection: Connection, subscription: Subscription, subject: str, *, after: int, until: int, most: int = PAGE
) -> Page:
    """Make deliveries of at most so many changes of this subject in that part of the feed, which was passed over."""
    return _make(connection, subscription, after, most=most, until=until, subjects=[subject], is_only=True)


def advance(connection: Connection, subscription_id: int, through: int) -> None:
    """Note that all deliveries up to this cursor are made."""
    connection.execute(_ADVANCE, {"id": subscription_id, "through": through})


def _make(
    connection: Connection,
    subscription: Subscription,
    after: int,
    *,
    most: int,
    until: int,
    subjects: Sequence[str],
    is_only: bool,
) -> Page:
    told = {name: value for name, value in msgspec.structs.asdict(subscription.filter).items() if value is not None}
    names = tuple(name for name in _CONDITIONS if name in told)
    values = {
        **told,
        "id": subscription.id,
        "cursor": after,
        "until": until,
        "subjects": list(subjects),
        "most": most,
        "events": list(subscription.events),
        "attempts": ATTEMPTS,
    }
    row = connection.execute(_statement(names, is_only=is_only), values).one()
    if not row.looked_at:
        return Page(0, after, 0, 0)
    if subscription.is_ordered:
        moved = {"id": subscription.id, "cursor": after, "through": row.through, "subjects": list(subjects)}
        connection.execute(_MOVE_ONLY if is_only else _MOVE_ALL_BUT, moved)
    return Page(row.looked_at, row.through, row.told, max(0, row.since - after - 1))
