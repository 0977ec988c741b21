"""A delivery with slow or locked rows delays no other, of any subscription, and is not lost (I11)."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine

from tests.support import processes
from tests.support.followups import Receiver, change, receiving, states, subscribe
from tests.support.rows import execute, rows
from tests.support.servers import as_writer
from tests.support.slowness import holding, quick_rows, slow_rows
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres
FOR_EVER = "PERFORM pg_sleep(3600)"  # far longer than anything here is waited for


@contextmanager
def running_worker(url: str) -> Iterator[None]:
    """`archiver worker`, which sends as fast as it can."""
    published = {"ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": "true", "ARCHIVER_FOLLOWUPS_RATE": "0"}
    with tempfile.NamedTemporaryFile() as log:
        environment = {**os.environ, "DATABASE_URL": as_writer(url), **published}
        process = processes.start(["worker"], environment, stdout=log.name, stderr=log.name)
        try:
            yield
        finally:
            process.kill()
            process.wait()
            print(log.read().decode()[-5000:])  # shown where the test fails


def conversations(engine: Engine, first: int, last: int) -> None:
    """One change each, in the feed."""
    change(engine, *(("chat.created", f"s{number}", f"c{number}") for number in range(first, last + 1)))


def follow(engine: Engine, receiver: Receiver, **values: bool | int) -> int:
    return subscribe(engine, receiver.url, "chat.created", "session.settled", **values)


def sessions(first: int, last: int, but: int | None = None) -> set[str]:
    return {f"s{number}" for number in range(first, last + 1) if number != but}


def until_delivered_to(receiver: Receiver, expected: set[str], what: str) -> None:
    until(lambda: expected <= {got.data["session_id"] for got in list(receiver.got)}, what)


def is_at_the_end(engine: Engine) -> bool:
    behind = "SELECT 1 FROM archiver.subscriptions WHERE cursor < (SELECT max(cursor) FROM archiver.changes)"
    return not rows(engine, behind)


@pytest.mark.parametrize("is_ordered", [False, True])
def test_i11_a_delivery_that_is_slow_to_make_and_to_record_holds_up_no_other(
    engine: Engine, database_url: str, *, is_ordered: bool
) -> None:
    slow_rows(engine, "archiver.deliveries", "session_id", "s70", FOR_EVER)
    conversations(engine, 1, 150)
    with receiving() as receiver, receiving() as other, running_worker(database_url):
        follow(engine, receiver, is_ordered=is_ordered)
        follow(engine, other)
        until_delivered_to(receiver, sessions(1, 150, but=70), "all others of the subscription are delivered")
        until_delivered_to(other, sessions(1, 150, but=70), "and of the other one")
        conversations(engine, 151, 160)
        until_delivered_to(receiver, sessions(151, 160), "and what comes later")
        quick_rows(engine, "archiver.deliveries")
        until(lambda: states(engine) == {"delivered": 320}, "and in the end the slow one")
        until(lambda: is_at_the_end(engine), "and the cursor follows")
    assert {got.data["session_id"] for got in receiver.got} == sessions(1, 160)
    assert len(receiver.by_id) == len(other.by_id) == 160


def test_i11_an_attempt_that_cannot_be_recorded_in_time_holds_up_no_other(engine: Engine, database_url: str) -> None:
    slow_rows(engine, "archiver.attempts", "cursor", "3", FOR_EVER)
    conversations(engine, 1, 60)
    with receiving() as receiver, running_worker(database_url):
        follow(engine, receiver, concurrency=8)
        until(lambda: states(engine) == {"delivered": 59, "pending": 1}, "all others are recorded")
        assert receiver.cursors.count(3) == 1  # it is not sent again and again while that is so
        quick_rows(engine, "archiver.attempts")
        until(lambda: states(engine) == {"delivered": 60}, "and then this one")


def test_i11_more_locked_subscriptions_than_connections_hold_up_no_other(engine: Engine, database_url: str) -> None:
    conversations(engine, 1, 20)
    with receiving() as receiver, receiving() as other:
        held = [follow(engine, receiver) for _ in range(8)]
        locks = f"SELECT 1 FROM archiver.subscriptions WHERE id <= {held[-1]} FOR UPDATE"
        with running_worker(database_url):
            with holding(engine, locks):
                follow(engine, other)
                until_delivered_to(other, sessions(1, 20), "the other subscription is served")
                conversations(engine, 21, 40)
                until_delivered_to(other, sessions(21, 40), "and goes on")
            until(lambda: states(engine) == {"delivered": 360}, "then all are served")


def test_i11_a_delivery_that_another_program_holds_waits_alone(engine: Engine, database_url: str) -> None:
    conversations(engine, 1, 60)
    made = (
        "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at,"
        " created_at, last_attempt, due_at) SELECT id, 45, 'chat.created', 's45', 'c45', now(), now(), 14, now()"
        " FROM archiver.subscriptions"
    )
    with receiving() as receiver, receiving() as other:
        follow(engine, receiver, is_ordered=True)
        follow(engine, other)
        with running_worker(database_url):
            with holding(engine, made):
                until_delivered_to(receiver, sessions(1, 60, but=45), "the others are delivered")
                until_delivered_to(other, sessions(1, 60, but=45), "to both")
            until(lambda: states(engine) == {"delivered": 120}, "and then the one that was locked")
            until(lambda: is_at_the_end(engine), "and the cursor follows")


def test_i11_what_is_set_aside_is_delivered_by_the_next_worker(engine: Engine, database_url: str) -> None:
    slow_rows(engine, "archiver.deliveries", "session_id", "s5", FOR_EVER)
    conversations(engine, 1, 10)
    with receiving() as receiver:
        with running_worker(database_url):
            follow(engine, receiver, is_ordered=True)
            until_delivered_to(receiver, sessions(1, 10, but=5), "all others are delivered")
            change(engine, ("session.settled", "s5", None), ("session.settled", "s11", None))
            until_delivered_to(receiver, {"s11"}, "and what comes later")
        quick_rows(engine, "archiver.deliveries")
        execute(engine, "UPDATE archiver.subscriptions SET leased_until = now()")
        with running_worker(database_url):
            until(lambda: states(engine) == {"delivered": 12}, "and by the next worker what was slow")
    published = [got.payload["type"] for got in receiver.got if got.data["session_id"] == "s5"]
    assert published == ["chat.created", "session.settled"]  # in their order


def test_i13_a_delivery_that_cannot_be_forgotten_keeps_no_other(engine: Engine, database_url: str) -> None:
    conversations(engine, 1, 30)
    with receiving() as receiver:
        follow(engine, receiver)
        with running_worker(database_url):
            until(lambda: states(engine) == {"delivered": 30}, "all are delivered")
        execute(engine, "UPDATE archiver.deliveries SET ended_at = now() - interval '100 days'")
        with (
            holding(engine, "SELECT 1 FROM archiver.attempts WHERE cursor = 7 FOR UPDATE"),
            running_worker(database_url),
        ):
            until(lambda: states(engine) == {"delivered": 1}, "all others are forgotten")
            conversations(engine, 31, 40)
            until_delivered_to(receiver, sessions(31, 40), "and deliveries go on")
