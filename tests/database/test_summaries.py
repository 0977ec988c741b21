"""The stored row of each session (`analytics.sessions`): right after any history, current, and erased."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from archiver import database, ledger
from archiver import settings as configuration
from archiver.archive import derived_rows, rollups
from archiver.archive.rebuild import rebuild
from archiver.compliance import erasure
from archiver.compliance.erasure import Target, sweeping
from archiver.compliance.erasure.retention import Rules
from archiver.compliance.seals import seal
from archiver.database import schema, transaction
from archiver.events import Delivery, responses
from archiver.operations.doctor import examine_database
from archiver.outbound import feed
from archiver.outbound.feed import publisher
from archiver.worker import summing
from archiver.worker.summing import Summing
from tests.support.erasures import ACT, dump_of, erase, hold
from tests.support.feeds import cursor, publish
from tests.support.histories import TIMING, answer
from tests.support.observations import observe, record
from tests.support.payloads import created, deleted
from tests.support.retention import run
from tests.support.rows import empty, execute, rows
from tests.support.servers import as_writer
from tests.support.slowness import quick_rows, slow_rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

COLUMNS = (
    "session_id, assistant_id, started_at, last_message_at, turns, messages, user_messages, assistant_messages, cost,"
    " deleted_chats, repaired_messages, coverage, reason, first_question, first_answer, answer_seconds, variables"
)


def stored(engine: Engine) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for row in rows(engine, f"SELECT {COLUMNS} FROM analytics.sessions")}


# What the rows are to be, by hand: from the plain tables, and the first revisions from the bytes of the ledger.

_CONVERSATIONS = """
    SELECT c.session_id, c.assistant_id, c.started_at, c.last_message_at, c.chats, c.messages, c.user_messages,
           c.assistant_messages, c.cost, c.deleted_chats, c.repaired_messages, c.coverage, v.reason
      FROM analytics.conversations c JOIN analytics.coverage v USING (session_id)
"""
_MESSAGES = """
    SELECT m.session_id, m.turn_id, m.role, m.content, m.created_at FROM analytics.messages m
     WHERE m.content <> '' AND m.content_kind IN ('text', 'refusal') ORDER BY m.session_id, m.position
"""
_VARIABLES = """
    SELECT c.session_id, c.variables FROM archiver.chats c WHERE c.variables IS NOT NULL
     ORDER BY coalesce(c.created_at, c.occurred_at, c.first_received_at), c.occurred_at, c.first_received_at,
              c.chat_id
"""
_BODIES = "SELECT session_id, chat_id, body FROM archiver.events WHERE type = 'chat.created' AND body IS NOT NULL"


def by_hand(engine: Engine) -> dict[str, tuple[Any, ...]]:
    answered_at: dict[tuple[str, str], datetime] = {}
    for session_id, chat_id, body in rows(engine, _BODIES):
        chat = json.loads(bytes(body))["message"]["chat"]
        if chat.get("output") and chat.get("updatedAt"):
            reported_at = datetime.fromisoformat(chat["updatedAt"])
            answered_at[session_id, chat_id] = min(reported_at, answered_at.get((session_id, chat_id), reported_at))
    variables: dict[str, dict[str, Any]] = {}
    for session_id, own in rows(engine, _VARIABLES):
        variables[session_id] = variables.get(session_id, {}) | own
    firsts: dict[str, list[Any]] = {}
    for session_id, turn_id, role, content, created_at in rows(engine, _MESSAGES):
        found = firsts.setdefault(session_id, [])
        if role == ("user", "assistant", None)[len(found)]:
            found.append((content, turn_id, created_at))
    result = {}
    for row in rows(engine, _CONVERSATIONS):
        session_id = row[0]
        question, reply = (*firsts.get(session_id, []), (None, "", None), (None, "", None))[:2]
        # A fact without a session belongs to the sessions that have its chat.
        at = min((at for each in (session_id, "") if (at := answered_at.get((each, reply[1])))), default=None)
        seconds = (at - question[2]).total_seconds() if at and question[2] else None
        result[session_id] = (*row, question[0], reply[0], seconds, variables.get(session_id))
    return result


def test_a_session_is_one_row(engine: Engine) -> None:
    record(
        engine,
        created("b", "s", createdAt="2024-01-15T09:40:00Z", updatedAt="2024-01-15T09:40:02Z", cost="0.5"),
        created(
            "a",
            "s",
            input=[{"role": "system", "content": "rules"}, {"role": "user", "content": "Where is it?"}],
            output=[{"role": "assistant", "content": ""}, {"role": "assistant", "content": "Here."}],
            updatedAt="2024-01-15T09:30:04.5Z",
            assistantOverrides={"variableValues": {"customerTier": "Basic", "seats": 3}},
            cost="0.25",
        ),
        deleted("b", "s"),
        created("lost", None),
    )
    publish(engine)
    ((row, last),) = [
        (row[:-1], row[-1]) for row in rows(engine, f"SELECT {COLUMNS}, changed_cursor FROM analytics.sessions")
    ]
    assert row == (
        "s",
        "assistant-1",
        datetime(2024, 1, 15, 9, 30, tzinfo=UTC),
        datetime(2024, 1, 15, 9, 40, 2, tzinfo=UTC),
        *(2, 6, 2, 3, Decimal("0.75")),
        *(1, 0, "open", "awaiting_history", "Where is it?", "Here.", 4.5),
        {"customerTier": "Premium", "seats": 3},
    )
    assert rows(engine, f"SELECT session_id FROM analytics.changes WHERE cursor = {last}") == [("s",)]
    assert stored(engine) == by_hand(engine)


def test_the_seconds_are_those_of_the_first_revision_that_answers_in_any_order_of_arrival(engine: Engine) -> None:
    revisions = [
        created("a", "s", output=[], updatedAt="2024-01-15T09:30:00Z"),
        created("a", "s", output="an answer", updatedAt="2024-01-15T09:30:07Z"),
        created("a", "s", output="a better one", updatedAt="2024-01-15T11:00:00Z"),
    ]
    record(engine, revisions[0])
    publish(engine)
    assert stored(engine)["s"][-4:-1] == ("question of a", None, None)
    for revision, found in ((revisions[2], 5400), (revisions[1], 7)):
        record(engine, revision)
        publish(engine)
        assert stored(engine)["s"][-4:-1] == ("question of a", "a better one", found)


def test_what_history_alone_knows_counts_and_has_no_seconds(engine: Engine) -> None:
    record(engine, created("a", "s"))
    read(engine, "s", 1, ("assistant", "Hello!"), ("user", "before"), ("assistant", "after"), *said("a"))
    publish(engine)
    assert stored(engine) == by_hand(engine)
    assert stored(engine)["s"][4:8] == (2, 5, 2, 3)
    assert stored(engine)["s"][10:16] == (2, "repaired", "history_supplied_messages", "before", "after", None)


def said(*chat_ids: str) -> list[tuple[str, str]]:
    return [
        line
        for chat_id in chat_ids
        for line in (("user", f"question of {chat_id}"), ("assistant", f"answer to {chat_id}"))
    ]


def read(engine: Engine, session_id: str, number: int, *lines: tuple[str, str]) -> None:
    event = responses.parse_history(session_id, 200, answer(*lines, session_id=session_id))
    moment = observe(created()).received_at + timedelta(seconds=600 * number)
    with transaction(engine) as connection:
        ledger.record(connection, [Delivery(event, moment, None, responses.SOURCE)], TIMING)


def test_a_row_changes_with_the_feed_and_only_if_its_session_did(engine: Engine) -> None:
    record(engine, created("a", "s1"), created("b", "s2"))
    assert stored(engine) == {}
    publish(engine)
    before = rows(engine, "SELECT xmin, t FROM archiver.summaries t WHERE session_id = 's1'")
    record(engine, created("c", "s2"))
    publish(engine)
    assert rows(engine, "SELECT xmin, t FROM archiver.summaries t WHERE session_id = 's1'") == before
    query = "SELECT session_id, turns, changed_cursor FROM analytics.sessions ORDER BY 1"
    assert rows(engine, query) == [("s1", 1, 1), ("s2", 2, 3)]


class Course:
    """A random course of deliveries, redeliveries, readings, erasures and rebuilds of two sessions."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine, self._rng = engine, rng
        self._sent: list[bytes] = []

    def step(self, number: int) -> None:
        rng = self._rng
        kind = rng.choice(["deliver"] * 8 + ["read"] * 3 + ["erase", "rebuild"])
        if kind == "rebuild":
            empty(self._engine, "messages", "chats", "sessions")
            list(rebuild(self._engine, TIMING))
        elif kind == "erase":
            erase(self._engine, Target(*rng.choice([("s1", ""), ("s2", "c1"), ("s1", "c2"), ("", "c3")])))
        elif kind == "read":
            lines = said(*(f"c{each}" for each in sorted(rng.sample(range(1, 6), rng.randint(0, 5)))))
            read(self._engine, rng.choice(["s1", "s2"]), number, *lines)
        else:
            bodies = [self._delivery() for _ in range(rng.randint(1, 4))]
            record(self._engine, *bodies, seconds=number * 600)

    def _delivery(self) -> bytes:
        rng = self._rng
        if self._sent and rng.random() < 0.2:
            return rng.choice(self._sent)
        chat_id, session_id = f"c{rng.randint(1, 4)}", rng.choice(["s1", "s2", "s1", None])
        if rng.random() < 0.15:
            return deleted(chat_id, session_id)
        names = rng.sample(["tier", "company", "seats"], 2)
        body = created(
            chat_id,
            session_id,
            1_705_311_000_000 + rng.randint(0, 5) * 1000,
            updatedAt=f"2024-01-15T09:3{rng.randint(0, 9)}:00Z",
            createdAt=rng.choice([None, "2024-01-15T09:30:00Z", "2024-01-15T09:29:00Z"]),
            output=rng.choice([[], f"answer to {chat_id}", [{"role": "tool", "content": "x"}]]),
            assistantId=rng.choice(["as1", "as2", None]),
            assistantOverrides={"variableValues": {name: rng.choice([1, "é", None, [1]]) for name in names}},
        )
        self._sent.append(body)
        return body


@on_one_version
def test_the_rows_equal_what_is_computed_by_hand_after_any_history(engine: Engine) -> None:
    # Not shrunk: what is smaller is no simpler here, and the seed says it all.
    @settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        empty(engine, "events", "erasures", "messages", "chats", "sessions", "summaries", "outbox")
        course = Course(engine, random.Random(seed))
        for number in range(12):
            course.step(number)
            publish(engine)
            found, expected = stored(engine), by_hand(engine)
            for each in found | expected:
                assert found.get(each) == expected.get(each), each

    check()


# Erasure


def test_i8_what_is_erased_goes_from_its_row_in_the_same_transaction(engine: Engine) -> None:
    marked = created("a", "s1", input="MARK asks", output="MARK answers")
    record(engine, marked, created("b", "s1"), created("c", "s2"))
    publish(engine)
    erase(engine, Target("s1", "a"))
    assert stored(engine)["s1"][-4:-2] == ("question of b", "answer to b")
    erase(engine, Target("s1"))
    assert stored(engine) == by_hand(engine)
    assert stored(engine)["s1"][-4:] == (None, None, None, None)
    assert b"MARK" not in dump_of(engine, "archiver.summaries")


@contextmanager
def waiting_for_publishing(engine: Engine, work: Callable[[], object]) -> Iterator[None]:
    """`work` runs in another thread until it waits for the lock of the publisher; it ends after the block."""
    faults: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as fault:  # noqa: BLE001  # raised below
            faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'archiver_jobs.lock_publishing'::regclass"
    until(lambda: bool(rows(engine, waits)), "it waits")
    yield
    thread.join()
    assert faults == []


def test_i8_a_publisher_at_work_does_not_store_what_is_erased_at_the_same_time(engine: Engine) -> None:
    record(engine, created("a", "s1", input="MARK asks"))
    erasure.order(engine, [Target("s1")], "request", ACT)
    with transaction(engine) as publishing:
        feed.publish(publishing)
        with waiting_for_publishing(engine, lambda: list(erasure.sweep(engine, TIMING, 0))):
            publishing.commit()
    assert stored(engine)["s1"][-4:] == (None, None, None, None)
    assert b"MARK" not in dump_of(engine, "archiver.summaries")


def test_i8_a_publisher_that_waited_for_an_erasure_sees_it(engine: Engine) -> None:
    record(engine, created("a", "s1", input="MARK asks"), created("b", "s2"))
    erasure.order(engine, [Target("s1")], "request", ACT)
    with transaction(engine) as erasing:
        sweeping.purge_batch(erasing, [Target("s1")], TIMING)
        with waiting_for_publishing(engine, lambda: publish(engine)):
            erasing.commit()
    assert stored(engine) == by_hand(engine)
    assert b"MARK" not in dump_of(engine, "archiver.summaries")


def test_a_session_that_retention_removes_has_no_row(engine: Engine) -> None:
    record(engine, created("a", "s1"), created("b", "s2"))
    publish(engine)
    hold(engine, session_id="s2")
    rules = Rules(10, {}, 30)
    run(engine, rules)
    assert stored(engine) == by_hand(engine)
    seal(engine)
    assert run(engine, rules).metadata.total() == 1
    assert stored(engine) == by_hand(engine)
    assert list(stored(engine)) == ["s2"]


# The publisher


async def publish_all(url: str, is_done: Callable[[], bool]) -> None:
    """The worker's own publisher, until it has done what is to be done."""
    engine = database.connect_async(database.database_url(url), pool_size=1)
    publishing = asyncio.create_task(feed.Publisher(engine).run())
    await asyncio.to_thread(until, is_done, "it is published")
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    await engine.dispose()


# Each stands for a value that Postgres rejects, or for a session that is too long.
ACTIONS = (
    "PERFORM pg_sleep(60)",
    "RAISE EXCEPTION 'too large' USING ERRCODE = 'program_limit_exceeded'",
)


@on_one_version
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("table", ["archiver.summaries", "archiver.contributions"])
def test_i13_changes_are_published_without_a_row_that_cannot_be_stored(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, action: str, table: str
) -> None:
    monkeypatch.setattr(publisher, "PAGE_SECONDS", 0.5)
    record(engine, created("a", "slow", cost="1"))
    publish(engine)
    Summing(engine).sum(lambda: None)
    slow_rows(engine, table, "session_id", "slow", action)
    record(engine, created("b", "slow", cost="2"), *(created(f"c{n}", f"other-{n}", cost="0") for n in range(5)))
    waiting = "SELECT count(*) FROM archiver.outbox"
    asyncio.run(publish_all(as_writer(database_url), lambda: rows(engine, waiting) == [(0,)]))
    assert rows(engine, "SELECT chat_id FROM analytics.changes WHERE session_id = 'slow'") == [("a",), ("b",)]
    assert stored(engine) == {name: row for name, row in by_hand(engine).items() if name != "slow"}
    # The figures are exact nevertheless.
    assert rows(engine, "SELECT sum(chats), sum(cost) FROM analytics.daily") == [(7, 3)]
    assert rows(engine, "SELECT waiting_sessions, summary_cursor FROM analytics.health") == [(1, 7)]
    # An attempt is made when it is due, and not at the next change.
    record(engine, created("d", "slow", cost="4"))
    publish(engine)
    assert stored(engine).keys() == by_hand(engine).keys() - {"slow"}
    execute(engine, "UPDATE archiver.uncontributed SET retry_at = now()")
    monkeypatch.setattr(summing, "STATEMENT_SECONDS", 0.5)
    Summing(engine).sum(lambda: None)
    assert stored(engine).keys() == by_hand(engine).keys() - {"slow"}
    assert rows(engine, "SELECT session_id FROM archiver.uncontributed WHERE retry_at > now()") == [("slow",)]
    quick_rows(engine, table)
    execute(engine, "UPDATE archiver.uncontributed SET retry_at = now()")
    Summing(engine).sum(lambda: None)
    assert stored(engine) == by_hand(engine)
    assert rows(engine, "SELECT count(*) FROM archiver.uncontributed") == [(0,)]
    assert rows(engine, "SELECT sum(chats), sum(cost) FROM analytics.daily") == [(8, 7)]


def test_the_pause_between_attempts_grows_up_to_an_hour(engine: Engine) -> None:
    slow_rows(engine, "archiver.summaries", "session_id", "slow", "RAISE EXCEPTION 'too large'")
    record(engine, created("a", "slow"))
    publish(engine)
    pauses = []
    for failed_at in ("NULL", "now() - interval '10 minutes'", "now() - interval '1 day'"):
        execute(engine, f"UPDATE archiver.uncontributed SET failed_at = {failed_at}, retry_at = now()")
        Summing(engine).sum(lambda: None)
        ((seconds,),) = rows(engine, "SELECT extract(epoch FROM retry_at - now()) FROM archiver.uncontributed")
        pauses.append(round(seconds / 60))
    assert pauses == [1, 10, 60]


def test_i8_a_row_that_cannot_be_stored_prevents_no_erasure(engine: Engine) -> None:
    record(engine, created("a", "s1", input="MARK asks"), created("b", "s1"))
    publish(engine)
    slow_rows(engine, "archiver.summaries", "session_id", "s1", "RAISE EXCEPTION 'too large'")
    erase(engine, Target("s1", "a"))
    assert b"MARK" not in dump_of(engine, "archiver.summaries")
    assert rows(engine, "SELECT sum(chats) FROM analytics.daily") == [(2,)]


def test_doctor_names_sessions_whose_rows_cannot_be_stored(engine: Engine) -> None:
    def findings() -> list[tuple[str, str]]:
        found = examine_database(configuration.read(), engine)
        return [(each.verdict, each.detail) for each in found if each.check == "sessions"]

    assert findings() == []
    slow_rows(engine, "archiver.summaries", "session_id", "slow", "RAISE EXCEPTION 'too large'")
    record(engine, created("a", "slow"))
    publish(engine)
    ((verdict, detail),) = findings()
    assert verdict == "warning"
    assert "'slow'" in detail
    assert "SQLSTATE P0001" in detail


def test_i11_a_publisher_that_is_killed_leaves_neither_a_change_nor_a_row(engine: Engine) -> None:
    record(engine, created("a", "s1"))

    def publish_and_be_killed() -> None:
        with transaction(engine) as publishing:
            assert feed.publish(publishing) == 1
            ((pid,),) = publishing.exec_driver_sql("SELECT pg_backend_pid()")
            execute(engine, f"SELECT pg_terminate_backend({pid})")

    with pytest.raises(DBAPIError):
        publish_and_be_killed()
    assert rows(engine, "SELECT 1 FROM analytics.changes UNION ALL SELECT 1 FROM analytics.sessions") == []
    publish(engine)
    assert stored(engine) == by_hand(engine)


# Missing rows


def test_missing_rows_are_added_page_by_page_and_a_slow_session_keeps_no_others_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "SESSIONS_PER_PAGE", 7)
    monkeypatch.setattr(derived_rows, "SESSIONS_PER_STATEMENT", 2)
    monkeypatch.setattr(summing, "STATEMENT_SECONDS", 0.5)
    record(engine, *(created(f"c{n}", f"s{n:02}") for n in range(20)), created("lost", None))
    newest = cursor(engine)
    before = stored(engine)
    execute(
        engine,
        "DELETE FROM archiver.summaries WHERE session_id <> 's05'",
        "INSERT INTO archiver.uncontributed"
        " SELECT session_id FROM archiver.sessions WHERE session_id NOT IN ('', 's05')",
    )
    health = "SELECT waiting_sessions, summary_cursor FROM analytics.health"
    assert rows(engine, health) == [(19, None)]
    slow_rows(engine, "archiver.summaries", "session_id", "s03", "PERFORM pg_sleep(60)")
    with monkeypatch.context() as hurry:
        hurry.setattr(summing, "SECONDS_PER_JOB", 0.0)
        assert Summing(engine).sum(lambda: None)  # there is more to do
    assert not Summing(engine).sum(lambda: None)
    assert before.keys() - stored(engine).keys() == {"s03"}
    assert rows(engine, health) == [(1, newest)]
    quick_rows(engine, "archiver.summaries")
    execute(engine, "UPDATE archiver.uncontributed SET retry_at = now()")
    Summing(engine).sum(lambda: None)
    assert stored(engine) == before == by_hand(engine)
    query = "SELECT DISTINCT changed_cursor FROM archiver.summaries WHERE session_id <> 's05'"
    assert rows(engine, query) == [(newest,)]
    assert rows(engine, health) == [(0, newest)]


def test_an_older_archive_gets_its_rows_and_a_rebuild_supplies_the_seconds(engine: Engine) -> None:
    record(engine, created("a", "open"), created("b", "closed"))
    execute(engine, "UPDATE archiver.sessions SET reconcile_at = NULL WHERE session_id = 'closed'")
    schema.downgrade(engine, "0021")
    schema.upgrade(engine)
    assert stored(engine) == {}
    Summing(engine).sum(lambda: None)
    expected = by_hand(engine)
    assert [each[-2] for each in expected.values()] == [1, 1]
    without_seconds = (*expected["closed"][:-2], None, expected["closed"][-1])
    assert stored(engine) == expected | {"closed": without_seconds}
    list(rebuild(engine, TIMING))
    publish(engine)
    assert stored(engine) == expected


def test_rows_that_an_earlier_version_had_not_added_are_added_after_the_upgrade(engine: Engine) -> None:
    record(engine, created("a", "s1"), created("b", "s2"))
    publish(engine)
    schema.downgrade(engine, "0027")
    execute(engine, "DELETE FROM archiver.summaries WHERE session_id = 's1'")
    schema.upgrade(engine)
    assert rows(engine, "SELECT waiting_sessions FROM analytics.health") == [(1,)]
    Summing(engine).sum(lambda: None)
    assert stored(engine) == by_hand(engine)


# How current it is


def test_health_shows_how_far_the_feed_is(engine: Engine) -> None:
    query = "SELECT feed_lag_seconds, summary_cursor FROM analytics.health"
    assert rows(engine, query) == [(0, None)]
    record(engine, created("a", "s1"))
    ((lag, newest),) = rows(engine, query)
    assert lag > 0
    assert newest is None
    publish(engine)
    assert rows(engine, query) == [(0, 1)]
    with transaction(engine) as holding:
        holding.exec_driver_sql("SELECT 1")
        ((age,),) = rows(engine, "SELECT oldest_snapshot_seconds FROM analytics.health")
        assert age is not None
