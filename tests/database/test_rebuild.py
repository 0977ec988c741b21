"""Rebuild the archive from the ledger alone, page by page, while the receiver runs (I10)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from archiver import events, ledger
from archiver.archive import Timing, unassigned
from archiver.archive import rebuild as rebuilding
from archiver.archive.rebuild import rebuild
from archiver.database import transaction
from archiver.events import Delivery, responses
from tests.support.payloads import created, deleted

NOW = datetime(2026, 1, 5, tzinfo=UTC)
TIMING = Timing()


def record(engine: Engine, *bodies: bytes, minute: float = 0) -> None:
    for body in bodies:
        event = events.parse(body)
        assert isinstance(event, events.Event)
        observation = Delivery(event, NOW + timedelta(minutes=minute), None)
        with transaction(engine) as connection:
            ledger.record(connection, [observation], TIMING)


def read(engine: Engine, session_id: str, minute: float, *texts: str) -> None:
    body = b'{"session": {"messages": [%s]}}' % b", ".join(
        b'{"role": "user", "content": "%s"}' % each.encode() for each in texts
    )
    event = responses.parse_history(session_id, 200, body)
    observation = Delivery(event, NOW + timedelta(minutes=minute), None, responses.SOURCE)
    with transaction(engine) as connection:
        ledger.record(connection, [observation], TIMING)


def archive(engine: Engine) -> list[Any]:
    with transaction(engine) as connection:
        return [
            sorted(map(tuple, connection.execute(text(f"SELECT t::text FROM archiver.{table} t"))))
            for table in ("sessions", "chats", "messages")
        ]


@pytest.fixture
def filled(engine: Engine) -> Engine:
    for number in range(30):
        record(engine, created(f"c{number}", f"s{number % 10}"), minute=number)
    record(engine, deleted("c3", "s3"), created("late", None), deleted("c7", None), minute=40)
    for number in range(0, 10, 3):
        read(engine, f"s{number}", 50, "only history", "knows this")
    return engine


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilding, "PAGE_EVENTS", 7)
    monkeypatch.setattr(unassigned, "PAGE", 1)


def test_i10_an_archive_that_was_emptied_is_made_again_row_for_row_a_page_at_a_time(filled: Engine) -> None:
    before = archive(filled)
    with filled.begin() as connection:
        for table in ("messages", "chats", "sessions"):
            connection.execute(text(f"DELETE FROM archiver.{table} WHERE session_id <> ''"))
    steps = list(rebuild(filled, TIMING))
    assert archive(filled) == before
    assert sum(steps) == 30 + 3 + 4
    assert len([step for step in steps if step]) >= 5
    assert max(steps) <= 7


def test_i10_what_is_wrong_in_any_row_is_put_right(filled: Engine) -> None:
    before = archive(filled)
    with filled.begin() as connection:
        connection.execute(text("UPDATE archiver.messages SET content = 'forged', place = 9"))
        connection.execute(text("UPDATE archiver.chats SET status = 'forged', deleted_at = now()"))
        connection.execute(text("UPDATE archiver.sessions SET coverage = 'lost', read_by = now()"))
        connection.execute(
            text(
                "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at)"
                " VALUES ('invented', now(), now())"
            )
        )
    for _ in rebuild(filled, TIMING):
        pass
    ignored = "UPDATE archiver.sessions SET coverage = 'open', read_by = NULL WHERE session_id = ''"
    with filled.begin() as connection:
        connection.execute(text(ignored))
    assert archive(filled) == before


def test_i10_what_is_recorded_between_its_steps_is_in_the_archive_as_well(filled: Engine) -> None:
    for number, _ in enumerate(rebuild(filled, TIMING)):
        # In sessions that were made anew, in ones that are yet to be, in new ones, and in none.
        record(filled, created(f"between-{number}", "s0"), created(f"beside-{number}", "s9"), minute=60 + number)
        record(filled, created(f"new-{number}", f"aa-{number}"), created(f"homeless-{number}", None), minute=60)
    after = archive(filled)
    for _ in rebuild(filled, TIMING):
        pass
    assert archive(filled) == after


def test_i12_a_page_is_bounded_by_its_bytes_too(filled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilding, "PAGE_EVENTS", 1_000)
    few = len(list(rebuild(filled, TIMING)))
    monkeypatch.setattr(rebuilding, "PAGE_BYTES", 2_000)
    assert len(list(rebuild(filled, TIMING))) > few + 3
