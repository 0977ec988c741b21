"""Erasures and holds on a real database, and searches for what is left."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy import event as engine_event

from archiver import database, events
from archiver.archive import Timing
from archiver.archive.rebuild import rebuild
from archiver.compliance import erasure
from archiver.compliance.erasure import AuditEntry, Criteria, Target
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.inbound import Outcome
from archiver.inbound.writing import store
from tests.support.rows import execute, rows

NOW = datetime(2026, 1, 5, tzinfo=UTC)


TIMING = Timing()


ACT = AuditEntry("erase", "anna@desk", "she asked for it")


def record(engine: Engine, *bodies: bytes, minute: float = 0) -> list[Outcome]:
    read = [events.parse(body) for body in bodies]
    deliveries = [Delivery(each, NOW + timedelta(minutes=minute), "key") for each in read]
    with transaction(engine) as connection:
        return store(connection, deliveries, TIMING)


def read(engine: Engine, session_id: str, minute: float, *messages: tuple[str, str]) -> Outcome:
    published = [{"role": role, "content": content} for role, content in messages]
    body = json.dumps(
        {"session": {"id": session_id, "name": f"name of {session_id}", "messages": published}}
    ).encode()
    observed = responses.parse_history(session_id, 200, body)
    delivery = Delivery(observed, NOW + timedelta(minutes=minute), None, source=responses.SOURCE)
    with transaction(engine) as connection:
        return store(connection, [delivery], TIMING)[0]


def said(*chat_ids: str) -> list[tuple[str, str]]:
    return [
        line
        for chat_id in chat_ids
        for line in (("user", f"question of {chat_id}"), ("assistant", f"answer to {chat_id}"))
    ]


def erase(engine: Engine, *targets: Target, **options: Any) -> erasure.Ordered:
    ordered = erasure.order(engine, targets, "request", ACT, **options)
    sweep(engine)
    return ordered


def sweep(engine: Engine, after: int = 0) -> int:
    return sum(step.events for step in erasure.sweep(engine, TIMING, after))


def dump(engine: Engine) -> bytes:
    """Every row of every table, as `pg_dump` would have it, and what the planner remembers of them."""
    names = rows(
        engine,
        "SELECT format('%I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE relkind = 'r' AND nspname NOT IN ('pg_catalog', 'information_schema')",
    )
    return b"".join(dump_of(engine, name) for name in [*(name for (name,) in names), _STATISTICS])


# Not of the catalogue, whose comments use the words of some tests.
_STATISTICS = """(
    SELECT s.* FROM pg_statistic s JOIN pg_class c ON c.oid = s.starelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname NOT IN ('pg_catalog', 'information_schema')
)"""


def dump_of(engine: Engine, table: str) -> bytes:
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        with cursor.copy(f"COPY {table} TO STDOUT") as copy:
            return b"".join(bytes(piece) for piece in copy)


def holds_text(engine: Engine, *words: str) -> list[str]:
    whole = dump(engine)
    return [word for word in words if word.encode() in whole or word.encode().hex().encode() in whole]


def archive(engine: Engine) -> list[list[str]]:
    names = ("sessions", "chats", "messages")
    return [sorted(row for (row,) in rows(engine, f"SELECT t::text FROM archiver.{name} t")) for name in names]


def texts(engine: Engine, session_id: str) -> list[str]:
    return [
        row[0]
        for row in rows(
            engine, f"SELECT content FROM analytics.messages WHERE session_id = '{session_id}' ORDER BY position"
        )
    ]


def is_rebuilt_the_same(engine: Engine) -> bool:
    before = archive(engine)
    for _ in rebuild(engine, TIMING):
        pass
    remaining = archive(engine)
    execute(
        engine, *(f"DELETE FROM archiver.{name} WHERE session_id <> ''" for name in ("messages", "chats", "sessions"))
    )
    for _ in rebuild(engine, TIMING):
        pass
    return before == remaining == archive(engine)


def quarantined(engine: Engine) -> list[bytes]:
    return sorted(bytes(body) for (body,) in rows(engine, "SELECT body FROM archiver.quarantine"))


def hold(engine: Engine, **criteria: Any) -> int:
    with transaction(engine) as connection:
        return erasure.insert_hold(connection, Criteria(**criteria), "judge@court", "case 7")


@contextmanager
def as_writer(database_url: str) -> Iterator[Engine]:
    """With the rights of `archiver_writer` and no more."""
    writer = database.connect(database.database_url(database_url), pool_size=1)

    @engine_event.listens_for(writer, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("SET LOCAL ROLE archiver_writer")

    try:
        yield writer
    finally:
        writer.dispose()


def words(chat: int, what: str = "asked") -> str:
    return f"<{what} in {chat}>"
