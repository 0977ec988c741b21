"""From the feed to deliveries: which changes are told to a subscription, set-based, one page a statement."""

from collections.abc import Mapping
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


_PAGE = f"""
    WITH page AS MATERIALIZED (
        SELECT cursor, type, session_id, chat_id, seal_id, changed_at FROM archiver.changes
         WHERE cursor > :cursor ORDER BY cursor LIMIT :most
    ), told AS MATERIALIZED (
        SELECT * FROM page WHERE type = ANY (CAST(:events AS text[]))
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


@lru_cache
def _statement(names: tuple[str, ...]) -> TextClause:
    conditions = " AND ".join(f"cursor IN (SELECT cursor FROM by_{name})" for name in names)  # noqa: S608  # names of ours
    where = f" WHERE {conditions}" if names else ""
    return text(_PAGE + "".join(map(_matching, names)) + _TELL.format(where=where))


# Of a turn that has found its session: what waits of it from before comes first there, too.
_MOVE_IN = text(
    """
    WITH found AS MATERIALIZED (
        SELECT DISTINCT ON (chat_id) chat_id, session_id FROM archiver.changes
         WHERE cursor > :cursor AND cursor <= :through AND session_id <> '' AND chat_id IS NOT NULL
         ORDER BY chat_id, session_id
    )
    UPDATE archiver.deliveries d SET session_id = f.session_id FROM found f
     WHERE d.subscription_id = :id AND d.state = 'pending' AND d.session_id = '' AND d.chat_id = f.chat_id
    """
)
_ADVANCE = text("UPDATE archiver.subscriptions SET cursor = :through WHERE id = :id")


def search(connection: Connection, subscription: Subscription, after: int, most: int) -> Page | None:
    """As `fan_out`, where text is sought: None if that took too long, of so many changes.

    What cannot be searched in time alone is told without having been searched: nothing is to be lost.
    """
    try:
        with connection.begin_nested():
            database.limit(connection, SEARCH_SECONDS if most > 1 else LONGEST_SEARCH_SECONDS)
            page = fan_out(connection, subscription, after, most)
            database.limit(connection)
            return page
    except DBAPIError as error:
        if database.sqlstate(error) != _CANCELLED:
            raise
    telemetry.followup_waits.inc()
    if most > 1:
        return None
    log.error("a change cannot be searched in time and is told unsearched", subscription=subscription.id, after=after)
    unsearched = msgspec.structs.replace(subscription.filter, contains=None)
    return fan_out(connection, msgspec.structs.replace(subscription, filter=unsearched), after, 1)


def fan_out(connection: Connection, subscription: Subscription, after: int, most: int = PAGE) -> Page:
    """Make deliveries of at most so many changes after this cursor, and move on. The caller holds its lease.

    Whoever else believed to hold it meanwhile would make the same deliveries again, of which none is added.
    """
    told = {name: value for name, value in msgspec.structs.asdict(subscription.filter).items() if value is not None}
    names = tuple(name for name in _CONDITIONS if name in told)
    values = {
        **told,
        "id": subscription.id,
        "cursor": after,
        "most": min(most, PAGE),
        "events": list(subscription.events),
        "attempts": ATTEMPTS,
    }
    row = connection.execute(_statement(names), values).one()
    if not row.looked_at:
        return Page(0, after, 0, 0)
    through = {"id": subscription.id, "through": row.through}
    if subscription.is_ordered:
        connection.execute(_MOVE_IN, through | {"cursor": after})
    connection.execute(_ADVANCE, through)
    return Page(row.looked_at, row.through, row.told, max(0, row.since - after - 1))
