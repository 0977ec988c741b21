"""Batches in a real Postgres: shared transactions, one outcome each, invalid deliveries, limits, outages."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine, text

from archiver import database, events
from archiver.events import Content, Delivery, responses
from archiver.inbound import Ingest, Outcome, QueueFullError, UnavailableError, retry_quarantined
from tests.conftest import Cluster
from tests.support.feeds import published
from tests.support.ingestion import NOW, Receiver, delivery, outcomes, take
from tests.support.payloads import created, deleted, envelope
from tests.support.rows import execute, rows
from tests.support.waiting import until

POISON = "poison"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is given up because the machine stalls: the constant alone is longer."""
    monkeypatch.setattr("archiver.inbound.SPOOL_AFTER_SECONDS", 60.0)


@asynccontextmanager
async def ingesting(
    engine: Engine,
    queue_events: int = 1000,
    queue_bytes: int = 10_000_000,
    batch_events: int = 500,
    gather_seconds: float = 0,
) -> AsyncIterator[Ingest]:
    writing = database.connect_async(engine.url)
    ingest = Ingest(
        writing,
        queue_events=queue_events,
        queue_bytes=queue_bytes,
        batch_events=batch_events,
        gather_seconds=gather_seconds,
    )
    try:
        async with asyncio.timeout(120), ingest.running():
            yield ingest
    finally:
        await writing.dispose()


def submit(ingest: Ingest, body: bytes, seconds: float = 0) -> asyncio.Task[Outcome]:
    return asyncio.create_task(ingest.submit(delivery(body, seconds)))


@contextmanager
def stalled(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Nobody writes to the ledger meanwhile."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE archiver.events IN ACCESS EXCLUSIVE MODE")
        yield connection
        connection.rollback()


def _waiting_backend(url: str) -> int | None:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'archiver.events'::regclass"
        ).fetchone()
        return None if row is None else int(row[0])


async def waiting_backend(url: str) -> int:
    """The process id of the transaction that waits for the ledger, once there is one."""
    async with asyncio.timeout(120):
        while (pid := await asyncio.to_thread(_waiting_backend, url)) is None:
            pass
    return pid


@pytest.fixture
def url(database_url: str) -> str:
    return database.database_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)


# Sharing a transaction


async def test_what_arrives_during_a_commit_shares_the_next_transaction(engine: Engine, url: str) -> None:
    async with ingesting(engine, batch_events=20) as ingest:
        with stalled(url):
            first = submit(ingest, created("first"))
            await waiting_backend(url)
            others = [submit(ingest, created(f"chat-{n}")) for n in range(49)]
            await asyncio.sleep(0)
        await asyncio.gather(first, *others)
    shared = rows(engine, "SELECT count(*) FROM archiver.events GROUP BY xmin ORDER BY min(id)")
    assert shared == [(1,), (20,), (20,), (9,)]


async def test_each_caller_gets_its_own_outcome_in_any_order_of_keys(engine: Engine) -> None:
    names = [f"chat-{n}" for n in range(60)]
    random.Random(4).shuffle(names)
    async with ingesting(engine) as ingest:
        answers = await asyncio.gather(*(submit(ingest, created(name, f"session-{name}")) for name in names))
    stored = dict(rows(engine, "SELECT id, chat_id FROM archiver.events"))
    assert [stored[answer.id] for answer in answers] == names
    assert {answer.status for answer in answers} == {"stored"}


def test_every_status_in_one_batch_is_given_to_its_own_delivery(engine: Engine) -> None:
    take(engine, created("known"))
    answers = take(
        engine,
        b"not json",
        created("z"),
        b'{"type": "assistant.renamed"}',
        created("known", at=5),
        created("a"),
        b"[]",
        created("z", at=9),
        b"not json",
    )
    assert [(answer.status, answer.reason) for answer in answers] == [
        ("quarantined", "not_json"),
        ("stored", None),
        ("ignored", None),
        ("duplicate", None),
        ("stored", None),
        ("quarantined", "not_an_object"),
        ("duplicate", None),
        ("quarantined", "not_json"),
    ]
    assert answers[1].id == answers[6].id
    assert answers[0].id == answers[7].id != answers[5].id


async def test_i3_duplicates_within_a_batch_are_one_row_and_one_outcome_is_stored(engine: Engine, url: str) -> None:
    async with ingesting(engine) as ingest:
        with stalled(url):
            tasks = [submit(ingest, created(at=at)) for at in range(10)]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks)
    assert sorted(answer.status for answer in answers) == ["duplicate"] * 9 + ["stored"]
    assert rows(engine, "SELECT id, delivery_count FROM archiver.events") == [(answers[0].id, 10)]
    assert {answer.id for answer in answers} == {answers[0].id}


def test_a_batch_larger_than_the_drivers_parameters_is_stored_whole(engine: Engine) -> None:
    bodies = [created(f"chat-{n}", f"session-{n}") for n in range(6000)]
    assert {answer.status for answer in take(engine, *bodies)} == {"stored"}
    turn = created("long", "session-long", output=[{"role": "assistant", "content": str(n)} for n in range(1900)])
    take(engine, turn)
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(6001,)]
    assert rows(engine, "SELECT count(*), count(DISTINCT position) FROM analytics.messages") == [(13901, 1901)]


# Poison


@pytest.fixture
def poisoned(engine: Engine) -> Engine:
    """A database that refuses one content with SQLSTATE 23514, and another, by a trigger, with 22023."""
    execute(
        engine,
        f"ALTER TABLE archiver.messages ADD CONSTRAINT no_poison CHECK (content <> '{POISON}')",
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF new.content = 'venom' THEN RAISE EXCEPTION 'hunter2' USING ERRCODE = '22023'; END IF;"
        " RETURN new; END $$",
        "CREATE TRIGGER refuse BEFORE INSERT ON archiver.messages FOR EACH ROW EXECUTE FUNCTION public.refuse()",
    )
    return engine


@pytest.mark.parametrize(
    "places",
    [{0}, {6}, {12}, {0, 12}, {5, 6, 7}, set(range(0, 13, 2)), set(range(13)), set()],
    ids=lambda places: "-".join(map(str, sorted(places))) or "none",
)
@pytest.mark.parametrize(("content", "state"), [(POISON, "23514"), ("venom", "22023")])
def test_i4_poison_is_found_and_the_rest_of_its_batch_commits(
    poisoned: Engine, places: set[int], content: str, state: str
) -> None:
    bodies = [created(f"chat-{n}", input=content if n in places else f"question {n}") for n in range(13)]
    answers = take(poisoned, *bodies)
    assert [answer.status for answer in answers] == ["quarantined" if n in places else "stored" for n in range(13)]
    assert {(answer.reason, answer.detail) for answer in answers if answer.reason} <= {
        ("not_storable", f"Postgres refused the event with SQLSTATE {state}.")
    }
    remaining = dict(rows(poisoned, "SELECT id, body FROM archiver.quarantine"))
    stored = dict(rows(poisoned, "SELECT id, body FROM archiver.events"))
    assert (len(remaining), len(stored)) == (len(places), 13 - len(places))
    for number, answer in enumerate(answers):
        assert bytes((remaining if number in places else stored)[answer.id]) == bodies[number]
    assert rows(poisoned, "SELECT count(*) FROM archiver.chats") == [(13 - len(places),)]
    assert rows(poisoned, f"SELECT count(*) FROM archiver.messages WHERE content IN ('{POISON}', 'venom')") == [(0,)]


def test_i4_poison_among_what_cannot_be_read_and_what_is_known(poisoned: Engine) -> None:
    take(poisoned, created("known"))
    answers = take(
        poisoned,
        b"{",
        created("known", at=7),
        created("bad", input=POISON),
        created("new"),
        created("bad", input=POISON),
        created("new", at=8),
    )
    statuses = ["quarantined", "duplicate", "quarantined", "stored", "quarantined", "duplicate"]
    assert [answer.status for answer in answers] == statuses
    assert answers[2].id == answers[4].id
    assert rows(poisoned, "SELECT chat_id, delivery_count FROM archiver.events ORDER BY 1") == [
        ("known", 2),
        ("new", 2),
    ]
    assert rows(poisoned, "SELECT reason, delivery_count FROM archiver.quarantine ORDER BY 1") == [
        ("not_json", 1),
        ("not_storable", 2),
    ]


async def test_i4_concurrent_callers_of_a_poisoned_batch_get_their_own_answers(poisoned: Engine, url: str) -> None:
    async with ingesting(poisoned) as ingest:
        with stalled(url):
            tasks = [submit(ingest, created(f"c{n}", input=POISON if n % 5 == 0 else "fine")) for n in range(20)]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks)
    assert [answer.status == "quarantined" for answer in answers] == [n % 5 == 0 for n in range(20)]


def test_i4_the_quarantine_keeps_exact_bytes_and_counts_redeliveries(poisoned: Engine) -> None:
    body = b" " + created(input=POISON) + b"\n"
    ids = {take(poisoned, body, seconds=seconds)[0].id for seconds in (5, 9, 7)}
    assert len(ids) == 1
    assert rows(
        poisoned,
        "SELECT body, reason, delivery_count, received_at, last_received_at, key_id FROM archiver.quarantine",
    ) == [(body, "not_storable", 3, NOW + timedelta(seconds=5), NOW + timedelta(seconds=9), "key-1")]


def test_a_quarantine_row_and_a_log_line_hold_nothing_of_what_the_database_said(
    poisoned: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    take(poisoned, created(input="venom"))
    assert rows(poisoned, "SELECT count(*) FROM archiver.quarantine WHERE detail LIKE '%hunter2%'") == [(0,)]
    printed = capsys.readouterr()
    assert not {"hunter2", "venom"} & set((printed.out + printed.err).replace("'", " ").split())


def test_i4_a_retry_archives_what_was_repaired_with_its_first_time_and_empties_the_quarantine(
    poisoned: Engine,
) -> None:
    body = created(input=POISON)
    (refused,) = take(poisoned, body, seconds=-3600)
    execute(poisoned, "ALTER TABLE archiver.messages DROP CONSTRAINT no_poison")
    outcome = retry_quarantined(poisoned, refused.id)
    assert outcome is not None
    assert outcome.status == "stored"
    assert rows(poisoned, "SELECT id, body, received_at, key_id FROM archiver.events") == [
        (outcome.id, body, NOW - timedelta(hours=1), "key-1")
    ]
    assert rows(poisoned, "SELECT count(*) FROM archiver.quarantine") == [(0,)]
    assert (POISON,) in rows(poisoned, "SELECT content FROM analytics.messages")
    assert retry_quarantined(poisoned, refused.id) is None


def test_i11_a_split_batch_publishes_each_stored_event_once_and_a_retry_the_rest(poisoned: Engine) -> None:
    bodies = [created(f"c{n}", "s", input=POISON if n == 3 else "harmless") for n in range(6)]
    refused = take(poisoned, *bodies, *bodies)[3]
    assert [chat_id for _, _, chat_id in published(poisoned)] == ["c0", "c1", "c2", "c4", "c5"]
    execute(poisoned, "ALTER TABLE archiver.messages DROP CONSTRAINT no_poison")
    retry_quarantined(poisoned, refused.id)
    assert published(poisoned)[5:] == [("chat.created", "s", "c3")]


def test_i4_a_history_that_was_quarantined_is_retried_as_the_history_that_it_is(poisoned: Engine) -> None:
    def answered(session_id: str) -> Delivery[Content]:
        body = b'{"session": {"messages": [{"role": "user", "content": "poison"}]}}'
        return Delivery(responses.parse_history(session_id, 200, body), NOW, None, source=responses.SOURCE)

    with Receiver(poisoned) as receiver:
        refused = outcomes(receiver.write([answered("s1"), answered("s2"), answered("s1")]))
    assert [outcome.status for outcome in refused] == ["quarantined"] * 3
    # The same bytes tell of two sessions.
    assert len({outcome.id for outcome in refused}) == 2
    execute(poisoned, "ALTER TABLE archiver.messages DROP CONSTRAINT no_poison")
    for outcome in refused[:2]:
        retried = retry_quarantined(poisoned, outcome.id)
        assert retried is not None
        assert retried.status == "stored"
    assert rows(poisoned, "SELECT count(*) FROM archiver.quarantine") == [(0,)]
    assert rows(poisoned, "SELECT session_id, type, source, delivery_count FROM archiver.events ORDER BY 1") == [
        ("s1", "history.read", "history", 2),
        ("s2", "history.read", "history", 1),
    ]
    assert rows(poisoned, "SELECT session_id, content FROM analytics.messages ORDER BY 1") == [
        ("s1", POISON),
        ("s2", POISON),
    ]


def test_i3_a_retry_of_a_delivery_that_was_redelivered_is_a_duplicate(poisoned: Engine) -> None:
    (refused,) = take(poisoned, created(input=POISON))
    execute(poisoned, "ALTER TABLE archiver.messages DROP CONSTRAINT no_poison")
    (stored,) = take(poisoned, created(input=POISON))
    outcome = retry_quarantined(poisoned, refused.id)
    assert outcome is not None
    assert (outcome.status, outcome.id) == ("duplicate", stored.id)
    assert rows(poisoned, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


def test_i4_a_retry_of_what_is_still_poisonous_leaves_it(poisoned: Engine) -> None:
    bad, unread = take(poisoned, created(input=POISON), b"{")
    before = rows(poisoned, "SELECT * FROM archiver.quarantine ORDER BY id")
    for answer in (bad, unread):
        outcome = retry_quarantined(poisoned, answer.id)
        assert outcome is not None
        assert (outcome.status, outcome.id, outcome.reason) == ("quarantined", answer.id, answer.reason)
    assert rows(poisoned, "SELECT * FROM archiver.quarantine ORDER BY id") == before
    assert rows(poisoned, "SELECT count(*) FROM archiver.events") == [(0,)]
    assert retry_quarantined(poisoned, 10**9) is None


def test_i4_two_retries_at_once_archive_it_once(poisoned: Engine) -> None:
    ids = [take(poisoned, created(f"chat-{n}", input=POISON))[0].id for n in range(10)]
    execute(poisoned, "ALTER TABLE archiver.messages DROP CONSTRAINT no_poison")
    barrier = threading.Barrier(2)

    def retry(quarantine_id: int) -> str | None:
        barrier.wait(120)
        outcome = retry_quarantined(poisoned, quarantine_id)
        return None if outcome is None else outcome.status

    with ThreadPoolExecutor(2) as threads:
        for quarantine_id in ids:
            statuses = list(threads.map(retry, [quarantine_id] * 2))
            assert sorted(statuses, key=str) == [None, "stored"]
    assert rows(poisoned, "SELECT count(*), sum(delivery_count) FROM archiver.events") == [(10, 10)]


# Limits


async def test_i12_a_queue_full_by_count_refuses_at_once_and_takes_again_afterwards(engine: Engine, url: str) -> None:
    async with ingesting(engine, queue_events=3, batch_events=2) as ingest:
        with stalled(url):
            tasks = [submit(ingest, created(f"chat-{n}")) for n in range(3)]
            await waiting_backend(url)  # what is being written counts as well
            for n in range(5):
                with pytest.raises(QueueFullError):
                    await ingest.submit(delivery(created(f"refused-{n}")))
        await asyncio.gather(*tasks)
        assert (await ingest.submit(delivery(created("after")))).status == "stored"
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(4,)]


async def test_i12_a_queue_full_by_bytes_refuses_but_one_oversized_event_is_taken_when_idle(
    engine: Engine, url: str
) -> None:
    large, small = created("large", input="x" * 5000), created("small")
    async with ingesting(engine, queue_bytes=2000) as ingest:
        with stalled(url):
            task = submit(ingest, large)
            await waiting_backend(url)
            with pytest.raises(QueueFullError):
                await ingest.submit(delivery(small))
        assert (await task).status == "stored"
        with stalled(url):
            fitting = submit(ingest, small)
            await waiting_backend(url)
            with pytest.raises(QueueFullError):
                await ingest.submit(delivery(large))
            also_fitting = submit(ingest, created("small-2"))
            await asyncio.sleep(0)
        await asyncio.gather(fitting, also_fitting)
        assert (await ingest.submit(delivery(large))).status == "duplicate"


async def test_the_queues_gauges_return_to_nothing(engine: Engine) -> None:
    async with ingesting(engine) as ingest:
        await asyncio.gather(*(submit(ingest, created(f"chat-{n}")) for n in range(10)))
        await ingest.submit(delivery(b"{"))
    assert REGISTRY.get_sample_value("archiver_queue_events") == 0
    assert REGISTRY.get_sample_value("archiver_queue_bytes") == 0


# Callers who leave, and the end


async def test_a_cancelled_caller_affects_no_other_and_its_event_is_stored(engine: Engine, url: str) -> None:
    async with ingesting(engine) as ingest:
        with stalled(url):
            writing = [submit(ingest, created(f"writing-{n}")) for n in range(3)]
            await waiting_backend(url)
            queued = [submit(ingest, created(f"queued-{n}")) for n in range(3)]
            await asyncio.sleep(0)
            for leaver in (writing[1], queued[1]):
                leaver.cancel()
            await asyncio.sleep(0)
        answers = await asyncio.gather(*writing, *queued, return_exceptions=True)
        assert (await ingest.submit(delivery(created("after")))).status == "stored"
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [False, True, False] * 2
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(7,)]


async def test_closing_answers_what_was_accepted_and_takes_nothing_more(engine: Engine, url: str) -> None:
    writing = database.connect_async(engine.url)
    ingest = Ingest(writing, queue_events=100, queue_bytes=10**6, batch_events=4)
    close = asyncio.Event()

    async def serve() -> None:
        async with asyncio.timeout(120), ingest.running():
            await close.wait()

    serving = asyncio.create_task(serve())
    with stalled(url):
        tasks = [submit(ingest, created(f"chat-{n}")) for n in range(10)]
        await waiting_backend(url)
        close.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await ingest.submit(delivery(created("late")))
        assert not serving.done()
    async with asyncio.timeout(120):
        answers = await asyncio.gather(*tasks)
        await serving
    await writing.dispose()
    assert {answer.status for answer in answers} == {"stored"}
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(10,)]


async def test_closing_an_idle_ingest_ends(engine: Engine) -> None:
    async with asyncio.timeout(120), ingesting(engine):
        pass


# A database that goes


async def test_without_a_database_everyone_learns_that_it_is_unavailable() -> None:
    engine = database.connect(database.database_url("postgresql://nobody@127.0.0.1:1/none"))
    async with ingesting(engine) as ingest:
        answers = await asyncio.gather(*(submit(ingest, created(f"{n}")) for n in range(5)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 5
    engine.dispose()


async def test_a_database_that_is_dropped_and_comes_back_is_used_again(cluster: Cluster) -> None:
    address = cluster.clone()
    name = database.database_url(address).database
    engine = cluster.engine(address)
    async with ingesting(engine) as ingest:
        assert (await ingest.submit(delivery(created("before")))).status == "stored"
        cluster.drop(address)
        deleted = [submit(ingest, created(f"gone-{n}")) for n in range(3)]
        answers = await asyncio.gather(*deleted, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 3
        with pytest.raises(UnavailableError):
            await ingest.submit(delivery(b"{"))
        cluster.execute(f"CREATE DATABASE {name} TEMPLATE archiver_template")
        assert (await ingest.submit(delivery(created("after")))).status == "stored"
    assert rows(engine, "SELECT chat_id FROM archiver.events") == [("after",)]
    engine.dispose()
    cluster.drop(address)


async def test_i1_a_backend_killed_within_a_batch_stores_nothing_of_it_and_the_next_works(
    engine: Engine, url: str
) -> None:
    bodies = [created(f"chat-{n}") for n in range(5)]
    async with ingesting(engine) as ingest:
        with stalled(url):
            tasks = [submit(ingest, body) for body in bodies]
            pid = await waiting_backend(url)
            with psycopg.connect(url, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [pid])
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 5
        again = await asyncio.gather(*(submit(ingest, body) for body in bodies))
    assert {answer.status for answer in again} == {"stored"}
    assert rows(engine, "SELECT count(*), sum(delivery_count) FROM archiver.events") == [(5, 5)]


async def test_no_caller_fails_when_an_idle_connection_was_killed(engine: Engine, url: str) -> None:
    async with ingesting(engine) as ingest:
        await ingest.submit(delivery(created("before")))
        with psycopg.connect(url, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        assert (await ingest.submit(delivery(created("after")))).status == "stored"
    assert rows(engine, "SELECT count(*), sum(delivery_count) FROM archiver.events") == [(2, 2)]


@contextmanager
def short_timeouts(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5) -> Iterator[None]:
    """A silent database counts as gone sooner: a minute is too long for a test."""
    with monkeypatch.context() as patch:
        patch.setattr("archiver.inbound.writing.BATCH_SECONDS", seconds)
        patch.setattr("archiver.inbound.SPOOL_AFTER_SECONDS", seconds)
        yield


async def test_a_database_that_is_silent_too_long_is_unavailable_and_the_event_can_come_again(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sooner_than_postgres_gives_up = database.LOCK_SECONDS / 2
    async with ingesting(engine) as ingest:
        await ingest.submit(delivery(created("before")))
        with stalled(url), short_timeouts(monkeypatch):
            async with asyncio.timeout(sooner_than_postgres_gives_up):
                with pytest.raises(UnavailableError):
                    await ingest.submit(delivery(created("during")))
        assert (await ingest.submit(delivery(created("during")))).status == "stored"
    assert rows(engine, "SELECT chat_id, delivery_count FROM archiver.events ORDER BY id") == [
        ("before", 1),
        ("during", 1),
    ]


async def test_a_backend_that_answers_nothing_any_more_is_left_for_a_new_one(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ingesting(engine) as ingest:
        await ingest.submit(delivery(created("before")))
        with psycopg.connect(url) as other:
            ((pid,),) = other.execute(
                "SELECT pid FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'callhq-archiver'"
            ).fetchall()
        os.kill(pid, signal.SIGSTOP)
        try:
            with short_timeouts(monkeypatch, 5.0):  # enough for a new connection
                assert (await ingest.submit(delivery(created("during")))).status == "stored"
        finally:
            os.kill(pid, signal.SIGCONT)
    # Beside the event loop, in which the driver still tells the server that nobody waits.
    await asyncio.to_thread(until, lambda: not Path(f"/proc/{pid}").exists(), "the backend that goes on finds nobody")
    assert rows(engine, "SELECT chat_id, delivery_count FROM archiver.events ORDER BY 1") == [
        ("before", 1),
        ("during", 1),
    ]


def test_a_database_that_refuses_every_write_quarantines_nothing(engine: Engine) -> None:
    name = engine.url.database
    execute(engine, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    engine.dispose()
    with Receiver(engine) as receiver:
        results = receiver.write([delivery(created()), delivery(b"{")])
    assert [type(result) for result in results] == [UnavailableError] * 2
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as other:
        assert other.execute("SELECT count(*) FROM archiver.quarantine").fetchone() == (0,)


@pytest.mark.parametrize("state", ["53100", "57014", "42501", "55P03"])
def test_i4_trouble_that_no_event_caused_quarantines_nothing(engine: Engine, state: str) -> None:
    execute(
        engine,
        "CREATE FUNCTION public.trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION 'not the event''s fault' USING ERRCODE = '{state}'; END $$",
        "CREATE TRIGGER trouble BEFORE INSERT ON archiver.events FOR EACH ROW EXECUTE FUNCTION public.trouble()",
    )
    with Receiver(engine) as receiver:
        results = receiver.write([delivery(created("a")), delivery(created("b"))])
    assert [type(result) for result in results] == [UnavailableError] * 2
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


def test_i1_a_commit_is_durable_regardless_of_the_roles_default(engine: Engine) -> None:
    execute(
        engine,
        f"ALTER DATABASE {engine.url.database} SET synchronous_commit = off",
        "CREATE TABLE public.seen (setting text)",
        "CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN new; END $$",
        "CREATE TRIGGER see BEFORE INSERT ON archiver.events FOR EACH ROW EXECUTE FUNCTION public.see()",
    )
    engine.dispose()
    take(engine, created())
    assert rows(engine, "SELECT DISTINCT setting FROM public.seen") == [("on",)]


async def test_a_patient_queue_commits_full_batches_and_does_not_wait_any_longer(engine: Engine) -> None:
    async with ingesting(engine, batch_events=3, gather_seconds=3600) as ingest:
        await submit(ingest, created("first"))
        early = [submit(ingest, created(f"early-{n}")) for n in range(2)]
        # Meanwhile another receiver commits, and so would this one if it waited for no third.
        await asyncio.to_thread(take, engine, created("other"))
        await asyncio.gather(*early, submit(ingest, created("late")))
    transactions = "SELECT count(*) FROM archiver.events GROUP BY xmin::text ORDER BY 1"
    assert rows(engine, transactions) == [(1,), (1,), (3,)]


# Several receivers


def conflicts() -> float:
    return sum(
        REGISTRY.get_sample_value("archiver_commit_failures_total", {"sqlstate": state}) or 0
        for state in ("40P01", "40001")
    )


def race(engine: Engine, rounds: Sequence[tuple[Sequence[bytes], ...]]) -> list[tuple[list[Outcome], ...]]:
    """In each round, each of these batches by a receiver of its own, all let go at the same moment."""
    barrier = threading.Barrier(len(rounds[0]))

    def deliver(batches: Sequence[Sequence[bytes]]) -> list[list[Outcome]]:
        answers = []
        with Receiver(engine) as receiver:
            for bodies in batches:
                barrier.wait(120)
                answers.append(receiver.take(*bodies))
        return answers

    with ThreadPoolExecutor(len(rounds[0])) as threads:
        return list(zip(*threads.map(deliver, zip(*rounds, strict=True)), strict=True))


def test_i3_receivers_that_write_the_same_keys_in_opposite_order_never_deadlock(engine: Engine) -> None:
    before, rounds = conflicts(), []
    for number in range(40):
        bodies = [created(f"chat-{number}-{n}", f"session-{n % 5}") for n in range(15)]
        rounds.append((bodies, bodies[::-1], bodies[7:] + bodies[:7]))
    race(engine, rounds)
    assert conflicts() == before
    assert rows(engine, "SELECT count(*), min(delivery_count), max(delivery_count) FROM archiver.events") == [
        (600, 3, 3)
    ]
    assert rows(engine, "SELECT count(*) FROM analytics.messages") == [(1200,)]


def test_i3_receivers_that_quarantine_the_same_bytes_in_opposite_order_never_deadlock(engine: Engine) -> None:
    before, rounds = conflicts(), []
    for number in range(40):
        bodies = [b"{%d-%d" % (number, n) for n in range(50)]
        rounds.append((bodies, bodies[::-1], bodies[25:] + bodies[:25]))
    race(engine, rounds)
    assert conflicts() == before
    assert rows(engine, "SELECT count(*), min(delivery_count), max(delivery_count) FROM archiver.quarantine") == [
        (2000, 3, 3)
    ]


def test_i3_one_of_many_concurrent_receivers_of_a_fact_answers_stored(engine: Engine) -> None:
    for answers in race(engine, [([created(f"chat-{number}")],) * 4 for number in range(30)]):
        assert sorted(answer.status for (answer,) in answers) == ["duplicate"] * 3 + ["stored"]


def test_i5_an_unassigned_deletion_finds_its_creation_in_either_commit_order(engine: Engine) -> None:
    rounds = []
    for number in range(60):
        created_with, deleted_without = created(f"a-{number}"), deleted(f"a-{number}", session_id=None)
        created_without, deleted_with = created(f"b-{number}", None), deleted(f"b-{number}")
        rounds.append(
            (
                [created_with, created_without] if number % 2 else [created_with],
                [deleted_without],
                [deleted_with] if number % 2 else [deleted_with, created_without],
            )
        )
    race(engine, rounds)
    assert rows(engine, "SELECT count(*) FROM archiver.chats WHERE session_id = ''") == [(0,)]
    assert rows(engine, "SELECT count(*), count(deleted_at) FROM archiver.chats") == [(120, 120)]
    assert rows(engine, "SELECT count(*) FROM archiver.messages") == [(240,)]


def test_i5_concurrent_revisions_at_several_receivers_end_as_the_newest(engine: Engine) -> None:
    rounds = [
        tuple(
            [created(f"chat-{number}", output=f"answer {n}", updatedAt=f"2024-01-15T09:30:0{n}Z")] for n in (2, 3, 1)
        )
        for number in range(40)
    ]
    race(engine, rounds)
    assert rows(engine, "SELECT content, count(*) FROM archiver.messages WHERE role = 'assistant' GROUP BY 1") == [
        ("answer 3", 40)
    ]


async def test_i3_two_ingests_on_one_database_deduplicate_against_each_other(engine: Engine) -> None:
    bodies = [created(f"chat-{n}", f"session-{n % 7}") for n in range(100)] * 3
    random.Random(1).shuffle(bodies)
    async with ingesting(engine, batch_events=10) as one, ingesting(engine, batch_events=10) as other:
        tasks = [submit(random.Random(n).choice([one, other]), body) for n, body in enumerate(bodies)]
        answers = await asyncio.gather(*tasks)
    assert sum(answer.status == "stored" for answer in answers) == 100
    assert rows(engine, "SELECT count(*), min(delivery_count), max(delivery_count) FROM archiver.events") == [
        (100, 3, 3)
    ]


@pytest.mark.parametrize("cost", ["1e-16384", "1e-999999"])
def test_a_cost_too_small_for_postgres_does_not_quarantine(engine: Engine, cost: str) -> None:
    (answer,) = take(engine, created(cost=cost))
    assert answer.status == "stored"


def test_ids_that_the_parser_accepts_fit_the_indexes(engine: Engine) -> None:
    rng = random.Random(1)
    one, other = ("".join(chr(rng.randint(0x800, 0xD7FF)) for _ in range(events.MAX_ID)) for _ in range(2))
    answer = take(engine, created(one, other))[0]
    assert answer.reason != "not_storable"


def test_unknown_events_that_differ_beside_their_chat_are_all_kept(engine: Engine) -> None:
    for status in ("in-progress", "ended"):
        take(engine, envelope("status-update", None, status=status, chat={"id": "1", "sessionId": "s"}))
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(2,)]


def test_a_trigger_that_raises_plainly_does_not_fail_the_batch(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
                " IF new.content = 'poison' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$"
            )
        )
        connection.execute(
            text("CREATE TRIGGER t BEFORE INSERT ON archiver.messages FOR EACH ROW EXECUTE FUNCTION public.f()")
        )
    answers = take(engine, created("bad", input="poison"), created("good"))
    assert [answer.status for answer in answers] == ["quarantined", "stored"]


@pytest.mark.parametrize(
    ("zone", "moment"), [("Asia/Tokyo", "9999-12-31T23:59:59Z"), ("America/New_York", "0001-01-01T00:00:00Z")]
)
def test_the_databases_time_zone_does_not_make_a_time_poisonous(engine: Engine, zone: str, moment: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE {engine.url.database} SET timezone = '{zone}'"))
    engine.dispose()
    (answer,) = take(engine, envelope("chat.created", None, chat={"id": "1", "sessionId": "s"}, timestamp=moment))
    assert answer.status == "stored"


def test_i4_a_retry_keeps_the_count(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE archiver.messages ADD CONSTRAINT p CHECK (content <> 'poison')"))
    for seconds in (0, 5, 9):
        (refused,) = take(engine, created(input="poison"), seconds=seconds)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE archiver.messages DROP CONSTRAINT p"))
    take(engine, created(input="poison"), seconds=20)
    retry_quarantined(engine, refused.id)
    assert rows(engine, "SELECT delivery_count, last_received_at FROM archiver.events") == [
        (4, NOW + timedelta(seconds=20))
    ]
