"""Events recorded in the ledger at chosen times."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from archiver import events, ledger
from archiver.database import transaction
from archiver.events import Delivery, Event

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def observe(body: bytes, seconds: float = 0) -> Delivery[Event]:
    event = events.parse(body)
    assert isinstance(event, events.Event)
    return Delivery(event, NOW + timedelta(seconds=seconds), "key")


def record(engine: Engine, *bodies: bytes, seconds: float = 0) -> list[ledger.Recorded]:
    with transaction(engine) as connection:
        return ledger.record(connection, [observe(body, seconds) for body in bodies])
