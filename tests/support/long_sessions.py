"""Sessions of many turns with their history."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, text

from archiver import events, ledger
from archiver.archive import Timing
from archiver.database import transaction
from archiver.events import Delivery, Event, responses
from tests.support.payloads import created

START = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)


TIMING = Timing()


def at(minute: float) -> datetime:
    return START + timedelta(minutes=minute)


def record(connection: Connection, minute: float, event: Event, source: str) -> None:
    ledger.record(connection, [Delivery(event, at(minute), None, source)], TIMING)


def said(number: int) -> list[tuple[str, str]]:
    return [("user", f"question of chat-{number}"), ("assistant", f"answer to chat-{number}")]


def webhook(number: int, session_id: str | None = "session-1", **fields: Any) -> Event:
    moment = at(number).isoformat()
    event = events.parse(
        created(f"chat-{number}", session_id, **({"createdAt": moment, "updatedAt": moment} | fields))
    )
    assert isinstance(event, Event)
    return event


def reading(*messages: tuple[str, str], session_id: str = "session-1", **fields: Any) -> Event:
    result = [{"role": role, "content": content} for role, content in messages]
    body = json.dumps({"session": {"id": session_id, "messages": result, "updatedAt": "2026"} | fields}).encode()
    return responses.parse_history(session_id, 200, body)


def conversation(turns: int) -> list[tuple[str, str]]:
    return [line for number in range(turns) for line in said(number)]


def fill(engine: Engine, turns: int) -> None:
    """A session of so many turns, read once after the last."""
    with transaction(engine) as connection:
        process = [Delivery(webhook(n), at(n), None) for n in range(turns)]
        ledger.record(connection, process, TIMING)
        record(connection, turns - 0.5, reading(*conversation(turns)), responses.SOURCE)
    with transaction(engine) as connection:
        connection.execute(text("ANALYZE archiver.messages, archiver.events, archiver.sessions, archiver.chats"))
