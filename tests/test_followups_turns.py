"""One sender, turn by turn (I11): what it may still send of what it has read, and which delivery comes next."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from sqlalchemy import Engine
from standardwebhooks import Webhook

from archiver import database, erasure
from archiver.database import transaction
from archiver.erasure import Act, Target
from archiver.followups import deliveries, signing, subscriptions
from archiver.followups.pace import Pace
from archiver.followups.sender import AHEAD, FRESH_SECONDS, Sender
from tests.followups import SECRET, Receiver, change, receiving, sending, states, subscribe
from tests.payloads import created
from tests.rows import execute
from tests.test_erasure import record, sweep
from tests.test_limits import on_one_version
from tests.waiting import until

pytestmark = on_one_version


def changes(engine: Engine, count: int) -> None:
    change(engine, *(("chat.created", "s", f"c{number}") for number in range(count)))


@asynccontextmanager
async def draining(database_url: str, subscription_id: int) -> AsyncIterator[asyncio.Task[None]]:
    """The sender of one subscription, until it has nothing to send any more."""
    engine = database.connect_async(database.database_url(database_url), pool_size=1)
    alone = Sender(subscription_id, engine, Pace(0), "alone", allow_private=True)
    draining = asyncio.create_task(alone.drain(asyncio.Event()))
    try:
        yield draining
    finally:
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await alone.aclose()
        await engine.dispose()


async def has_begun(receiver: Receiver) -> None:
    while not receiver.got:  # noqa: ASYNC110  # it receives in a thread of its own
        await asyncio.sleep(0.01)


def test_of_a_subscription_that_is_removed_nothing_more_is_read(engine: Engine, database_url: str) -> None:
    changes(engine, 3 * AHEAD)
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url, concurrency=1)

        async def run() -> None:
            receiver.hangs = True
            async with draining(database_url, subscription_id) as ended:
                await has_begun(receiver)
                with transaction(engine) as connection:
                    subscriptions.remove(connection, subscription_id)
                receiver.hangs = False
                await asyncio.wait_for(ended, 60)

        asyncio.run(run())
    assert 1 <= len(receiver.got) <= AHEAD


def test_who_is_paused_or_removed_is_leased_to_nobody(engine: Engine) -> None:
    changes(engine, 1)
    subscription_id = subscribe(engine, "http://127.0.0.1:9")
    with transaction(engine) as connection:
        assert subscriptions.lease(connection, subscription_id, "one") is not None
        subscriptions.pause(connection, subscription_id, "by hand")
        assert subscriptions.lease(connection, subscription_id, "one") is None
        assert subscriptions.select_busy(connection, "one") == []
        subscriptions.resume(connection, subscription_id)
        assert subscriptions.lease(connection, subscription_id, "one") is not None
        subscriptions.remove(connection, subscription_id)
        assert subscriptions.lease(connection, subscription_id, "one") is None


def test_a_receiver_that_is_down_is_asked_with_what_was_tried_least(engine: Engine) -> None:
    subscription_id = subscribe(engine, "http://127.0.0.1:9")
    execute(
        engine,
        "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at,"
        f" created_at, attempts, last_attempt, due_at) SELECT {subscription_id}, n, 'chat.created', 's', 'c',"
        " now(), now(), 4 - n, 14, now() - (4 - n) * interval '1 hour' FROM generate_series(1, 3) n",
    )
    for is_ordered, first in ((False, 3), (True, 1)):  # in order there is but one to ask with
        with transaction(engine) as connection:
            (probe,) = deliveries.select_due(connection, subscription_id, [], 1, is_ordered=is_ordered, is_probe=True)
        assert probe.cursor == first
    with transaction(engine) as connection:
        (due,) = deliveries.select_due(connection, subscription_id, [], 1, is_ordered=False, is_probe=False)
    assert due.cursor == 1


def test_i8_what_was_read_is_read_again_before_it_is_sent_late(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    change(engine, ("chat.created", "s1", "c1"), ("chat.created", "s2", "c2"))
    with receiving() as receiver, sending(database_url):
        receiver.hangs = True
        subscribe(engine, receiver.url, concurrency=1)
        until(lambda: receiver.cursors == [1], "the first is under way, and the second was read with it")
        erasure.order(engine, [Target("s2")], "request", Act("erase", "anna@desk", "she asked for it"))
        sweep(engine)
        old = monotonic() + FRESH_SECONDS
        until(lambda: monotonic() > old, "what was read is old")
        receiver.hangs = False
        until(lambda: states(engine) == {"delivered": 2}, "both are told")
    assert "erased_at" in receiver.got[1].data
    assert "messages" not in receiver.got[1].data


def test_both_secrets_sign_after_a_rotation(engine: Engine, database_url: str) -> None:
    changes(engine, 1)
    new = signing.make_secret()
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url)
        with transaction(engine) as connection:
            subscriptions.rotate(connection, subscription_id, new)
        with sending(database_url):
            until(lambda: states(engine) == {"delivered": 1}, "it is told")
    (got,) = receiver.got
    for secret in (SECRET, new):
        assert Webhook(secret).verify(got.body, got.headers) == got.told


def test_in_order_turns_without_a_session_wait_for_their_own_kind_alone(engine: Engine) -> None:
    change(engine, ("chat.created", "", "c1"), ("chat.updated", "", "c1"), ("chat.created", "", "c2"))
    subscription_id = subscribe(engine, "http://127.0.0.1:9", is_ordered=True)
    execute(
        engine,
        "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at, created_at,"
        f" last_attempt, due_at) SELECT {subscription_id}, cursor, type, session_id, chat_id, changed_at, now(), 14,"
        " now() FROM archiver.changes",
    )
    for busy, cursors in (([], [1, 3]), ([1], [3])):
        with transaction(engine) as connection:
            due = deliveries.select_due(connection, subscription_id, busy, 9, is_ordered=True, is_probe=False)
        assert [each.cursor for each in due] == cursors
