"""Follow-ups match the archive and are delivered (I11): to which receiver, in which order, and after faults."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from standardwebhooks import Webhook
from starlette.responses import RedirectResponse, Response, StreamingResponse

from archiver.compliance import erasure, seals
from archiver.compliance.erasure import AuditEntry, Target
from archiver.database import transaction
from archiver.outbound.followups import deliveries, payloads, pruning, review, schedule, subscriptions
from archiver.outbound.followups.deliveries import Due
from archiver.outbound.followups.fanout import MAX_PENDING
from tests.support.erasures import read, record, said, sweep
from tests.support.feeds import publish
from tests.support.followups import (
    SECRET,
    change,
    let_time_pass,
    receiving,
    retry_by_hand,
    sending,
    states,
    subscribe,
)
from tests.support.payloads import created, deleted
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

ACT = AuditEntry("erase", "anna@desk", "she asked for it")


@pytest.fixture(autouse=True)
def _retries_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_by_hand(monkeypatch)


def ids(count: int, prefix: str = "c") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def deliveries_made(engine: Engine) -> list[tuple[int, int]]:
    return rows(engine, "SELECT subscription_id, cursor FROM archiver.deliveries ORDER BY 1, 2")


def attempts(engine: Engine) -> list[Any]:
    query = "SELECT cursor, number, status, fault, answer FROM archiver.attempts ORDER BY cursor, number"
    return [(*row[:4], None if row[4] is None else bytes(row[4])) for row in rows(engine, query)]


def until_delivered(engine: Engine, count: int) -> None:
    until(lambda: states(engine) == {"delivered": count}, f"{count} are delivered")


# What is told


def test_i11_a_turn_is_delivered_as_archived_and_signed(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"))
    publish(engine)
    with receiving() as receiver, sending(database_url):
        subscribe(engine, receiver.url + "/crm?x=1", "chat.created")
        until_delivered(engine, 1)
    (got,) = receiver.got
    assert got.path == "/crm"
    assert Webhook(SECRET).verify(got.body, got.headers) == got.payload
    ((changed_at,),) = rows(engine, "SELECT changed_at FROM archiver.changes")
    assert got.payload["type"] == "chat.created"
    assert datetime.fromisoformat(got.payload["timestamp"]) == changed_at
    assert got.data == {
        "cursor": 1,
        "session_id": "s1",
        "chat_id": "c1",
        "chat": {
            "assistant_id": "assistant-1",
            "external_id": None,
            "session_name": None,
            "status": "completed",
            "cost": 0.0125,
            "variables": {"customerTier": "Premium"},
            "created_at": "2024-01-15T09:30:00Z",
            "updated_at": "2024-01-15T09:30:01Z",
            "deleted_at": None,
            "source": "webhook",
        },
        "messages": [
            {"role": "user", "content": "question of c1", "source": "webhook"},
            {"role": "assistant", "content": "answer to c1", "source": "webhook"},
        ],
    }
    assert attempts(engine) == [(1, 1, 204, None, b"")]


def test_a_session_is_delivered_with_its_figures(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"))
    read(engine, "s1", 10, *said("c1", "c2"))
    publish(engine)
    with receiving() as receiver, sending(database_url):
        subscribe(engine, receiver.url, "session.settled", "session.repaired")
        until_delivered(engine, 2)
    assert sorted(each.payload["type"] for each in receiver.got) == ["session.repaired", "session.settled"]
    conversation = receiver.got[0].data["conversation"]
    assert (conversation["chats"], conversation["messages"], conversation["coverage"]) == (2, 4, "repaired")
    assert conversation["name"] == "name of s1"


def test_a_turn_that_was_assigned_since_is_delivered_with_its_session(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", None))
    publish(engine)
    record(engine, created("c1", "s1"))
    with receiving() as receiver:
        subscribe(engine, receiver.url, "chat.created", contains="QUESTION of c1")
        with sending(database_url):
            until_delivered(engine, 1)
    assert receiver.got[0].data["session_id"] == "s1"
    assert len(receiver.got[0].data["messages"]) == 2


def test_i12_a_body_is_bounded(engine: Engine) -> None:
    now = datetime.now(UTC)
    record(engine, created("c1", "s1", input="x" * payloads.MAX_BYTES), created("c2", "s1"))
    with transaction(engine) as connection:
        due = [Due(1, number, "chat.created", "s1", f"c{number}", None, now, 0, 14) for number in (1, 2)]
        bodies = payloads.select_bodies(connection, due, seals.select_seal)
    large, small = (json.loads(bodies[number])["data"] for number in (1, 2))
    assert large["truncated"] is True
    assert "messages" not in large
    assert large["chat"]["status"] == "completed"
    assert len(small["messages"]) == 2
    wide = {"chat": {"variables": {"a": "x" * payloads.MAX_BYTES}}, "messages": [{"content": "x"}]}
    body = payloads.encode("chat.created", now, wide)
    assert json.loads(body)["data"] == {"chat": {"variables": None}, "truncated": True}


# To whom


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [1, 2, 3, 4, 5]),
    ({"assistant_id": "a2"}, [2, 4]),
    ({"variable": "tier", "value": "gold"}, [1, 3]),
    ({"variable": "tier", "value": "gol"}, []),
    ({"contains": "REFUND"}, [3, 5]),
    ({"contains": "100%"}, [2, 4]),
    ({"contains": "_"}, []),
    ({"assistant_id": "a1", "variable": "tier", "value": "gold"}, [1, 3]),
    ({"assistant_id": "a2", "contains": "refund"}, []),
]


@pytest.mark.parametrize(("filters", "cursors"), FILTERS)
def test_only_matching_changes_are_delivered(
    filters: dict[str, Any], cursors: list[int], engine: Engine, database_url: str
) -> None:
    gold = {"variableValues": {"tier": "gold"}}
    record(engine, created("c1", "s1", assistantId="a1", input="hello", assistantOverrides=gold))
    record(engine, created("c2", "s2", assistantId="a2", input="100% sure"))
    change(
        engine,
        ("chat.created", "s1", "c1"),
        ("chat.created", "s2", "c2"),
        ("session.settled", "s1", None),
        ("session.lost", "s2", None),
        ("chat.updated", "s1", "c3"),
    )
    record(engine, created("c3", "s1", assistantId="a3", input="a Refund, please"))
    with receiving() as receiver, sending(database_url):
        subscribe(engine, receiver.url, **filters)
        until(lambda: rows(engine, "SELECT cursor FROM archiver.subscriptions") == [(5,)], "all was looked at")
        until(lambda: sorted(receiver.cursors) == cursors, "what matches is told")
    assert [cursor for _, cursor in deliveries_made(engine)] == cursors


def test_a_subscription_begins_at_the_end_of_the_feed_unless_asked(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(3)))
    with receiving() as receiver, sending(database_url):
        new = subscribe(engine, receiver.url, after=None)
        late = subscribe(engine, receiver.url, after=2)
        change(engine, ("chat.created", "s", "c9"))
        until_delivered(engine, 3)
    assert deliveries_made(engine) == [(new, 4), (late, 3), (late, 4)]


@on_one_version
def test_i12_what_waits_is_bounded_and_the_rest_stays_in_the_feed(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(3)))
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url)
        execute(
            engine,
            "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at,"
            f" created_at, last_attempt, due_at) SELECT {subscription_id}, -n, 'chat.created', 's', 'c', now(),"
            " now(), 14, CASE WHEN n > 1 THEN now() + interval '1 hour' ELSE now() END"
            f" FROM generate_series(1, {MAX_PENDING + 1}) n",
        )
        with sending(database_url):
            until(lambda: receiver.cursors == [-1], "what is due is sent")
            until(lambda: states(engine).get("delivered") == 1, "and recorded")
            assert rows(engine, "SELECT cursor FROM archiver.subscriptions") == [(0,)]
            receiver.hangs = True
            execute(engine, f"DELETE FROM archiver.deliveries WHERE cursor = -{MAX_PENDING}")
            until(lambda: receiver.cursors == [-1, 1], "there is room for one")
            assert rows(engine, "SELECT cursor FROM archiver.subscriptions") == [(1,)]
            receiver.hangs = False
            until(lambda: sorted(receiver.cursors) == [-1, 1, 2, 3], "there is room again")


# When it fails


def test_i11_what_fails_is_tried_again_under_the_same_id(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver, sending(database_url):
        receiver.then(500, Response("try later", 503))
        subscribe(engine, receiver.url)
        for count in (1, 2):
            until(lambda count=count: len(attempts(engine)) == count, "it failed")  # type: ignore[misc]  # bound at once
            assert states(engine) == {"pending": 1}
            let_time_pass(engine)
        until_delivered(engine, 1)
    assert len(receiver.by_id) == 1
    assert attempts(engine) == [
        (1, 1, 500, "not_2xx", b""),
        (1, 2, 503, "not_2xx", b"try later"),
        (1, 3, 204, None, b""),
    ]


@on_one_version
def test_it_is_given_up_in_the_end_and_retried_by_hand(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver, sending(database_url):
        receiver.always(500)
        subscription_id = subscribe(engine, receiver.url)
        until(lambda: len(attempts(engine)) == 1, "it failed")
        execute(engine, f"UPDATE archiver.deliveries SET attempts = {schedule.ATTEMPTS - 2}")
        for count in (2, 3):
            assert states(engine) == {"pending": 1}
            let_time_pass(engine)
            until(lambda count=count: len(attempts(engine)) == count, "it failed")  # type: ignore[misc]  # bound at once
        assert states(engine) == {"dead": 1}
        let_time_pass(engine)
        receiver.then(500)
        with transaction(engine) as connection:
            assert review.retry(connection, subscription_id, 1) == "retried"
        until(lambda: len(attempts(engine)) == 4, "it failed once more")
        assert states(engine) == {"pending": 1}  # as a new one would
        let_time_pass(engine)
        until_delivered(engine, 1)
    with transaction(engine) as connection:
        assert review.retry(connection, subscription_id, 1) == "delivered"
        assert review.retry(connection, subscription_id, 2) == "unknown"
    assert [number for _, number, *_ in attempts(engine)] == [1, 13, 14, 15, 16]
    assert len(receiver.by_id) == 1


@on_one_version
def test_410_pauses_and_resume_goes_on(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(3)))
    with receiving() as receiver, sending(database_url):
        receiver.then(410)
        subscription_id = subscribe(engine, receiver.url, concurrency=1)
        paused = "SELECT pause_reason FROM archiver.subscriptions"
        until(lambda: rows(engine, paused) == [("gone",)], "it is paused")
        sent = len(receiver.got)
        change(engine, ("chat.created", "s", "c9"))
        with transaction(engine) as connection:
            assert subscriptions.select_busy(connection, "nobody") == []
            assert subscriptions.resume(connection, subscription_id) == 0
        let_time_pass(engine)
        until_delivered(engine, 4)
    assert sent == 1
    assert sorted(set(receiver.cursors)) == [1, 2, 3, 4]


@on_one_version
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_for_all_that_waits(status: int, engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(3)))
    with receiving() as receiver, sending(database_url):
        receiver.then(Response(status_code=status, headers={"retry-after": "3600"}))
        subscribe(engine, receiver.url, concurrency=1)
        closed = "SELECT open_until - now() > interval '59 minutes' FROM archiver.subscriptions"
        until(lambda: rows(engine, closed) == [(True,)], "it is left alone")
        due = "SELECT count(*) FROM archiver.deliveries WHERE due_at > now() + interval '59 minutes'"
        assert rows(engine, due) == [(1,)]
        waiting = len(attempts(engine))
        let_time_pass(engine)
        until_delivered(engine, 3)
    assert waiting == 1


@on_one_version
def test_redirects_are_not_followed(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver, sending(database_url):
        receiver.then(RedirectResponse(receiver.url + "/elsewhere", 307))
        subscribe(engine, receiver.url + "/here")
        until(lambda: attempts(engine) == [(1, 1, 307, "redirect", b"")], "it failed")
    assert [each.path for each in receiver.got] == ["/here"]


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 10_000
        await asyncio.sleep(0.001)  # so that it hears that nobody reads any more


@on_one_version
def test_i12_an_answer_without_end_is_cut(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver, sending(database_url):
        receiver.then(StreamingResponse(endless()))
        subscribe(engine, receiver.url)
        until_delivered(engine, 1)
    assert attempts(engine) == [(1, 1, 200, None, b"x" * 256)]


@on_one_version
def test_a_receiver_that_fails_is_asked_with_one_at_a_time_and_nothing_is_used_up(
    engine: Engine, database_url: str
) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(50)))
    with receiving() as receiver, sending(database_url):
        receiver.always(500)
        subscribe(engine, receiver.url)
        closed = "SELECT open_until > now() FROM archiver.subscriptions"
        until(lambda: rows(engine, closed) == [(True,)], "it is left alone")
        until(lambda: rows(engine, "SELECT leased_by FROM archiver.subscriptions") == [(None,)], "all have ended")
        limit = len(receiver.got)
        assert limit <= schedule.OPEN_AFTER_FAILURES + 4 * 4  # what had been read already
        for probe in range(1, 4):
            execute(engine, "UPDATE archiver.subscriptions SET open_until = now()")
            until(lambda probe=probe: len(attempts(engine)) == limit + probe, "one more")  # type: ignore[misc]  # bound
            assert rows(engine, closed) == [(True,)]
        assert rows(engine, "SELECT max(attempts) FROM archiver.deliveries") == [(1,)]
        receiver.then()
        let_time_pass(engine)
        until_delivered(engine, 50)
    assert len(receiver.by_id) == 50


@on_one_version
def test_a_subscription_that_fails_for_a_week_is_paused(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver:
        receiver.always(500)
        subscribe(engine, receiver.url)
        execute(engine, "UPDATE archiver.subscriptions SET failures = 9, failing_since = now() - interval '8 days'")
        with sending(database_url):
            until(
                lambda: rows(engine, "SELECT pause_reason FROM archiver.subscriptions") == [("failing",)],
                "it is paused",
            )


@on_one_version
def test_one_that_hangs_and_one_that_fails_delay_no_other(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(100)))
    with receiving() as healthy, receiving() as hanging, receiving() as failing, sending(database_url):
        hanging.hangs = True
        failing.always(500)
        for receiver in (hanging, failing, healthy):
            subscribe(engine, receiver.url)
        until(lambda: len(hanging.got) == 4, "as many hang as may")
        until(lambda: len(healthy.by_id) == 100, "the healthy one has them all")
        assert len(hanging.got) == 4
        hanging.hangs = False
        until(lambda: len(hanging.by_id) == 100, "the other one too, once it answers")


# In order


def later(engine: Engine) -> dict[str, int]:
    let_time_pass(engine)
    return states(engine)


@on_one_version
def test_an_ordered_subscription_delivers_each_session_in_order(engine: Engine, database_url: str) -> None:
    sessions = ids(5, "s")
    change(engine, *(("chat.updated", sessions[number % 5], "c") for number in range(60)))
    with receiving() as receiver, sending(database_url):
        receiver.answers = iter([Response(status_code=500 if number in {7, 20} else 204) for number in range(200)])
        subscribe(engine, receiver.url, is_ordered=True)
        until(lambda: len([row for row in attempts(engine) if row[3]]) == 2, "two have failed")
        # Their sessions wait for them, the others do not.
        until(lambda: states(engine).get("delivered", 0) >= 36, "the other three are told")
        until(lambda: later(engine) == {"delivered": 60}, "all are told")
    order: dict[str, list[int]] = {}
    for got in receiver.got:
        cursors = order.setdefault(got.data["session_id"], [])
        if cursors[-1:] != [got.data["cursor"]]:  # tried again
            cursors.append(got.data["cursor"])
    assert order == {name: list(range(number + 1, 61, 5)) for number, name in enumerate(sessions)}


# Several workers


@on_one_version
def test_two_workers_deliver_each_change_once(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(300)))
    with receiving() as first, receiving() as second:
        for receiver in (first, second):
            subscribe(engine, receiver.url)
        with sending(database_url), sending(database_url):
            until_delivered(engine, 600)
    for receiver in (first, second):
        assert sorted(receiver.cursors) == list(range(1, 301))
        assert receiver.most_at_once <= 4


def test_another_takes_over_once_the_lease_has_ended(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver:
        subscribe(engine, receiver.url)
        execute(
            engine,
            "UPDATE archiver.subscriptions SET leased_by = 'dead',"
            f" leased_until = now() + interval '{subscriptions.LEASE_SECONDS} seconds'",
        )
        with sending(database_url):
            with transaction(engine) as connection:
                assert subscriptions.select_busy(connection, "other") == []
                assert list(subscriptions.select_busy(connection, "dead")) == [1]
                assert subscriptions.lease(connection, 1, "other") is None
            execute(engine, "UPDATE archiver.subscriptions SET leased_until = now()")
            until_delivered(engine, 1)
    assert len(receiver.got) == 1


# Erased (I8)


def test_i8_only_ids_of_erased_content_are_delivered(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s2"))
    erasure.order(engine, [Target("s1", "c1"), Target("s2")], "request", ACT)
    sweep(engine)
    change(
        engine,
        ("chat.deleted", "s1", "c1"),
        ("chat.created", "s1", "c2"),
        ("chat.created", "s2", "c3"),
        ("session.settled", "s2", None),
    )
    with receiving() as receiver, sending(database_url):
        subscribe(engine, receiver.url)
        until_delivered(engine, 4)
    published = {each.data["cursor"]: each.data for each in receiver.got}
    assert {cursor: sorted(data) for cursor, data in published.items()} == {
        1: ["chat_id", "cursor", "erased_at", "session_id"],
        2: ["chat", "chat_id", "cursor", "messages", "session_id"],
        3: ["chat_id", "cursor", "erased_at", "session_id"],
        4: ["cursor", "erased_at", "session_id"],
    }


def test_i8_an_erasure_takes_what_receivers_echoed(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s2"), created("c4", "s3"))
    record(engine, deleted("c1", "s1"))
    change(
        engine,
        ("chat.created", "s1", "c1"),
        ("chat.created", "s1", "c2"),
        ("session.settled", "s2", None),
        ("chat.created", "s2", "c3"),
        ("chat.created", "s3", "c4"),
    )
    with receiving() as receiver, sending(database_url):
        receiver.always(Response("you said: MARKER"))
        subscribe(engine, receiver.url)
        until_delivered(engine, 5)
        erasure.order(engine, [Target("s1", "c1"), Target("s2")], "request", ACT)
        sweep(engine)
        remaining = [cursor for cursor, *_, answer in attempts(engine) if answer is not None]
        assert remaining == [2, 5]
        # And of what was under way while it was erased.
        change(engine, ("chat.updated", "s2", "c3"))
        until_delivered(engine, 6)
    assert [answer for cursor, *_, answer in attempts(engine) if cursor == 6] == [None]


# What is forgotten


def test_what_ended_is_forgotten_after_its_time_and_what_waits_is_not(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(4)))
    with receiving() as receiver, sending(database_url):
        subscription_id = subscribe(engine, receiver.url)
        until_delivered(engine, 4)
    execute(
        engine,
        "UPDATE archiver.deliveries SET ended_at = now() - interval '15 days' WHERE cursor <= 2",
        "UPDATE archiver.deliveries SET state = 'pending', ended_at = NULL WHERE cursor = 3",
    )
    with transaction(engine) as connection:
        assert pruning.delete_deliveries(connection, pruning.select_ended(connection, 14)) == 2
        assert pruning.select_removed(connection) == []
    assert [row[0] for row in attempts(engine)] == [3, 4]
    with transaction(engine) as connection:
        subscriptions.remove(connection, subscription_id)
        assert pruning.delete_deliveries(connection, pruning.select_removed(connection)) == 2
    assert attempts(engine) == deliveries_made(engine) == []


def test_the_feed_is_kept_for_those_at_work_only(engine: Engine) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(4)))
    with transaction(engine) as connection:
        assert subscriptions.select_consumed(connection) is None
    first, second = (subscribe(engine, "http://127.0.0.1:9", after=after) for after in (1, 3))
    with transaction(engine) as connection:
        assert subscriptions.select_consumed(connection) == 1
        subscriptions.pause(connection, first, "by hand")
        assert subscriptions.select_consumed(connection) == 3
    execute(engine, "DELETE FROM archiver.changes WHERE cursor <= 3")
    with transaction(engine) as connection:
        assert subscriptions.resume(connection, first) == 2
        assert subscriptions.resume(connection, second) == 0


def test_how_follow_ups_stand(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", each) for each in ids(3)))
    with receiving() as receiver, sending(database_url):
        receiver.then(500)
        first = subscribe(engine, receiver.url)
        until(lambda: states(engine) == {"delivered": 2, "pending": 1}, "one failed")
        until(lambda: rows(engine, "SELECT leased_by FROM archiver.subscriptions") == [(None,)], "all have ended")
    second = subscribe(engine, "http://127.0.0.1:9")
    execute(engine, "UPDATE archiver.changes SET changed_at = now() - interval '1 hour'")
    with transaction(engine) as connection:
        state_query = review.select_stats(connection)
        assert (state_query.subscriptions, state_query.pending, state_query.dead, state_query.behind) == (2, 1, 0, 3)
        assert state_query.oldest_seconds >= 3600
        subscriptions.pause(connection, second, "by hand")
        state_query = review.select_stats(connection)
        assert (state_query.paused, state_query.behind) == (1, 0)
        assert state_query.oldest_seconds < 3600
        counted = review.select_subscriptions(connection, first)
    assert [(row["pending"], row["dead"], row["behind"]) for row in counted] == [(1, 0, 0)]
    assert not {"secret", "previous_secret"} & counted[0].keys()


def test_a_webhook_id_can_be_read_again() -> None:
    now = datetime.now(UTC)
    published = deliveries.message_id(7, 12_345, now)
    assert deliveries.parse_message_id(published) == deliveries.parse_message_id("msg_7_12345") == (7, 12_345)
    assert published != deliveries.message_id(7, 12_345, now + timedelta(microseconds=1))
    assert "." not in published
    for wrong in ("", "msg", "msg_7", "msg_x_1", "evt_7_1", "msg_7_-1", "msg_7_1_2_3", f"msg_7_{'9' * 30}"):
        assert deliveries.parse_message_id(wrong) is None


@on_one_version
def test_the_secret_before_signs_for_a_while(engine: Engine, database_url: str) -> None:
    new = "whsec_" + "YW5vdGhlciBzZWNyZXQsIHdoaWNoIGlzIHRoZSBuZXcgb25l"
    with receiving() as receiver, sending(database_url):
        subscription_id = subscribe(engine, receiver.url, after=None)
        with transaction(engine) as connection:
            subscriptions.rotate(connection, subscription_id, new)
        change(engine, ("chat.created", "s", "c1"))
        until_delivered(engine, 1)
        execute(engine, "UPDATE archiver.subscriptions SET previous_until = now()")
        change(engine, ("chat.created", "s", "c2"))
        until_delivered(engine, 2)
    both, one = receiver.got
    assert len(both.headers["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, new):
        Webhook(secret).verify(both.body, both.headers)
    Webhook(new).verify(one.body, one.headers)
    assert len(one.headers["webhook-signature"].split(" ")) == 1
