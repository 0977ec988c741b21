"""The feed for a consumer: no cursor is missed, in whatever order writers commit; NOTIFY; retention."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import database, embedded, ledger
from archiver.archive.outbox import Change, insert_changes
from archiver.database import schema, transaction
from archiver.outbound import feed
from archiver.outbound.feed import publisher
from archiver.outbound.feed.publishing import PAGE_CHANGES
from tests.conftest import Cluster
from tests.support.feeds import publish
from tests.support.observations import observe, record
from tests.support.payloads import created
from tests.support.rows import execute, rows
from tests.support.servers import as_writer
from tests.support.slowness import quick_rows, slow_rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

WRITERS, TRANSACTIONS, PUBLISHERS = 8, 15, 3


class Reader:
    """Polls a feed by cursor, as the documentation says; keeps all that it saw, in the order in which it saw it."""

    def __init__(self, engine: Engine, view: str) -> None:
        self._engine, self._view = engine, view
        self.seen: list[tuple[int, str]] = []

    def poll(self) -> None:
        last = self.seen[-1][0] if self.seen else 0
        query = f"SELECT cursor, chat_id FROM {self._view} WHERE cursor > {last} ORDER BY cursor"
        self.seen += rows(self._engine, query)


@contextmanager
def going_on(count: int, work: Callable[[], object]) -> Iterator[None]:
    """`work` again and again meanwhile, in so many threads."""
    ending, faults = threading.Event(), list[BaseException]()

    def loop() -> None:
        try:
            while not ending.is_set():
                work()
        except BaseException as fault:  # noqa: BLE001  # told below
            faults.append(fault)

    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert faults == []


def transactions_of(engine: Engine, writer: int, seed: int, others_were_seen: threading.Event) -> Iterator[list[str]]:
    """Transactions that stay open for a while, some of them in vain; gives the chats of each that was committed."""
    rng = random.Random(f"{seed} {writer}")
    for number in range(TRANSACTIONS):
        chat_ids = [f"{writer}-{number}-{n}" for n in range(rng.randint(1, 3))]
        is_kept = rng.random() < 0.8
        with transaction(engine) as connection:
            ledger.record(connection, [observe(created(chat_id, f"s{writer}")) for chat_id in chat_ids])
            connection.execute(text(f"INSERT INTO public.naive (chat_id) VALUES ('{writer}-{number}')"))
            if writer == number == 0:
                assert others_were_seen.wait(120)
            connection.execute(text(f"SELECT pg_sleep({rng.choice([0, 0, 0.01, 0.05])})"))
            if not is_kept:
                connection.rollback()
        if is_kept:
            yield chat_ids


@pytest.mark.parametrize("seed", [1, 2])
def test_i11_no_reader_misses_a_change_in_any_order_of_commits(
    cluster: Cluster, database_url: str, seed: int
) -> None:
    engine = cluster.engine(database_url, pool_size=WRITERS + PUBLISHERS + 2)
    # What a feed would be whose cursors those who write take themselves.
    execute(engine, "CREATE TABLE public.naive (cursor bigint GENERATED ALWAYS AS IDENTITY, chat_id text)")
    reader, naive = Reader(engine, "analytics.changes"), Reader(engine, "public.naive")
    committed: dict[int, list[str]] = {}
    others_were_seen = threading.Event()

    def write(writer: int) -> None:
        remaining = transactions_of(engine, writer, seed, others_were_seen)
        committed[writer] = [chat_id for chat_ids in remaining for chat_id in chat_ids]

    def publish_page() -> None:
        with transaction(engine) as connection:
            feed.publish(connection)

    def poll() -> None:
        reader.poll()
        naive.poll()
        if len(reader.seen) > WRITERS:
            others_were_seen.set()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    with going_on(PUBLISHERS, publish_page), going_on(1, poll):
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
    publish(engine)
    poll()
    assert [number for number, _ in reader.seen] == list(range(1, len(reader.seen) + 1))
    assert len(reader.seen) == sum(map(len, committed.values()))
    for writer in range(WRITERS):
        assert [chat_id for _, chat_id in reader.seen if chat_id.startswith(f"{writer}-")] == committed[writer]
    # The same reader of the same transactions does miss rows where cursors are taken before the commit.
    assert len(naive.seen) < rows(engine, "SELECT count(*) FROM public.naive")[0][0]
    engine.dispose()


def write(engine: Engine, *changes: Change) -> None:
    with transaction(engine) as connection:
        insert_changes(connection, changes)


def test_i12_a_page_is_bounded_and_a_transaction_is_never_torn(engine: Engine) -> None:
    for number in range(3):
        write(engine, *[Change("chat.created", "s", f"{number}-{n}") for n in range(PAGE_CHANGES // 2 + 1)])
    with transaction(engine) as connection:
        assert feed.publish(connection) == 2 * (PAGE_CHANGES // 2 + 1)
    with transaction(engine) as connection:
        assert feed.publish(connection) == PAGE_CHANGES // 2 + 1
        assert feed.publish(connection) == 0
    query = "SELECT chat_id FROM analytics.changes ORDER BY cursor"
    assert [chat_id for (chat_id,) in rows(engine, query)] == [
        f"{number}-{n}" for number in range(3) for n in range(PAGE_CHANGES // 2 + 1)
    ]


def test_i11_one_publishes_at_a_time_and_the_other_waits_its_turn(engine: Engine) -> None:
    record(engine, created())
    with transaction(engine) as first:
        assert feed.publish(first) == 1
        with pytest.raises(DBAPIError) as refused, transaction(engine, lock_seconds=0.1) as second:
            feed.publish(second)
        assert database.is_lock_timeout(refused.value)
        first.rollback()
    assert publish(engine) == 1


def test_the_writer_publishes_and_the_reader_reads(cluster: Cluster, database_url: str) -> None:
    engine = cluster.engine(as_writer(database_url))
    record(engine, created())
    assert publish(engine) == 1
    with transaction(engine) as connection:
        assert feed.delete_old(connection, datetime.now(UTC)) == 0
        assert feed.select_extent(connection) == feed.Extent(1, 1)
    engine.dispose()


# NOTIFY


def test_what_is_published_is_notified_in_order(database_url: str, engine: Engine) -> None:
    long = "x" * 9_000
    with psycopg.connect(database_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {feed.CHANNEL}")
        write(
            engine,
            Change("chat.created", "s", 'c "é'),
            Change("session.lost", long),
            Change("seal.created", seal_id=7),
        )
        publish(engine)
        published = [json.loads(each.payload) for each in listener.notifies(timeout=120, stop_after=3)]
    nothing: dict[str, Any] = {"chat_id": None, "seal_id": None, "session_id": ""}
    assert published == [
        nothing | {"cursor": 1, "type": "chat.created", "session_id": "s", "chat_id": 'c "é'},
        {"cursor": 2, "type": "session.lost"},
        nothing | {"cursor": 3, "type": "seal.created", "seal_id": 7},
    ]


async def publish_all(url: str, is_done: Callable[[], bool]) -> None:
    """The worker's own publisher, until it has done what is to be done."""
    engine = database.connect_async(database.database_url(url), pool_size=1)
    publishing = asyncio.create_task(feed.Publisher(engine).run())
    await asyncio.to_thread(until, is_done, "it is published")
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    await engine.dispose()


def test_i13_changes_of_a_session_that_take_too_long_keep_no_others_from_being_published(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "SLOW_RETRY_FACTOR", 0.1)
    slow_rows(engine, "archiver.changes", "session_id", "slow", "PERFORM pg_sleep(60)")
    for number in range(5):
        both = [Change("chat.created", name, f"{name}-{number}") for name in ("slow", f"other-{number}")]
        write(engine, *both, Change("chat.updated", "slow", f"slow-{number}"))
    of_others = "SELECT count(*) FROM analytics.changes WHERE session_id <> 'slow'"

    def is_done() -> bool:
        until(lambda: rows(engine, of_others) == [(5,)], "those of others are published")
        write(engine, Change("chat.created", "other-new", "new"))
        until(lambda: rows(engine, of_others) == [(6,)], "and new ones")
        quick_rows(engine, "archiver.changes")
        return bool(until(lambda: rows(engine, "SELECT count(*) FROM archiver.outbox") == [(0,)], "all are"))

    asyncio.run(publish_all(as_writer(database_url), is_done))
    query = "SELECT type, chat_id FROM analytics.changes WHERE session_id = 'slow' ORDER BY cursor"
    assert rows(engine, query) == [
        (kind, f"slow-{number}") for number in range(5) for kind in ("chat.created", "chat.updated")
    ]
    assert rows(engine, "SELECT count(*), min(cursor), max(cursor) FROM analytics.changes") == [(16, 1, 16)]


def test_i13_a_row_that_is_too_large_is_not_taken_for_a_full_notification_queue(
    database_url: str, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "RAISE EXCEPTION 'too large' USING ERRCODE = 'program_limit_exceeded'"
    slow_rows(engine, "archiver.changes", "session_id", "large", refusal)
    write(engine, Change("session.lost", "large"), Change("session.lost", "other"))
    query = "SELECT session_id FROM analytics.changes"
    asyncio.run(publish_all(as_writer(database_url), lambda: rows(engine, query) == [("other",)]))
    printed = capsys.readouterr()
    assert "notification queue full" not in printed.out + printed.err
    assert rows(engine, "SELECT count(*) FROM archiver.outbox") == [(1,)]


def test_i11_who_listens_and_sleeps_keeps_nothing_from_being_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with embedded.running(tmp_path, options={"max_notify_queue_pages": "64"}) as postgres:
        engine = database.connect(database.database_url(postgres.url))
        schema.upgrade(engine)
        with psycopg.connect(postgres.url) as listener:
            listener.execute(f"LISTEN {feed.CHANNEL}")
            listener.commit()
            listener.execute("SELECT 1")  # and asleep in a transaction
            for part in range(3):
                write(engine, *[Change("chat.created", "x" * 7_000, f"{part}-{n}") for n in range(60)])
            record(engine, created())  # ingest commits whatever becomes of them
            count = "SELECT count(*) FROM analytics.changes"
            asyncio.run(publish_all(postgres.url, lambda: rows(engine, count) == [(181,)]))
            printed = capsys.readouterr()
            assert (printed.out + printed.err).count("notification queue full") == 1
        with psycopg.connect(postgres.url, autocommit=True) as listener:
            listener.execute(f"LISTEN {feed.CHANNEL}")
            for number in (182, 183):  # by the first Postgres is made to look that there is room again
                record(engine, created(str(number)))
                asyncio.run(publish_all(postgres.url, lambda: rows(engine, count) == [(number,)]))  # noqa: B023
            published = [json.loads(each.payload)["cursor"] for each in listener.notifies(timeout=120, stop_after=1)]
            assert published == [183]
        engine.dispose()


# Retention


def test_old_changes_go_up_to_the_first_that_stays_and_never_the_newest(engine: Engine) -> None:
    for _ in range(10):
        record_one(engine)
    execute(engine, "UPDATE archiver.changes SET changed_at = now() - interval '40 days' WHERE cursor <> 6")
    assert delete(engine, consumed=3) == 3
    assert cursors(engine) == [4, 5, 6, 7, 8, 9, 10]
    assert delete(engine) == 2
    assert cursors(engine) == [6, 7, 8, 9, 10]
    execute(engine, "UPDATE archiver.changes SET changed_at = now() - interval '40 days'")
    assert delete(engine) == 4
    assert (delete(engine), cursors(engine)) == (0, [10])
    record_one(engine)
    assert cursors(engine) == [10, 11]


def record_one(engine: Engine) -> None:
    write(engine, Change("session.lost", "s"))
    publish(engine)


def delete(engine: Engine, consumed: int | None = None) -> int:
    with transaction(engine) as connection:
        return feed.delete_old(connection, datetime.now(UTC) - timedelta(days=30), consumed)


def cursors(engine: Engine) -> list[int]:
    return [number for (number,) in rows(engine, "SELECT cursor FROM analytics.changes ORDER BY 1")]


@on_one_version
def test_the_worker_deletes_old_changes_a_page_at_a_time(database_url: str, engine: Engine) -> None:
    write(engine, *[Change("chat.created", "s", str(n)) for n in range(12_000)])
    publish(engine)
    execute(engine, "UPDATE archiver.changes SET changed_at = now() - interval '31 days' WHERE cursor <= 11000")

    async def shorten() -> None:
        asynchronous = database.connect_async(database.database_url(as_writer(database_url)), pool_size=1)
        await feed.Publisher(asynchronous).delete_old(30, lambda _: None)
        await asynchronous.dispose()

    asyncio.run(shorten())
    assert cursors(engine) == list(range(11_001, 12_001))
