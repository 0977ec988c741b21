"""Read many sessions: each once, each reported, whatever happens to leases and platform."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

import psycopg
import pytest
import stamina
import structlog
from pydantic import SecretStr
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import database_url as parse_url
from archiver.database import run_async
from archiver.events import responses
from archiver.history import ReconcileResult, Submit, leases
from archiver.history.callhq import UnauthorizedError
from archiver.history.opening import reconciling
from archiver.settings import Settings
from tests.support import servers
from tests.support.upstreams import API_KEY, CallHQ, Refusing, hosting, simulated
from tests.support.waiting import until

pytestmark = [
    pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True),
    pytest.mark.anyio,
]


@pytest.fixture
def callhq() -> Iterator[CallHQ]:
    with simulated(history_latency=0.02) as callhq:
        yield callhq


def settings(callhq: CallHQ, key: str = API_KEY) -> Settings:
    return Settings.model_construct(callhq_api_url=f"{callhq.url}/api", callhq_api_key=SecretStr(key))


async def register(submit: Submit, session_ids: Sequence[str]) -> None:
    now = datetime.now(UTC)
    await asyncio.gather(*(submit(responses.register({"id": each}), now) for each in session_ids))


async def test_leases_are_kept_for_as_long_as_the_reading_takes(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So short that the sessions outlast it; the constant alone is changed.
    monkeypatch.setattr(leases, "LEASE", timedelta(seconds=10))
    result: list[ReconcileResult] = []
    lapsed = text("SELECT count(*) FROM archiver.sessions WHERE leased_until < clock_timestamp()")
    with simulated(history_latency=0.3) as callhq:
        sessions = [callhq.session(f"s{n}", "ok") for n in range(40)]
        ids = [session.id for session in sessions]
        async with reconciling(settings(callhq), parse_url(database_url), concurrency=1) as (
            engine,
            reconciler,
            submit,
        ):
            await register(submit, ids)
            reading = asyncio.create_task(reconciler.read_all(ids, result.append))
            seen = set()
            while not reading.done():
                seen.add(await run_async(engine, lambda c: c.scalar(lapsed)))
            assert await reading == {"read": 40}
    assert seen == {0}
    assert Counter(reading.session_id for reading in result) == Counter(ids)
    texts = {session.id: len(session.messages()) for session in sessions}
    assert all(reading.recovered == texts[reading.session_id] for reading in result)


async def test_sessions_leased_by_another_reader_are_skipped(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(10)]
    result: list[ReconcileResult] = []
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, reconciler, submit):
        await register(submit, ids)
        now = datetime.now(UTC)
        await run_async(engine, lambda c: leases.claim(c, ids[:3], now, now + leases.LEASE))
        assert await reconciler.read_all(ids, result.append) == {"read": 7, "busy": 3}
    assert {reading.session_id for reading in result if reading.outcome == "busy"} == set(ids[:3])


async def test_one_session_that_is_refused_keeps_no_other_from_being_read(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(30)]
    callhq.refused = ids[0]
    result: list[ReconcileResult] = []
    with hosting(Refusing(callhq)) as callhq.url:
        async with reconciling(settings(callhq), parse_url(database_url)) as (engine, reconciler, submit):
            await register(submit, ids)
            assert await reconciler.read_all(ids, result.append) == {"read": 29, "failed": 1}
            (refused,) = [reading for reading in result if reading.outcome == "failed"]
            assert refused.session_id == ids[0]
            assert "CALLHQ_API_KEY" in refused.error
            # It backs off, as others do that fail.
            query = text("SELECT failing_since IS NOT NULL FROM archiver.sessions WHERE session_id = :session_id")
            failing = partial(Connection.scalar, statement=query, parameters={"session_id": ids[0]})
            assert await run_async(engine, failing)


async def test_a_worker_that_finds_nothing_doubts_the_url(database_url: str, callhq: CallHQ) -> None:
    session = callhq.session("s", "ok")

    async def lines(*session_ids: str, url: str) -> list[str]:
        configuration = settings(callhq).model_copy(update={"callhq_api_url": url})
        async with reconciling(configuration, parse_url(database_url), concurrency=1) as (_, reconciler, submit):
            await register(submit, session_ids)
            with structlog.testing.capture_logs() as item:
                await reconciler.read_all(session_ids)
        return [line["event"] for line in item if "CALLHQ_API_URL" in line["event"]]

    nobody = [f"nobody-{n}" for n in range(6)]
    assert len(await lines(*nobody, session.id, url=callhq.url)) == 1
    assert await lines(session.id, *nobody, url=f"{callhq.url}/api") == []


async def test_results_are_reported_however_the_run_ends(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(60)]
    result: list[ReconcileResult] = []
    async with reconciling(settings(callhq), parse_url(database_url), concurrency=1) as (engine, reconciler, submit):
        await register(submit, ids)
        some = asyncio.Event()

        def note(reading: ReconcileResult) -> None:
            result.append(reading)
            some.set()

        reading = asyncio.create_task(reconciler.read_all(ids, note))
        await some.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        query = text("SELECT session_id, repaired_messages FROM archiver.sessions WHERE read_at IS NOT NULL")
        read = await run_async(engine, lambda c: {row.session_id: row[1] for row in c.execute(query)})
    assert {each.session_id: each.recovered for each in result} == read
    assert 0 < len(read) < 60


async def test_i12_a_session_that_was_handed_out_twice_is_read_once(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(10)]
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, reconciler, submit):
        await register(submit, ids)
        times = []
        for minutes in (10, 20):
            now = datetime.now(UTC) + timedelta(minutes=minutes)
            until_then = now + timedelta(minutes=10)
            due = await run_async(engine, partial(leases.select_due, now=now, limit=100))
            claim_listed = partial(leases.claim_listed, due=due, now=now, until=until_then)
            assert {each for each, _ in await run_async(engine, claim_listed)} == set(ids)
            times.append(until_then)
        assert await reconciler.read_all(ids, due_at=times[0]) == {}
        assert await reconciler.read_all(ids, due_at=times[1]) == {"read": 10}
        assert await reconciler.read_all(ids, due_at=times[1]) == {}


async def test_a_preview_of_all_sessions_waits_for_no_pause(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(2)]
    result: list[ReconcileResult] = []
    with psycopg.connect(database_url, autocommit=True) as connection:

        def pause(reading: ReconcileResult) -> None:
            result.append(reading)
            if len(result) == len(ids):
                query = "INSERT INTO archiver.pauses (name, until, reason) VALUES ('callhq', now() + '1 hour', '429')"
                connection.execute(query)

        async with reconciling(settings(callhq), parse_url(database_url)) as (_, reconciler, submit):
            await register(submit, ids)
            async with asyncio.timeout(120):
                assert await reconciler.preview_all(ids, pause) == {"read": 2}


async def test_a_refused_key_gives_every_lease_back(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(10)]
    async with reconciling(settings(callhq, "wrong"), parse_url(database_url)) as (engine, reconciler, submit):
        await register(submit, ids)
        with pytest.raises(UnauthorizedError):
            await reconciler.read_all(ids)
        now = datetime.now(UTC)
        assert set(await run_async(engine, lambda c: leases.claim(c, ids, now, now))) == set(ids)


async def lease_of(engine: AsyncEngine, session_id: str) -> datetime | None:
    statement = text("SELECT leased_until FROM archiver.sessions WHERE session_id = :session_id")
    return await run_async(engine, lambda c: c.scalar(statement, {"session_id": session_id}))


async def test_a_reader_that_overslept_leaves_the_lease_of_the_next_one_alone(
    database_url: str, callhq: CallHQ
) -> None:
    session = callhq.session("s", "ok")
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, _, submit):
        await register(submit, [session.id])
        began = datetime.now(UTC)
        own, others = began + leases.LEASE, began + 2 * leases.LEASE
        await run_async(engine, lambda c: leases.claim(c, [session.id], began, own))
        woken = own + timedelta(seconds=1)
        assert await run_async(engine, lambda c: leases.claim(c, [session.id], woken, others))
        await run_async(engine, lambda c: leases.release(c, {session.id: own}))
        assert await lease_of(engine, session.id) == others
        postpone = partial(leases.postpone, session_id=session.id, lease=own, until=woken, failing_since=woken)
        await run_async(engine, postpone)
        assert await lease_of(engine, session.id) == others
        renew = partial(leases.renew, leased={session.id: own}, until=woken + leases.LEASE)
        assert await run_async(engine, renew) == set()
        await submit(responses.parse_history(session.id, 404, b""), began)
        assert await lease_of(engine, session.id) == others


async def test_only_a_failure_that_goes_on_after_a_session_expired_is_taken_for_an_answer(
    database_url: str, callhq: CallHQ
) -> None:
    ids = [callhq.session("s", "ok").id]
    nowhere = settings(callhq).model_copy(update={"callhq_api_url": "http://127.0.0.1:9/api"})
    with stamina.set_testing(True, attempts=1):
        async with reconciling(nowhere, parse_url(database_url)) as (engine, reconciler, submit):
            await submit(responses.register({"id": ids[0]}), datetime.now(UTC) - timedelta(days=30))
            assert await reconciler.read_all(ids) == {"failed": 1}
            assert await reconciler.read_all(ids) == {"failed": 1}
            fails_long = text("UPDATE archiver.sessions SET failing_since = failing_since - interval '2 hours'")
            await run_async(engine, lambda c: c.execute(fails_long))
            assert await reconciler.read_all(ids) == {"unavailable": 1}
            failing = text("SELECT failing_since FROM archiver.sessions WHERE session_id <> ''")
            assert await run_async(engine, lambda c: c.scalar(failing)) is None


async def test_leasing_goes_on_where_another_transaction_was_in_the_way(database_url: str, callhq: CallHQ) -> None:
    ids = sorted(callhq.session(f"s{n}", "ok").id for n in range(2))
    lock = "UPDATE archiver.sessions SET reason = reason WHERE session_id = %s"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET deadlock_timeout = '5s'")
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, _, submit):
        await register(submit, ids)
        async with await psycopg.AsyncConnection.connect(database_url) as other:
            # It will take the two in the opposite order, and Postgres ends whoever looks for deadlocks first: us.
            await other.execute("SET deadlock_timeout = '120s'")
            await other.execute(lock, [ids[1]])
            now = datetime.now(UTC)
            claim = partial(leases.claim, session_ids=ids, now=now, until=now + leases.LEASE)
            claiming = asyncio.create_task(run_async(engine, claim))
            await asyncio.to_thread(until, lambda: is_blocked(database_url), "it waits for the other")
            await other.execute(lock, [ids[0]])
            await other.commit()
        assert set(await claiming) == set(ids)


def is_blocked(database_url: str) -> bool:
    with psycopg.connect(database_url) as looking:
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
        )
        return looking.execute(query).fetchone() != (0,)


async def test_a_session_discovered_by_its_reading_has_no_later_events_when_clocks_differ(
    database_url: str, callhq: CallHQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, begun = callhq.session("s", "ok"), datetime.now(UTC)
    monkeypatch.setattr("archiver.database.now", lambda: datetime.now(UTC) + timedelta(seconds=10))
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, reconciler, _):
        assert await reconciler.discover_all([session.id]) == {"read": 1}
        read = partial(leases.select_read, session_ids=[session.id], since=begun)
        assert await run_async(engine, read) == {session.id}
