"""What each page of the console reads: its statements, one archive to read, and whose pages they are."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg import sql
from sqlalchemy import Connection, Engine, event, text

from archiver.compliance import seals
from archiver.console import conversations, lists, overview, quarantined, subscriptions
from archiver.console.listing import MAX_ROWS, Query
from archiver.console.page_renderer import READ_SECONDS
from archiver.database import snapshot, transaction
from tests.support.erasures import hold
from tests.support.followups import subscribe


@dataclass(frozen=True)
class Subject:
    """What the pages of one thing are about."""

    session_id: str
    event_id: int
    quarantine_id: int
    subscription_id: int
    cursor: int


Read = Callable[[Connection, Subject], object]

_FILTERS = (
    *("", "coverage:repaired", "deleted:yes", "held:yes", "held:no", "cost>0.1", "before:2025-06-01"),
    *("refund", "no_such_word", "chat:none"),
)


def _conversations(q: str, limit: int = 50) -> Read:
    query = Query({"q": q}, may_read=True, limit=limit, suggests=True)
    return lambda connection, _: conversations.select_conversations(connection, query)


def _list(select: Callable[[Connection, Query], object]) -> Read:
    return lambda connection, _: select(connection, Query({}, may_read=True))


PAGES: Mapping[str, Read] = {
    "overview": lambda connection, _: overview.select_overview(connection),
    "overview by hour": lambda connection, _: overview.select_overview(connection, by_hour=True),
    **{f"conversations {q}".strip(): _conversations(q) for q in _FILTERS},
    "conversations.csv": _conversations("", MAX_ROWS),
    **{each.path: _list(each.select) for each in lists.OTHERS},
    "conversation": lambda connection, of: conversations.select_conversation(connection, of.session_id),
    "event": lambda connection, of: conversations.select_event(connection, of.event_id),
    "proof": lambda connection, of: seals.prove(connection, of.event_id),
    "quarantined": lambda connection, of: quarantined.select_item(connection, of.quarantine_id),
    "subscription": lambda connection, of: subscriptions.select_subscription(connection, of.subscription_id, None),
    "delivery": lambda connection, of: subscriptions.select_delivery(connection, of.subscription_id, of.cursor),
}

# As many as a busy archive of that size has.
_SURROUNDINGS = (
    "INSERT INTO archiver.acts (actor, kind, detail)"
    " SELECT 'ada@console', 'console.view', '{}' FROM archiver.sessions",
    "INSERT INTO archiver.quarantine"
    " (received_at, last_received_at, delivery_count, reason, detail, body, body_digest)"
    " SELECT now(), now(), 1, 'not_json', 'not JSON', convert_to(session_id, 'UTF8'),"
    " sha256(convert_to(session_id, 'UTF8')) FROM archiver.sessions ORDER BY session_id"
    " LIMIT (SELECT 1 + count(*) / 100 FROM archiver.sessions) ON CONFLICT DO NOTHING",
)
_DELIVERIES = text(
    "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at, created_at,"
    " last_attempt, due_at, ended_at, state, attempts)"
    " SELECT :subscription, c.cursor, c.type, c.session_id, c.chat_id, c.changed_at, now(), 14, now(), now(),"
    " 'delivered', 1 FROM archiver.changes c WHERE c.type = 'chat.created'"
)
_SUBJECT = text(
    "SELECT c.session_id, (SELECT max(id) FROM archiver.events e WHERE e.session_id = c.session_id),"
    " (SELECT min(id) FROM archiver.quarantine), c.cursor"
    " FROM archiver.changes c WHERE c.type = 'chat.created' ORDER BY c.cursor DESC LIMIT 1"
)


def surround(engine: Engine) -> Subject:
    """Seal a published archive, and give it an audit log, a quarantine, holds, and deliveries of a subscription."""
    seals.seal(engine)
    subscription_id = subscribe(engine, "http://127.0.0.1:9/", after=None)
    hold(engine, assistant_id="none")
    with transaction(engine) as connection:
        for statement in _SURROUNDINGS:
            connection.execute(text(statement))
        connection.execute(_DELIVERIES, {"subscription": subscription_id})
        session_id, event_id, quarantine_id, cursor = connection.execute(_SUBJECT).one()
    hold(engine, session_id=session_id)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as autocommit:
        autocommit.exec_driver_sql("VACUUM (ANALYZE)")
    return Subject(session_id, event_id, quarantine_id, subscription_id, cursor)


def statements_of(engine: Engine, read: Read, subject: Subject) -> Sequence[str]:
    """The statements that a page executes in its transaction, with their values."""
    with _recording(engine) as statements, snapshot(engine, statement_seconds=READ_SECONDS) as connection:
        statements.clear()  # those that open the transaction
        read(connection, subject)
        return list(statements)


@contextmanager
def _recording(engine: Engine) -> Iterator[list[str]]:
    statements: list[str] = []

    def add(_: Connection, cursor: Any, statement: str, parameters: Any, *__: object) -> None:
        values = [sql.Literal(each).as_string(cursor.connection) for each in parameters or ()]
        statements.append(re.sub(r"\$(\d+)", lambda place: values[int(place[1]) - 1], statement))

    event.listen(engine, "before_cursor_execute", add)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", add)
