"""An erasure with slow or locked rows delays no other erasure and no receiver (I8, I12, I13)."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from archiver import database
from archiver.compliance import erasure
from archiver.compliance.erasure import Target
from archiver.compliance.erasure.deleted import order_deleted
from archiver.compliance.erasure.retention import Rules
from tests.support.erasures import ACT, TIMING, holds_text, record, sweep
from tests.support.payloads import created, deleted
from tests.support.retention import run
from tests.support.rows import rows
from tests.support.slowness import holding, quick_rows, slow_rows
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres
FOR_EVER = "PERFORM pg_sleep(3600)"
SWEEPING = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants alone are shorter, and in the same order."""
    monkeypatch.setattr("archiver.database.transactions.SPLIT_LOCK_SECONDS", 0.5)
    monkeypatch.setattr("archiver.database.transactions.SPLIT_SECONDS", 2.0)
    monkeypatch.setattr("archiver.database.transactions.SINGLE_LOCK_SECONDS", 2.0)
    monkeypatch.setattr("archiver.database.transactions.SINGLE_SECONDS", 10.0)


def ordered(engine: Engine, count: int) -> list[Target]:
    """So many sessions, which are ordered to be erased, and not erased yet."""
    record(engine, *(created(f"c{number}", f"s{number}", input=f"secret-{number}-") for number in range(count)))
    targets = [Target(f"s{number}") for number in range(count)]
    erasure.order(engine, targets, "request", ACT)
    return targets


def left(engine: Engine) -> set[str]:
    return {row[0] for row in rows(engine, "SELECT session_id FROM archiver.events WHERE body IS NOT NULL")}


def test_i8_a_slow_session_keeps_no_other_from_being_erased(engine: Engine) -> None:
    ordered(engine, 30)
    slow_rows(engine, "archiver.events", "session_id", "s7", FOR_EVER)
    with pytest.raises(DBAPIError) as raised:
        sweep(engine)
    assert database.is_cancelled(raised.value)
    assert left(engine) == {"s7"}
    quick_rows(engine, "archiver.events")
    assert sweep(engine) == 1
    assert holds_text(engine, "secret-7-") == []


def test_i8_what_was_left_is_found_again_by_a_sweep_that_goes_on(engine: Engine) -> None:
    ordered(engine, 5)
    through = [0]
    locks = "SELECT 1 FROM archiver.sessions WHERE session_id = 's2' FOR UPDATE"
    with holding(engine, locks), pytest.raises(DBAPIError):
        through.extend(step.through for step in erasure.sweep(engine, TIMING))
    assert left(engine) == {"s2"}
    sweep(engine, max(through))
    assert left(engine) == set()


@contextmanager
def sweeping(engine: Engine) -> Iterator[None]:
    """A sweep under way, in a thread."""
    swept: list[BaseException] = []

    def work() -> None:
        try:
            sweep(engine)
        except DBAPIError as error:
            swept.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: rows(engine, SWEEPING), "it takes its time")
        yield
    finally:
        thread.join(120)
    assert len(swept) == 1


def test_i12_a_slow_erasure_does_not_block_writers_of_unassigned_turns(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.database.transactions.SINGLE_SECONDS", 20.0)
    ordered(engine, 1)
    slow_rows(engine, "archiver.events", "session_id", "s0", FOR_EVER)
    with sweeping(engine), ThreadPoolExecutor() as pool:
        assert pool.submit(record, engine, created("new", "new")).result(120)[0].status == "stored"
        until(lambda: not rows(engine, SWEEPING), "it gives up")
        assert record(engine, deleted("unknown", None))[0].status == "stored"


def test_i12_a_slow_turn_without_a_session_holds_the_lock_of_all_for_an_instant(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.holds.EXCLUSIVE_SECONDS", 1.0)
    monkeypatch.setattr("archiver.database.transactions.SINGLE_SECONDS", 3_600.0)
    monkeypatch.setattr("archiver.database.transactions.SPLIT_SECONDS", 3_600.0)
    record(engine, created("stray", None, input="secret-stray"), created("gone", None))
    erasure.order(engine, [Target("", "stray"), Target("", "gone")], "request", ACT)
    slow_rows(engine, "archiver.events", "chat_id", "stray", FOR_EVER)
    with sweeping(engine):
        assert record(engine, created("new", "new"))[0].status == "stored"
    remaining = "SELECT chat_id FROM archiver.events WHERE session_id = '' AND body IS NOT NULL"
    assert rows(engine, remaining) == [("stray",)]
    quick_rows(engine, "archiver.events")
    assert sweep(engine) == 1


def test_i8_a_quarantined_delivery_that_is_locked_keeps_no_other_from_going(engine: Engine) -> None:
    record(engine, *(f'{{"broken {number}'.encode() for number in range(5)))
    first = rows(engine, "SELECT min(id) FROM archiver.quarantine")[0][0]
    locks = f"SELECT 1 FROM archiver.quarantine WHERE id = {first} FOR UPDATE"
    with holding(engine, locks), pytest.raises(DBAPIError):
        run(engine, Rules(10, {}, 0))
    assert rows(engine, "SELECT id FROM archiver.quarantine") == [(first,)]
    run(engine, Rules(10, {}, 0))
    assert rows(engine, "SELECT id FROM archiver.quarantine") == []


def test_i12_a_locked_session_blocks_no_other_order_and_no_writer(
    engine: Engine,
) -> None:
    record(engine, *(created(f"c{number}", f"s{number}") for number in range(100)))
    targets = [Target(f"s{number}") for number in range(100)]
    with holding(engine, "SELECT 1 FROM archiver.sessions WHERE session_id = 's42' FOR UPDATE"):
        with ThreadPoolExecutor() as pool:
            ordering = pool.submit(erasure.order, engine, targets, "request", ACT)
            number = 0
            while not ordering.done():
                assert record(engine, created(f"new-{number}", f"new-{number}"))[0].status == "stored"
                number += 1
            with pytest.raises(DBAPIError) as raised:
                ordering.result()
        assert database.is_lock_timeout(raised.value)
        assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(99,)]
        sweep(engine)
    assert {name for name in left(engine) if name.startswith("s")} == {"s42"}
    assert rows(engine, "SELECT count(*) FROM archiver.acts") == [(1,)]
    erasure.order(engine, targets, "request", ACT)
    sweep(engine)
    assert rows(engine, "SELECT count(DISTINCT session_id) FROM archiver.erasures") == [(100,)]


def test_i13_a_deleted_turn_that_is_slow_keeps_no_other_from_being_erased(engine: Engine) -> None:
    record(engine, *(created(f"c{number}", f"s{number}") for number in range(30)))
    record(engine, *(deleted(f"c{number}", f"s{number}") for number in range(30)), minute=1)
    slow_rows(engine, "archiver.sessions", "session_id", "s11", FOR_EVER)
    before = datetime(2100, 1, 1, tzinfo=UTC)
    with pytest.raises(DBAPIError):
        list(order_deleted(engine, before))
    ordered = {row[0] for row in rows(engine, "SELECT session_id FROM archiver.erasures")}
    assert ordered == {f"s{number}" for number in range(30)} - {"s11"}
    quick_rows(engine, "archiver.sessions")
    list(order_deleted(engine, before))
    sweep(engine)
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(30,)]
