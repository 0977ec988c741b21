"""Receivers that fail (I11): when deliveries are retried, and how failures are reported."""

import pytest
from sqlalchemy import Engine

from tests.support.commands import output_of
from tests.support.erasures import record
from tests.support.feeds import publish
from tests.support.followup_commands import followups, listed
from tests.support.followups import change, let_time_pass, receiving, retry_by_hand, sending, states, subscribe
from tests.support.payloads import created
from tests.support.ports import free_port
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

pytestmark = on_one_version


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_by_hand(monkeypatch)


def test_a_receiver_that_starts_late_gets_deliveries_within_seconds(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", f"c{number}") for number in range(50)))
    port = free_port()
    with sending(database_url):
        subscription_id = subscribe(engine, f"http://127.0.0.1:{port}/")
        until(lambda: rows(engine, "SELECT failures FROM archiver.subscriptions") >= [(5,)], "it is cut off")
        until(lambda: rows(engine, "SELECT leased_by FROM archiver.subscriptions") == [(None,)], "all have ended")
        soon = "open_until <= now() + 5 * power(2, failures - 5) * interval '1 second'"
        assert rows(engine, f"SELECT {soon} FROM archiver.subscriptions") == [(True,)]
        (row,) = listed(database_url, "list")
        assert (row["state"], row["last_status"], row["last_fault"]) == ("failing", None, "no_connection")
        with receiving(port):
            execute(engine, "UPDATE archiver.deliveries SET due_at = now() WHERE state = 'pending'")
            until(lambda: states(engine) == {"delivered": 50}, "it is told by itself")
        assert listed(database_url, "show", str(subscription_id))["state"] == "at work"


@pytest.mark.usefixtures("by_hand")
def test_what_was_under_way_when_it_was_cut_off_counts_no_probe(engine: Engine, database_url: str) -> None:
    change(engine, *(("chat.created", "s", f"c{number}") for number in range(50)))
    with receiving() as receiver, sending(database_url):
        receiver.hangs = True
        receiver.always(500)
        subscribe(engine, receiver.url, concurrency=20)
        until(lambda: len(receiver.got) == 20, "all hang")
        execute(engine, "UPDATE archiver.subscriptions SET failures = 5, open_until = now()")
        receiver.hangs = False
        until(lambda: rows(engine, "SELECT count(*) FROM archiver.attempts") >= [(20,)], "all failed")
        until(
            lambda: rows(engine, "SELECT open_until > now() FROM archiver.subscriptions") == [(True,)], "left alone"
        )
        ((failures,),) = rows(engine, "SELECT failures FROM archiver.subscriptions")
    assert failures <= 5 + 2  # those that ended in two turns at most


def test_a_test_that_is_taken_ends_the_wait(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver:
        subscribe(engine, receiver.url)
        waits = "failures = 9, failing_since = now(), open_until = now() + interval '15 minutes'"
        execute(engine, f"UPDATE archiver.subscriptions SET {waits}")
        assert "circuit open until" in output_of(followups(database_url, "show", "1"))
        receiver.then(500)
        assert followups(database_url, "test", "1").returncode == 1
        assert listed(database_url, "show", "1")["failures"] == 9
        assert followups(database_url, "test", "1").returncode == 0
        shown = listed(database_url, "show", "1")
        assert (shown["open_until"], shown["closed_until"]) == (None, None)
        with sending(database_url):
            until(lambda: states(engine) == {"delivered": 1}, "it is told at once")
        followups(database_url, "pause", "1", "--reason", "moving house")
        assert "archiver followups resume 1" in output_of(followups(database_url, "test", "1"))
        assert "paused: moving house" in output_of(followups(database_url, "show", "1"))


@pytest.mark.usefixtures("by_hand")
def test_a_week_counts_from_the_first_failure_and_not_without_attempts(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver:
        receiver.always(500)
        for failing in (
            "failures = 1, failing_since = now() - interval '8 days', open_until = now() - interval '8 days'",
            "failures = 0, failing_since = NULL, open_until = NULL",
        ):
            subscription_id = subscribe(engine, receiver.url)
            execute(engine, f"UPDATE archiver.subscriptions SET {failing} WHERE id = {subscription_id}")
        with sending(database_url):
            until(lambda: rows(engine, "SELECT count(*) FROM archiver.attempts") == [(2,)], "both failed")
    recent = "SELECT paused_at, failing_since > now() - interval '1 day' FROM archiver.subscriptions"
    assert rows(engine, recent) == [(None, True)] * 2


@pytest.mark.usefixtures("by_hand")
def test_a_damaged_secret_is_a_failed_attempt(engine: Engine, database_url: str) -> None:
    change(engine, ("chat.created", "s", "c"))
    with receiving() as receiver:
        subscription_id = subscribe(engine, receiver.url)
        execute(engine, "UPDATE archiver.subscriptions SET secret = 'whsec_damaged'")
        with sending(database_url):
            until(lambda: rows(engine, "SELECT fault FROM archiver.attempts") == [("bad_secret",)], "it is counted")
            assert receiver.got == []
            listed(database_url, "rotate", str(subscription_id))
            let_time_pass(engine)
            until(lambda: states(engine) == {"delivered": 1}, "the new secret signs")
    assert len(receiver.got[0].headers["webhook-signature"].split(" ")) == 1


@pytest.mark.usefixtures("by_hand")
def test_in_order_changes_of_a_turn_before_its_assignment_come_first(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", None))
    publish(engine)
    with receiving() as receiver, sending(database_url):
        receiver.then(500)
        subscribe(engine, receiver.url, is_ordered=True)
        until(lambda: rows(engine, "SELECT count(*) FROM archiver.attempts") == [(1,)], "it failed")
        far = "UPDATE archiver.deliveries SET due_at = now() + interval '1 hour'"
        execute(engine, far)
        record(engine, created("c1", "s1"))
        publish(engine)
        change(engine, ("session.settled", "s1", None), ("chat.created", "s2", "c2"))
        until(lambda: states(engine) == {"delivered": 1, "pending": 3}, "another session does not wait")
        assert rows(engine, "SELECT DISTINCT session_id FROM archiver.deliveries ORDER BY 1") == [("s1",), ("s2",)]
        until(
            lambda: rows(engine, "SELECT leased_by FROM archiver.subscriptions") == [(None,)], "nothing is under way"
        )
        assert [got.data["session_id"] for got in receiver.got] == [None, "s2"]
        let_time_pass(engine)
        until(lambda: states(engine) == {"delivered": 4}, "all are told")
    assert [cursor for cursor in receiver.cursors if cursor != 4] == [1, 1, 2, 3]
