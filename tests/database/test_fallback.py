"""Deliveries that Postgres does not accept: the circuit, the spool, the files of exited processes (I1)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from archiver import database, events
from archiver.events import Delivery
from archiver.inbound import Ingest, Outcome, UnavailableError, draining, fallback
from archiver.inbound.spool import Spool, open_spool
from tests.support import servers
from tests.support.payloads import created
from tests.support.proxies import proxied
from tests.support.rows import execute, rows
from tests.support.waiting import until

pytestmark = [
    pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True),
    pytest.mark.anyio,
]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOM = 4 * 1_048_576


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants alone are shorter; that one is longer after which a delivery is spooled."""
    monkeypatch.setattr(fallback, "SPOOL_AFTER_SECONDS", 8.0)
    monkeypatch.setattr(draining, "INITIAL_PAUSE_SECONDS", 0.01)
    for module in (fallback, draining):
        monkeypatch.setattr(module, "MAX_PAUSE_SECONDS", 0.05)


@asynccontextmanager
async def ingesting(url: str, spool: Spool) -> AsyncIterator[Ingest]:
    writing = database.connect_async(database.database_url(url), pool_size=2)
    ingest = Ingest(writing, queue_events=1_000, queue_bytes=10**8, batch_events=100)
    try:
        async with asyncio.timeout(300), ingest.running(spool):
            yield ingest
    finally:
        await writing.dispose()
        spool.close()


async def submit(ingest: Ingest, *bodies: bytes) -> list[str]:
    deliveries = [Delivery(events.parse(body), NOW, "key") for body in bodies]
    outcomes: list[Outcome] = await asyncio.gather(*map(ingest.submit, deliveries))
    return [outcome.status for outcome in outcomes]


def is_open(ingest: Ingest) -> bool:
    return ingest.fallback is not None and ingest.fallback.is_open


async def until_soon(condition: Any, what: str) -> None:
    await asyncio.to_thread(until, condition, what)


async def test_no_request_waits_for_a_database_that_is_known_to_be_away(database_url: str, tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    with proxied(database_url) as (proxy, through):
        async with ingesting(through, spool) as ingest:
            assert await submit(ingest, created("before")) == ["stored"]
            proxy.set("silent")
            assert await submit(ingest, created("first")) == ["spooled"]
            assert is_open(ingest)
            # All of these would wait for longer if each asked the database.
            async with asyncio.timeout(20 * fallback.SPOOL_AFTER_SECONDS):
                for number in range(20):
                    assert await submit(ingest, created(f"later-{number}")) == ["spooled"]
            proxy.set("cut")
            proxy.set("pass")
            await until_soon(lambda: spool.depth().events == 0, "what was spooled is archived")
            assert not is_open(ingest)
            assert await submit(ingest, created("after")) == ["stored"]


async def test_what_was_spooled_is_archived_in_the_order_in_which_it_came(
    database_url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "FULL_SECONDS", 60.0)
    spool = open_spool(tmp_path, ROOM)
    spool.append([Delivery(events.parse(created(f"c{number}", "s")), NOW, "key") for number in range(450)])
    async with ingesting(database_url, spool):
        await until_soon(lambda: spool.depth().events == 0, "what was spooled is archived")
    batches = rows(engine, "SELECT min(id), count(*) FROM archiver.events GROUP BY xmin::text ORDER BY 1")
    assert [count for _, count in batches] == [200, 200, 50]
    first = f"SELECT count(*) FROM archiver.events WHERE id < {batches[1][0]} AND substr(chat_id, 2)::int < 200"
    assert rows(engine, first) == [(200,)]


async def test_i4_one_event_that_takes_too_long_holds_up_no_other(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    execute(
        engine,
        "CREATE FUNCTION public.ponder() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF new.content = 'slow' THEN PERFORM pg_sleep(30); END IF; RETURN new; END $$",
        "CREATE TRIGGER ponder BEFORE INSERT ON archiver.messages FOR EACH ROW EXECUTE FUNCTION public.ponder()",
    )
    spool = open_spool(tmp_path, ROOM)
    spool.append(
        [
            Delivery(
                events.parse(created(f"c{number}", f"s{number}", input="slow" if number == 3 else "x")), NOW, "key"
            )
            for number in range(8)
        ]
    )
    async with ingesting(database_url, spool) as ingest:
        await until_soon(lambda: spool.depth().events == 1, "all others are archived")
        assert await submit(ingest, created("new")) == ["stored"]
        await asyncio.to_thread(execute, engine, "DROP TRIGGER ponder ON archiver.messages")
        await until_soon(lambda: spool.depth().events == 0, "and in the end this one too")
    assert rows(engine, "SELECT count(*), max(delivery_count) FROM archiver.events") == [(9, 1)]


async def test_i1_what_other_processes_left_behind_is_archived(
    database_url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "ADOPT_SECONDS", 0.05)
    own, ended, living = (open_spool(tmp_path, ROOM) for _ in range(3))
    for number, spool in enumerate((own, ended, living)):
        spool.append([Delivery(events.parse(created(f"c{number}", "s")), NOW, "key")])
    ended.close()
    async with ingesting(database_url, own):
        query = "SELECT chat_id FROM archiver.events ORDER BY 1"
        await until_soon(lambda: rows(engine, query) == [("c0",), ("c1",)], "its own, and what was left behind")
    # A file that somebody holds is theirs.
    assert living.depth().events == 1
    living.close()


async def test_a_database_that_took_nothing_is_asked_again_though_the_spool_took_nothing_either(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(tmp_path, 1_048_576)
    with proxied(database_url) as (proxy, through):
        async with ingesting(through, spool) as ingest:
            proxy.set("cut")
            with pytest.raises(UnavailableError):
                await submit(ingest, created("large", input="x" * 2_000_000))
            assert spool.depth().events == 0
            assert is_open(ingest)
            proxy.set("pass")
            await until_soon(lambda: not is_open(ingest), "it is found to be back")
            assert await submit(ingest, created("large", input="x" * 2_000_000)) == ["stored"]
