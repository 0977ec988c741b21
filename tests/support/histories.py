"""A session and its histories, recorded at chosen times."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, text

from archiver import events, ledger
from archiver.archive import Timing
from archiver.database import transaction
from archiver.events import Delivery, Event, responses
from tests.support.payloads import created

START = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)


TIMING = Timing()


def answer(*messages: tuple[str, str], session_id: str = "session-1", **fields: Any) -> bytes:
    """What CallHQ answers to a history call."""
    result = [{"role": role, "content": content} for role, content in messages]
    session = {"id": session_id, "status": "active", "messages": result, "updatedAt": "2026-01-05T09:00:00Z"} | fields
    return json.dumps({"message": "Session messages retrieved successfully", "session": session}).encode()


def turn(number: int, session_id: str = "session-1") -> bytes:
    """`chat.created` of the turn whose messages are `said(number)`."""
    moment = START + timedelta(minutes=number)
    return created(f"chat-{number}", session_id, createdAt=moment.isoformat(), updatedAt=moment.isoformat())


def said(number: int) -> list[tuple[str, str]]:
    return [("user", f"question of chat-{number}"), ("assistant", f"answer to chat-{number}")]


class Archive:
    """The ledger and what is derived from it, driven by facts at chosen minutes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def record(self, minute: float, event: Event, source: str) -> bool:
        moment = START + timedelta(minutes=minute)
        with transaction(self.engine) as connection:
            (recorded,) = ledger.record(connection, [Delivery(event, moment, None, source)], TIMING)
        return recorded.is_new

    def webhook(self, minute: float, body: bytes) -> bool:
        event = events.parse(body)
        assert isinstance(event, Event)
        return self.record(minute, event, "webhook")

    def reading(self, minute: float, body: bytes, status: int = 200, session_id: str = "session-1") -> bool:
        return self.record(minute, responses.parse_history(session_id, status, body), "history")

    def rows(self, statement: str) -> list[Any]:
        with transaction(self.engine) as connection:
            return [tuple(row) for row in connection.execute(text(statement))]

    def transcript(self) -> list[Any]:
        return self.rows(
            "SELECT chat_id, role, content, source FROM analytics.messages ORDER BY session_id, position"
        )

    def coverage(self) -> tuple[str, str, int]:
        ((state, reason, repaired),) = self.rows("SELECT state, reason, repaired_messages FROM analytics.coverage")
        return state, reason, repaired

    def dump(self) -> dict[str, list[Any]]:
        """All that is derived."""
        orders = {"sessions": "1", "chats": "1, 2", "messages": "1, 2, 3"}
        return {table: self.rows(f"SELECT * FROM archiver.{table} ORDER BY {orders[table]}") for table in orders}
