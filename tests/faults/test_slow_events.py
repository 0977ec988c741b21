"""One event that is slow, waits for another transaction, or fails, while Postgres works: no other waits (I4)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from archiver import database, events
from archiver.events import Content, Delivery, responses
from archiver.events.responses import SOURCE
from archiver.inbound import CONNECTIONS, Ingest, Outcome, draining, fallback, isolated, retry_quarantined
from archiver.inbound import __name__ as ingest_module
from archiver.inbound.spool import Spool, open_spool
from archiver.ledger import quarantine
from tests.support import servers
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver
from tests.support.rows import rows
from tests.support.slowness import holding, quick_rows, slow_rows
from tests.support.waiting import until

pytestmark = [
    pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True),
    pytest.mark.anyio,
]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOM = 16 * 1_048_576
SLEEP = "PERFORM pg_sleep(60)"


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants alone differ, in the same order: what is not slow has time, on a machine that stalls."""
    monkeypatch.setattr(fallback, "SPOOL_AFTER_SECONDS", 6.0)
    monkeypatch.setattr(f"{ingest_module}.SPOOL_AFTER_SECONDS", 6.0)
    monkeypatch.setattr(draining, "FULL_SECONDS", 3.0)
    monkeypatch.setattr(draining, "INITIAL_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(isolated, "SECONDS", 12.0)
    monkeypatch.setattr(isolated, "PAUSE_SECONDS", 0.1)


@asynccontextmanager
async def ingesting(url: str, spool: Spool | None) -> AsyncIterator[Ingest]:
    writing = database.connect_async(database.database_url(url), pool_size=CONNECTIONS)
    ingest = Ingest(writing, queue_events=10_000, queue_bytes=10**8, batch_events=100)
    try:
        async with asyncio.timeout(400), ingest.running(spool):
            yield ingest
    finally:
        await writing.dispose()
        if spool is not None:
            spool.close()


async def submit(ingest: Ingest, *bodies: bytes) -> list[str]:
    deliveries = [Delivery(events.parse(body), NOW, "key") for body in bodies]
    outcomes: list[Outcome] = await asyncio.gather(*map(ingest.submit, deliveries))
    return [outcome.status for outcome in outcomes]


def spooled(body: bytes) -> Delivery[Content]:
    return Delivery(events.parse(body), NOW, "key")


def others(count: int, name: str = "other") -> list[bytes]:
    return [created(f"{name}-{number}", f"{name}-session-{number}") for number in range(count)]


def count_others(engine: Engine) -> int:
    return int(rows(engine, "SELECT count(*) FROM archiver.events WHERE chat_id LIKE 'other%'")[0][0])


async def until_soon(condition: Any, what: str) -> None:
    await asyncio.to_thread(until, condition, what)


async def test_i4_events_beside_a_slow_one_are_archived_and_the_circuit_stays_closed(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", SLEEP)
    spool = open_spool(tmp_path, ROOM)
    async with ingesting(database_url, spool) as ingest:
        statuses = await submit(ingest, created("slow", "s", input="slow"), *others(50))
        assert set(statuses) <= {"stored", "spooled"}
        await until_soon(lambda: count_others(engine) == 50, "all others are archived")
        assert ingest.fallback is not None
        assert not ingest.fallback.is_open
        assert await submit(ingest, *others(5, "other-later")) == ["stored"] * 5
        await asyncio.to_thread(quick_rows, engine, "archiver.messages")
        await until_soon(lambda: spool.depth().events == 0, "and in the end the slow one too")
    query = "SELECT status FROM (SELECT count(*) AS status FROM archiver.chats WHERE chat_id = 'slow') AS found"
    assert rows(engine, query) == [(1,)]
    assert rows(engine, "SELECT max(delivery_count) FROM archiver.events") == [(1,)]


async def test_i4_an_event_that_exceeds_its_own_budget_is_quarantined_and_can_be_retried(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", SLEEP)
    body = created("slow", "s", input="slow")
    spool = open_spool(tmp_path, ROOM)
    async with ingesting(database_url, spool) as ingest:
        assert await submit(ingest, body) == ["spooled"]
        await until_soon(lambda: spool.depth().events == 0, "it is off the spool")
    rows_found = rows(engine, "SELECT id, reason, body, delivery_count FROM archiver.quarantine")
    assert [(reason, bytes(remaining), count) for _, reason, remaining, count in rows_found] == [
        ("too_slow", body, 1)
    ]
    slow_rows(engine, "archiver.messages", "content", "slow", "PERFORM pg_sleep(13)")  # more than its budget
    retried = archiver("quarantine", "retry", str(rows_found[0][0]), database_url=database_url)
    assert (retried.returncode, rows(engine, "SELECT count(*) FROM archiver.quarantine")) == (0, [(0,)])
    assert rows(engine, "SELECT body FROM archiver.events") == [(body,)]


async def test_i4_a_spool_full_of_events_with_several_slow_ones_is_drained_at_a_start(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", SLEEP)
    spool = open_spool(tmp_path, ROOM)
    bodies = others(500)
    for place in (0, 3, 250, 499):
        bodies.insert(place, created(f"slow-{place}", f"slow-{place}", input="slow"))
    spool.append([spooled(body) for body in bodies])
    spool.close()
    async with ingesting(database_url, open_spool(tmp_path, ROOM)) as ingest:
        await until_soon(lambda: count_others(engine) == 500, "all others are archived")
        assert await submit(ingest, created("other-new", "new")) == ["stored"]
        await asyncio.to_thread(quick_rows, engine, "archiver.messages")
        assert ingest.fallback is not None
        left = ingest.fallback.spool
        await until_soon(lambda: left.depth().events == 0, "and in the end the slow ones too")
    settled = "SELECT (SELECT count(*) FROM archiver.events) + (SELECT count(*) FROM archiver.quarantine)"
    assert rows(engine, settled) == [(505,)]


async def test_i4_a_slow_unassigned_deletion_delays_no_other(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.chats", "chat_id", "slow", SLEEP)
    spool = open_spool(tmp_path, ROOM)
    async with ingesting(database_url, spool) as ingest:
        first = asyncio.create_task(submit(ingest, deleted("slow", None)))
        await until_soon(lambda: waits(engine), "it is being written")
        for number in range(5):
            bodies = [*others(10, f"other-{number}"), deleted(f"other-deleted-{number}", None)]
            assert set(await submit(ingest, *bodies)) <= {"stored", "spooled"}
        await until_soon(lambda: count_others(engine) == 55, "all others are archived")
        assert await first == ["spooled"]
        await asyncio.to_thread(quick_rows, engine, "archiver.chats")
        await until_soon(lambda: spool.depth().events == 0, "and in the end this one too")


def waits(engine: Engine) -> bool:
    return bool(rows(engine, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))


async def test_i4_an_event_written_alone_holds_no_lock_that_others_wait_for(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.chats", "chat_id", "slow", SLEEP)
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(deleted("slow", None))])
    async with ingesting(database_url, spool) as ingest:
        query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND now() - xact_start > interval '7 s'"
        await until_soon(lambda: rows(engine, query), "it is being written alone")
        assert await submit(ingest, *others(10)) == ["stored"] * 10
        assert await submit(ingest, deleted("other-deleted", None)) == ["stored"]
        await asyncio.to_thread(quick_rows, engine, "archiver.chats")


async def test_i4_without_a_spool_a_slow_event_fails_alone(database_url: str, engine: Engine) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", SLEEP)
    async with ingesting(database_url, None) as ingest:
        slow = [created(f"slow-{number}", f"slow-{number}", input="slow") for number in range(2)]
        statuses = await submit(ingest, slow[0], *others(20), slow[1])
        assert statuses == ["quarantined", *["stored"] * 20, "quarantined"]
    assert rows(engine, "SELECT DISTINCT reason FROM archiver.quarantine") == [("too_slow",)]


async def test_i4_a_session_that_another_program_holds_holds_up_no_other(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    spool = open_spool(tmp_path, ROOM)
    async with ingesting(database_url, spool) as ingest:
        assert await submit(ingest, created("held-1", "held")) == ["stored"]
        locks = "SELECT 1 FROM archiver.sessions WHERE session_id = 'held' FOR UPDATE"
        with holding(engine, locks):
            assert set(await submit(ingest, created("held-2", "held"), *others(20))) <= {"stored", "spooled"}
            await until_soon(lambda: count_others(engine) == 20, "all others are archived")
            assert ingest.fallback is not None
            assert not ingest.fallback.is_open
            assert await submit(ingest, created("held-3", "held"), created("other-last", "o")) == [
                "spooled",
                "stored",
            ]
        await until_soon(lambda: spool.depth().events == 0, "and then those of that session")
    held = "SELECT chat_id FROM archiver.events WHERE session_id = 'held' ORDER BY chat_id"
    assert rows(engine, held) == [("held-1",), ("held-2",), ("held-3",)]
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


async def test_i4_an_event_that_ends_its_connection_holds_up_no_other(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", "PERFORM pg_terminate_backend(pg_backend_pid())")
    body = created("slow", "s", input="slow")
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(each) for each in [body, *others(300)]])
    async with ingesting(database_url, spool) as ingest:
        await until_soon(lambda: count_others(engine) == 300, "all others are archived")
        await until_soon(lambda: spool.depth().events == 0, "it is off the spool")
        assert await submit(ingest, created("other-new", "new")) == ["stored"]
    rows_found = rows(engine, "SELECT reason, body FROM archiver.quarantine")
    assert rows_found == [("not_storable", body)]


async def test_i4_an_event_that_crashes_postgres_is_quarantined_and_others_are_archived(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    crash = "COPY (SELECT 1) TO PROGRAM ''kill -9 $PPID''"
    slow_rows(engine, "archiver.messages", "content", "crash", f"EXECUTE '{crash}'")
    body = created("crash", "s", input="crash")
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(each) for each in [*others(10), body, *others(30)[10:]]])
    async with ingesting(database_url, spool) as ingest:
        await until_soon(lambda: spool.depth().events == 0, "it is off the spool")
        assert await submit(ingest, created("other-new", "new")) == ["stored"]
    assert count_others(engine) == 31
    assert rows(engine, "SELECT reason, body FROM archiver.quarantine") == [("not_storable", body)]


async def test_the_circuit_opens_where_every_event_is_slow(database_url: str, engine: Engine, tmp_path: Path) -> None:
    slow_rows(engine, "archiver.messages", "role", "user", SLEEP)
    spool = open_spool(tmp_path, ROOM)
    async with ingesting(database_url, spool) as ingest:
        assert await submit(ingest, *others(3)) == ["spooled"] * 3
        assert ingest.fallback is not None
        assert ingest.fallback.is_open
        await asyncio.to_thread(quick_rows, engine, "archiver.messages")
        await until_soon(lambda: spool.depth().events == 0, "it takes events again")
        assert await submit(ingest, created("other-last", "o")) == ["stored"]
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


async def test_i4_a_slow_history_is_quarantined_with_what_it_is_and_holds_up_no_other(
    database_url: str, engine: Engine
) -> None:
    slow_rows(engine, "archiver.messages", "content", "slow", SLEEP)

    def answer(session_id: str, content: str) -> Delivery[Content]:
        body = f'{{"session": {{"id": "{session_id}", "messages": [{{"role": "user", "content": "{content}"}}]}}}}'
        return Delivery(responses.parse_history(session_id, 200, body.encode()), NOW, None, SOURCE)

    async with ingesting(database_url, None) as ingest:
        answers = [answer("slow", "slow"), *(answer(f"quick-{number}", "quick") for number in range(10))]
        outcomes = await asyncio.gather(*map(ingest.submit, answers))
    assert [outcome.status for outcome in outcomes] == ["quarantined", *["stored"] * 10]
    await asyncio.to_thread(quick_rows, engine, "archiver.messages")
    with database.transaction(engine) as connection:
        (row,) = quarantine.select_quarantine(connection)
    assert (row["reason"], row["session_id"], row["source"]) == ("too_slow", "slow", SOURCE)
    retried = retry_quarantined(engine, row["id"])
    assert retried is not None
    assert retried.status == "stored"
