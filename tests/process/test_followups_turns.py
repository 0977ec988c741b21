"""One sender (I11): what it may still send of what it has read, and which delivery is next."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import Engine, text
from standardwebhooks import Webhook
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from archiver import database
from archiver.compliance import erasure, seals
from archiver.compliance.erasure import AuditEntry, Criteria, Target
from archiver.database import transaction
from archiver.inbound.signatures import standard_webhooks
from archiver.outbound.followups import (
    deliveries,
    fanout,
    review,
    subscriptions,
)
from archiver.outbound.followups import (
    payloads as contents,
)
from archiver.outbound.followups.deliveries import Due, Result
from archiver.outbound.followups.rate_limit import RateLimiter
from archiver.outbound.followups.sender import AHEAD, FRESH_SECONDS, Sender
from archiver.outbound.followups.sending import Attempt
from tests.support.erasures import record, sweep
from tests.support.files import in_files
from tests.support.followups import SECRET, Receiver, change, receiving, sending, states, subscribe
from tests.support.payloads import created
from tests.support.receivers import serving
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

pytestmark = on_one_version


def changes(engine: Engine, count: int) -> None:
    change(engine, *(("chat.created", "s", f"c{number}") for number in range(count)))


@asynccontextmanager
async def draining(database_url: str, subscription_id: int) -> AsyncIterator[asyncio.Task[None]]:
    """The sender of one subscription, until it has nothing to send any more."""
    engine = database.connect_async(database.database_url(database_url), pool_size=1)
    alone = Sender(
        subscription_id, engine, RateLimiter(0), "alone", allow_private=True, select_seal=seals.select_seal
    )
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
                await asyncio.wait_for(ended, 120)

        asyncio.run(run())
    assert 1 <= len(receiver.got) <= AHEAD


def test_a_paused_or_removed_subscription_cannot_be_leased(engine: Engine) -> None:
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
        erasure.order(engine, [Target("s2")], "request", AuditEntry("erase", "anna@desk", "she asked for it"))
        sweep(engine)
        old = monotonic() + FRESH_SECONDS
        until(lambda: monotonic() > old, "what was read is old")
        receiver.hangs = False
        until(lambda: states(engine) == {"delivered": 2}, "both are told")
    assert "erased_at" in receiver.got[1].data
    assert "messages" not in receiver.got[1].data


def test_both_secrets_sign_after_a_rotation(engine: Engine, database_url: str) -> None:
    changes(engine, 1)
    new = standard_webhooks.make_secret()
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url)
        with transaction(engine) as connection:
            subscriptions.rotate(connection, subscription_id, new)
        with sending(database_url):
            until(lambda: states(engine) == {"delivered": 1}, "it is told")
    (got,) = receiver.got
    for secret in (SECRET, new):
        assert Webhook(secret).verify(got.body, got.headers) == got.payload


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


class Slow(Response):
    """An answer that takes its time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5)
        await super().__call__(scope, receive, send)


def test_an_answer_in_flight_does_not_undo_a_retry_after(engine: Engine, database_url: str) -> None:
    changes(engine, 2)
    with receiving() as receiver, sending(database_url):
        receiver.then(Response(status_code=429, headers={"retry-after": "3600"}), Slow(status_code=204))
        subscribe(engine, receiver.url, concurrency=2)
        until(lambda: states(engine) == {"delivered": 1, "pending": 1}, "both have ended")
        closed = "SELECT open_until > now() + interval '59 minutes' FROM archiver.subscriptions"
        assert rows(engine, closed) == [(True,)]


def test_a_receiver_that_fails_for_a_moment_is_asked_again_after_some_seconds(
    engine: Engine, database_url: str
) -> None:
    changes(engine, 50)
    with receiving() as receiver, sending(database_url):
        receiver.always(500)
        subscribe(engine, receiver.url)
        until(
            lambda: rows(engine, "SELECT open_until > now() FROM archiver.subscriptions") == [(True,)],
            "it is cut off",
        )
        until(lambda: rows(engine, "SELECT leased_by FROM archiver.subscriptions") == [(None,)], "all have ended")
        soon = "open_until <= now() + 5 * power(2, failures - 5) * interval '1 second'"
        assert rows(engine, f"SELECT {soon} FROM archiver.subscriptions") == [(True,)]
        receiver.then()
        until(lambda: states(engine).get("delivered", 0) >= 30, "it goes on by itself")


@pytest.mark.parametrize("fields", [{"status": "x" * 300_000}, {"session": {"id": "s1", "name": "x" * 300_000}}])
def test_i12_a_body_is_bounded_for_any_long_field(fields: dict[str, Any], engine: Engine) -> None:
    now = datetime.now(UTC)
    record(engine, created("c1", "s1", **fields))
    due = [
        Due(1, 1, "chat.created", "s1", "c1", None, now, 0, 14),
        Due(1, 2, "session.settled", "s1", None, None, now, 0, 14),
    ]
    with transaction(engine) as connection:
        bodies = contents.select_bodies(connection, due, seals.select_seal)
    assert all(len(body) <= contents.MAX_BYTES for body in bodies.values())
    assert json.loads(bodies[1])["data"]["truncated"] is True
    assert json.loads(bodies[1])["data"]["chat_id"] == "c1"


def test_a_retry_while_the_last_attempt_is_under_way_is_kept(engine: Engine) -> None:
    changes(engine, 1)
    subscription_id = subscribe(engine, "http://127.0.0.1:9")
    execute(
        engine,
        "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at, created_at,"
        f" attempts, last_attempt, due_at) VALUES ({subscription_id}, 1, 'chat.created', 's', 'c0', now(), now(), 13,"
        " 14, now())",
    )
    with transaction(engine) as connection:
        (due,) = deliveries.select_due(connection, subscription_id, [], 1, is_ordered=False, is_probe=False)
    last = Result(due, Attempt(datetime.now(UTC), 0.1, 500, "not_2xx"))
    with transaction(engine) as connection:
        assert review.retry(connection, subscription_id, 1)
    for _ in range(2):  # the same twice is the same
        with transaction(engine) as connection:
            deliveries.record_results(connection, subscription_id, [last])
        assert rows(engine, "SELECT state, attempts, due_at <= now(), ended_at FROM archiver.deliveries") == [
            ("pending", 14, True, None)
        ]
    with transaction(engine) as connection:
        (due,) = deliveries.select_due(connection, subscription_id, [], 1, is_ordered=False, is_probe=False)
    assert due.attempts < due.last_attempt - 1


def names(engine: Engine, *contents: str) -> None:
    """Turns that say this, each changed once, in this order."""
    record(engine, *(created(f"c{number}", "s", input=each) for number, each in enumerate(contents)))
    changes(engine, len(contents))


@pytest.fixture
def hesitant(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that say "huge" are not read to their end in any time that is allowed."""
    monkeypatch.setattr(fanout, "SEARCH_SECONDS", 3.0)
    monkeypatch.setattr(fanout, "MAX_SEARCH_SECONDS", 4.0)
    names(engine, "yes", "no", "huge", "no", "yes")
    execute(engine, "ALTER TABLE archiver.messages RENAME TO read_slowly")
    is_slow = "content = 'huge' AND current_query() LIKE '%by_contains%'"
    execute(
        engine,
        "CREATE VIEW archiver.messages AS SELECT session_id, chat_id, ordinal, role, source,"
        f" CASE WHEN {is_slow} THEN content || pg_sleep(60)::text ELSE content END AS content"
        " FROM archiver.read_slowly",
    )


@pytest.mark.usefixtures("hesitant")
def test_i11_a_change_that_cannot_be_searched_in_time_is_delivered_and_blocks_nothing(
    engine: Engine, database_url: str
) -> None:
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url, contains="YES")
        with transaction(engine) as connection:
            subscription = subscriptions.subscription_from_row(subscriptions.select_one(connection, subscription_id))
            assert fanout.search(connection, subscription, 1, 3) is None
            page = fanout.search(connection, subscription, 0, 2)
            assert page is not None
            assert (page.examined, page.through, page.matched) == (2, 2, 1)
            assert connection.scalar(text("SHOW statement_timeout")) == "30s"
        with sending(database_url):
            until(lambda: rows(engine, "SELECT cursor FROM archiver.subscriptions") == [(5,)], "all was looked at")
            until(lambda: states(engine) == {"delivered": 3}, "and what was found is told")
    assert sorted(receiver.cursors) == [1, 3, 5]


def test_what_is_sought_is_found_for_each_change_of_a_turn_and_of_its_session(engine: Engine) -> None:
    record(engine, created("c1", "s1", input="Äpfel"), created("c2", "s2", input="Birnen"))
    change(
        engine,
        *(("chat.created", "s1", "c1"), ("chat.updated", "s1", "c1"), ("session.settled", "s1", None)),
        *(("chat.created", "s2", "c2"), ("session.settled", "s2", None), ("session.settled", "s1", None)),
    )
    subscription_id = subscribe(engine, "http://127.0.0.1:9", contains="äPFEL")
    with transaction(engine) as connection:
        subscription = subscriptions.subscription_from_row(subscriptions.select_one(connection, subscription_id))
        page = fanout.search(connection, subscription, 0, fanout.PAGE)
    assert page is not None
    assert (page.examined, page.matched) == (6, 4)
    assert rows(engine, "SELECT cursor FROM archiver.deliveries ORDER BY 1") == [(1,), (2,), (3,), (6,)]


def test_the_databases_style_of_dates_changes_nothing(engine: Engine, database_url: str) -> None:
    execute(engine, f"ALTER DATABASE {engine.url.database} SET datestyle = 'German'")
    engine.dispose()
    with receiving() as receiver, serving(database_url, "--worker", ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE="true") as serve:
        subscribe(engine, receiver.url, "chat.created")
        assert serve.post(created("c1", "s1")).json()["status"] == "stored"
        until(lambda: states(engine) == {"delivered": 1}, "it is told")
        assert serve.stop() == 0
        assert '"level": "error"' not in serve.stderr()


def test_a_subscription_cannot_begin_beyond_the_end_of_the_feed(engine: Engine) -> None:
    changes(engine, 3)
    with pytest.raises(subscriptions.CursorBeyondFeedError):
        subscribe(engine, "http://127.0.0.1:9", after=4)
    subscribe(engine, "http://127.0.0.1:9", after=3)


def test_i8_the_vacuum_of_the_page_reaches_what_receivers_answered_and_what_holds_named(
    engine: Engine, database_url: str
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "erasure.md").read_text()
    (vacuum,) = re.findall(r"`(VACUUM \(FULL\) [^`]+)`", page)
    record(engine, created("c1", "s1"))
    change(engine, ("chat.created", "s1", "c1"))
    with receiving() as receiver, sending(database_url):
        receiver.always(Response("you said: marker-answer-7f3a"))
        subscribe(engine, receiver.url)
        until(lambda: states(engine) == {"delivered": 1}, "it is told")
    with transaction(engine) as connection:
        held = erasure.insert_hold(connection, Criteria(variable="email", value="marker-hold-7f3a"), "anna", "case 7")
        erasure.release_hold(connection, held, "anna", "closed")
    erasure.order(engine, [Target("s1")], "request", AuditEntry("erase", "anna@desk", "she asked for it"))
    sweep(engine)
    until(lambda: vacuumed(engine, vacuum) == set(), "no transaction that began before the erasure is open")


def vacuumed(engine: Engine, vacuum: str) -> set[str]:
    """The words that are left in the files of the server: a row stays while an older transaction may see it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(vacuum))
        connection.execute(text("CHECKPOINT"))
        folder = Path(str(connection.scalar(text("SHOW data_directory"))))
    files = [each for each in folder.rglob("*") if each.is_file() and "pg_wal" not in each.parts]
    return in_files(["marker-answer-7f3a", "marker-hold-7f3a"], *files)
