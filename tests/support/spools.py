"""Deliveries for the spool."""

from datetime import UTC, datetime, timedelta

from archiver import events
from archiver.events import Content, Delivery

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOM = 1_048_576  # bytes


def spooled(body: bytes, seconds: float = 0) -> Delivery[Content]:
    return Delivery(events.parse(body), NOW + timedelta(seconds=seconds), "key")
