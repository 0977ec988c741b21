"""Histories: what a reading repairs, how late webhooks claim its lines, coverage, and the next reading."""

import json
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from archiver.archive import Timing
from archiver.archive.rebuild import rebuild
from archiver.archive.rows import upsert_sessions
from archiver.database import transaction
from archiver.events import Event, responses
from tests.support.histories import START, TIMING, Archive, answer, said, turn
from tests.support.payloads import created, deleted
from tests.support.rows import rows


def contents(transcript: Sequence[Any]) -> list[str]:
    return [content for _, _, content, _ in transcript]


def test_a_reading_that_agrees_makes_a_session_complete(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    assert archive.coverage() == ("open", "awaiting_history", 0)
    archive.reading(10, answer(*said(1)))
    assert archive.coverage() == ("complete", "agreed", 0)
    assert {source for *_, source in archive.transcript()} == {"webhook"}


def test_i6_cost_and_chat_id_go_to_the_lines_that_match_without_a_gap(archive: Archive) -> None:
    """The webhook of the turn before was lost; it had an answer more between the same texts."""
    ok = [{"role": "assistant", "content": "ok"}]
    archive.webhook(2, created("chat-2", input="ok", output=ok, cost=7))
    lost = [("user", "ok"), ("assistant", "looking it up"), ("assistant", "ok")]
    archive.reading(10, answer(*lost, ("user", "ok"), ("assistant", "ok")))
    assert [(chat_id, content) for chat_id, _, content, _ in archive.transcript()] == [
        (None, "ok"),
        (None, "looking it up"),
        (None, "ok"),
        ("chat-2", "ok"),
        ("chat-2", "ok"),
    ]
    assert archive.rows("SELECT chat_id, cost FROM analytics.chats ORDER BY chat_id") == [("chat-2", 7), (None, None)]
    assert archive.coverage() == ("repaired", "history_supplied_messages", 3)


def test_a_turn_that_fits_the_lines_of_a_lost_one_as_well_makes_its_session_ambiguous(archive: Archive) -> None:
    ok = [("user", "ok"), ("assistant", "ok")]
    archive.webhook(2, created("chat-2", input="ok", output=[{"role": "assistant", "content": "ok"}]))
    archive.reading(10, answer(*ok, *ok))
    assert archive.coverage() == ("ambiguous", "several_places_fit", 2)
    assert contents(archive.transcript()) == ["ok"] * 4


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("Hi there\n", "Hi there"),
        ("a\r\nb", "a\nb"),
        ("Gr\u00f6\u00dfe", "Gro\u0308\u00dfe"),
        ("Tom & Jerry", "Tom &amp;amp; Jerry"),
        ("a b", "a\u00a0b"),
        ("My card is 4111 1111 1111 1234", "My card is **** **** **** 1234"),
        ("What I wanted to ask you for a long time is this", "What I wanted to ask you for a long ti"),
    ],
)
def test_i6_history_that_words_a_turn_differently_does_not_double_it(archive: Archive, told: str, shown: str) -> None:
    archive.webhook(1, created("chat-1", input=told, output=[{"role": "assistant", "content": "fine"}]))
    archive.reading(10, answer(("Human", shown), ("ai", "fine ")))
    assert archive.transcript() == [
        ("chat-1", "user", told, "webhook"),
        ("chat-1", "assistant", "fine", "webhook"),
    ]
    assert archive.coverage() == ("complete", "worded_differently", 0)
    wordings = "SELECT content, history_content, content_kind FROM analytics.messages ORDER BY position"
    assert archive.rows(wordings) == [(told, shown, "text"), ("fine", "fine ", "text")]
    before = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == before


@pytest.mark.parametrize("joint", ["\n", "\n\n", " ", ""])
def test_i6_history_that_joins_the_messages_of_two_turns_leaves_both(archive: Archive, joint: str) -> None:
    archive.webhook(1, turn(1))
    archive.webhook(2, turn(2))
    first, second = said(1), said(2)
    archive.reading(10, answer(("user", f"{first[0][1]}{joint}{second[0][1]}"), first[1], second[1]))
    assert contents(archive.transcript()) == [text for _, text in (*first, *second)]
    assert [chat_id for chat_id, *_ in archive.transcript()] == ["chat-1", "chat-1", "chat-2", "chat-2"]
    assert archive.coverage() == ("complete", "worded_differently", 0)
    before = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == before


@pytest.mark.parametrize("late", [(3,), (2, 3), (3, 2)])
@pytest.mark.parametrize("is_dated", [False, True])
@pytest.mark.parametrize("is_answer_joined", [False, True])
def test_i5_i10_joined_turns_that_arrive_after_the_reading_stand_once(
    archive: Archive, late: Sequence[int], is_dated: bool, is_answer_joined: bool
) -> None:
    """Even if their times are those of their late arrival, after all other turns."""
    for number in (1, 4):
        archive.webhook(number, turn(number))
    (q2, a2), (q3, a3) = said(2), said(3)
    answers = [("assistant", f"{a2[1]}\n\n{a3[1]}")] if is_answer_joined else [a2, a3]
    archive.reading(10, answer(*said(1), ("user", f"{q2[1]}\n{q3[1]}"), *answers, *said(4)))
    for minute, number in enumerate(late, 20):
        moment = START + timedelta(minutes=number if is_dated else minute)
        archive.webhook(minute, created(f"chat-{number}", createdAt=moment.isoformat(), updatedAt=moment.isoformat()))
        before = archive.dump()
        list(rebuild(archive.engine, TIMING))
        assert archive.dump() == before
    fragments = [text for content in contents(archive.transcript()) for text in content.splitlines() if text]
    assert sorted(fragments) == sorted(text for number in (1, 2, 3, 4) for _, text in said(number))
    for number in late:
        own = [content for chat_id, _, content, _ in archive.transcript() if chat_id == f"chat-{number}"]
        assert own == [text for _, text in said(number)]


def test_history_content_is_only_where_the_latest_history_that_shows_a_message_words_it_differently(
    archive: Archive,
) -> None:
    def found() -> list[Any]:
        return archive.rows("SELECT content, history_content FROM analytics.messages ORDER BY position")

    archive.webhook(1, created("chat-1", input="q 1", output="a 1"))
    archive.webhook(2, created("chat-2", input="q 2", output="a 2"))
    assert found() == [("q 1", None), ("a 1", None), ("q 2", None), ("a 2", None)]
    archive.reading(10, answer(("user", "q  1"), ("assistant", "a 1"), ("user", "lost "), ("assistant", "too ")))
    assert found() == [
        *(("q 1", "q  1"), ("a 1", None)),
        *(("lost ", None), ("too ", None)),
        *(("q 2", None), ("a 2", None)),
    ]
    archive.reading(20, answer(("user", "q 1 "), ("assistant", "a 1"), ("user", "q 2\n"), ("assistant", "a 2")))
    assert [each for each in found() if each[1] is not None] == [("q 1", "q 1 "), ("q 2", "q 2\n")]
    archive.reading(30, answer(("user", "q 1"), ("assistant", "a 1"), ("user", "q 2"), ("assistant", "a 2")))
    assert [each for each in found() if each[1] is not None] == []


@pytest.mark.parametrize(
    "names", [("human", "ai"), ("User", "Assistant"), (" CUSTOMER ", "bot"), ("end_user", "LLM")]
)
def test_messages_of_the_user_and_the_assistant_are_counted_by_any_name(
    archive: Archive, names: tuple[str, str]
) -> None:
    user, assistant = names
    answers = [{"role": assistant, "content": "a 1"}]
    archive.webhook(1, created("chat-1", input=[{"role": user, "content": "q 1"}], output=answers))
    counts = "SELECT messages, user_messages, assistant_messages FROM analytics.conversations"
    assert archive.rows(counts) == [(2, 1, 1)]
    archive.reading(10, answer((user, "q 1"), (assistant, "a 1"), (user, "lost"), (assistant, "found")))
    assert archive.rows(counts) == [(4, 2, 2)]


def test_a_lost_turn_whose_roles_have_other_names_is_a_turn(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), ("human", "lost"), ("ai", "found")))
    assert archive.coverage() == ("repaired", "history_supplied_messages", 2)
    assert archive.rows("SELECT count(*) FROM analytics.chats WHERE chat_id IS NULL") == [(1,)]


def test_i6_a_lost_turn_is_supplied_at_its_place(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.webhook(3, turn(3))
    archive.reading(10, answer(*said(1), *said(2), *said(3)))
    assert archive.transcript() == [
        *(("chat-1", role, content, "webhook") for role, content in said(1)),
        *((None, role, content, "history") for role, content in said(2)),
        *(("chat-3", role, content, "webhook") for role, content in said(3)),
    ]
    assert archive.coverage() == ("repaired", "history_supplied_messages", 2)
    assert archive.rows("SELECT chat_id, source FROM analytics.chats ORDER BY chat_id") == [
        ("chat-1", "webhook"),
        ("chat-3", "webhook"),
        (None, "history"),
    ]


def test_i5_a_late_webhook_claims_what_history_supplied(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), *said(2)))
    archive.webhook(11, turn(2))
    assert [chat_id for chat_id, *_ in archive.transcript()] == ["chat-1", "chat-1", "chat-2", "chat-2"]
    assert archive.coverage() == ("open", "events_after_reading", 0)
    archive.reading(20, answer(*said(1), *said(2)))
    assert archive.coverage() == ("complete", "agreed", 0)
    assert archive.rows("SELECT count(*) FROM archiver.chats") == [(2,)]


def test_an_identical_answer_is_counted_and_not_stored_again(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    assert archive.reading(10, answer(*said(1)))
    assert not archive.reading(20, answer(*said(1), updatedAt="2026-01-05T09:55:00Z"))
    assert archive.rows("SELECT delivery_count FROM archiver.events WHERE source = 'history'") == [(2,)]


def test_a_turn_that_only_history_knows_keeps_the_time_of_its_first_reading(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    for minute in (10, 20, 30):
        archive.reading(minute, answer(*said(1), *said(2)))
    rows = archive.rows("SELECT first_received_at FROM analytics.chats WHERE chat_id IS NULL")
    assert rows == [(START + timedelta(minutes=10),)]


def test_a_greeting_is_no_repair(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(("assistant", "Welcome!"), *said(1)))
    assert contents(archive.transcript())[0] == "Welcome!"
    assert archive.coverage() == ("complete", "agreed", 0)
    assert archive.rows("SELECT count(*) FROM analytics.chats") == [(1,)]


def test_i7_what_history_no_longer_shows_stays(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), *said(2)))
    archive.reading(20, answer(*said(1)))
    assert contents(archive.transcript()) == [content for _, content in [*said(1), *said(2)]]
    assert archive.rows("SELECT in_history FROM analytics.messages ORDER BY position") == [
        (True,),
        (True,),
        (False,),
        (False,),
    ]


def test_a_deleted_turn_is_a_tombstone_at_its_place(archive: Archive) -> None:
    for number in (1, 2, 3):
        archive.webhook(number, turn(number))
    archive.webhook(5, deleted("chat-2"))
    archive.reading(10, answer(*said(1), *said(3)))
    assert [chat_id for chat_id, *_ in archive.transcript()] == [f"chat-{n}" for n in (1, 1, 2, 2, 3, 3)]
    assert archive.coverage() == ("complete", "agreed", 0)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b'{"message": "not found"}', "history_gone"),
        (410, b"", "history_gone"),
        (200, answer(), "history_empty"),
        (200, b"<html>", "history_unreadable"),
        (200, b'{"session": null}', "history_unreadable"),
        (200, answer(*said(1), session_id="another"), "history_unreadable"),
        (200, json.dumps({"session": {"messages": {"0": 1}}}).encode(), "history_unreadable"),
        (302, b"", "history_unreadable"),
    ],
)
def test_a_history_that_cannot_be_had_leaves_a_session_unverified(
    archive: Archive, status: int, body: bytes, reason: str
) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, body, status)
    assert archive.coverage() == ("unverified", reason, 0)
    assert contents(archive.transcript()) == [content for _, content in said(1)]
    assert archive.rows("SELECT body FROM archiver.events WHERE source = 'history'") == [(body,)]


_AT = (START + timedelta(minutes=20)).isoformat()
_BLANK = created("chat-2", input="", output=None, createdAt=_AT, updatedAt=_AT)
_REPEATED = created(
    "chat-2", input="ok", output=[{"role": "assistant", "content": "ok"}], createdAt=_AT, updatedAt=_AT
)


@pytest.mark.parametrize(
    "more",
    [
        {"hasMore": True},
        {"nextCursor": "abc"},
        {"has_more": "true"},
        {"truncated": True},
        {"pagination": {"page": 1, "nextPageToken": "abc"}},
        {"meta": {"hasNextPage": True}},
        {"page": 1, "totalPages": 2},
        {"meta": {"page": 0, "total_pages": "2"}},
        {"total": 5},
        {"pagination": {"totalCount": "5", "limit": 4}},
    ],
)
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_history_that_says_that_it_is_not_whole_completes_no_session(
    archive: Archive, more: dict[str, Any], is_inside: bool
) -> None:
    document = json.loads(answer(*said(1), *said(2)))
    (document["session"] if is_inside else document).update(more)
    archive.webhook(1, turn(1))
    archive.reading(10, json.dumps(document).encode())
    assert archive.coverage() == ("unverified", "history_partial", 2)
    archive.reading(20, b"", 404)
    assert archive.coverage()[:2] == ("unverified", "history_partial")
    archive.reading(30, answer(*said(1), *said(2), *said(3)))
    assert archive.coverage() == ("repaired", "history_supplied_messages", 4)


@pytest.mark.parametrize(
    "whole",
    [
        {"hasMore": False},
        {"nextCursor": None},
        {"has_more": "false"},
        {"meta": {}},
        {"page": 1, "totalPages": 1, "total": 2},
    ],
)
def test_a_history_without_a_next_page_completes_a_session(archive: Archive, whole: dict[str, Any]) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, json.dumps(json.loads(answer(*said(1))) | whole).encode())
    assert archive.coverage() == ("complete", "agreed", 0)


def test_partial_content_is_no_history(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1)), 206)
    assert archive.coverage()[:2] == ("unverified", "history_unreadable")


@pytest.mark.parametrize("later", [_BLANK, _REPEATED])
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (responses.unavailable_event("session-1"), "history_unavailable"),
        (responses.parse_history("session-1", 404, b""), "history_gone"),
        (responses.parse_history("session-1", 200, b"not JSON"), "history_unreadable"),
        (responses.parse_history("session-1", 200, answer()), "history_empty"),
    ],
)
def test_a_turn_after_the_last_history_with_messages_leaves_a_session_unverified(
    archive: Archive, later: bytes, event: Event, reason: str
) -> None:
    """Even a turn that is blank, or that repeats a turn of the history whose webhook was lost."""
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), ("user", "ok"), ("assistant", "ok")))
    assert archive.coverage() == ("repaired", "history_supplied_messages", 2)
    archive.webhook(21, later)
    archive.record(24 * 60 + 10, event, "history")
    assert archive.coverage()[:2] == ("unverified", reason)
    archive.reading(24 * 60 + 20, answer(*said(1), *[("user", "ok"), ("assistant", "ok")] * 2))
    assert archive.coverage()[0] != "unverified"


def test_a_late_webhook_of_a_turn_that_history_shows_leaves_a_session_complete(archive: Archive) -> None:
    archive.reading(10, answer(*said(1)))
    archive.webhook(20, turn(1))
    archive.reading(30, b"", 404)
    assert archive.coverage() == ("complete", "agreed", 0)


def test_a_last_reading_without_messages_is_retried_until_upstream_expires_the_session(archive: Archive) -> None:
    due = "SELECT reconcile_at FROM archiver.sessions WHERE session_id <> ''"
    archive.webhook(0, turn(1))
    archive.reading(23 * 60 + 1, b"<html>")
    assert archive.rows(due) == [(START + timedelta(minutes=23 * 60 + 1) + TIMING.quiet,)]
    archive.reading(23 * 60 + 58, b"<html>")
    assert archive.rows(due) == [(None,)]


def test_a_turn_whose_content_never_arrived_is_lost(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.webhook(2, deleted("chat-2"))
    archive.reading(10, answer(*said(1)))
    assert archive.coverage() == ("lost", "content_never_seen", 0)


def test_a_turn_that_a_full_history_does_not_show_leaves_a_session_unverified(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.webhook(2, turn(2))
    archive.reading(10, answer(*said(1)))
    assert archive.coverage() == ("unverified", "turns_not_in_history", 0)


def test_a_registered_session_is_reconciled_without_any_webhook(archive: Archive) -> None:
    archive.record(0, responses.register({"id": "session-1", "name": "Kitchen", "assistantId": "a-1"}), "application")
    assert archive.coverage() == ("open", "awaiting_history", 0)
    assert archive.rows("SELECT name, assistant_id, chats FROM analytics.conversations") == [("Kitchen", "a-1", 0)]
    archive.reading(10, answer(*said(1)))
    assert archive.coverage() == ("repaired", "history_supplied_messages", 2)


def test_a_lost_revision_is_supplied_by_history(archive: Archive) -> None:
    archive.webhook(1, created("chat-1", output=None, createdAt=START.isoformat(), updatedAt=START.isoformat()))
    archive.reading(10, answer(*said(1)))
    assert archive.transcript() == [
        ("chat-1", "user", "question of chat-1", "webhook"),
        ("chat-1", "assistant", "answer to chat-1", "history"),
    ]
    assert archive.coverage() == ("repaired", "history_supplied_messages", 1)


def test_the_archive_is_complete_through_the_first_gap(archive: Archive) -> None:
    archive.webhook(1, turn(1, "one"))
    archive.webhook(5, turn(2, "two"))
    assert archive.rows("SELECT analytics.complete_through()") == [(START + timedelta(minutes=1),)]
    archive.reading(10, answer(*said(1), session_id="one"), session_id="one")
    assert archive.rows("SELECT analytics.complete_through()") == [(START + timedelta(minutes=5),)]


_COMPLETE = "SELECT complete_through, unknown_sessions, lost_sessions, unread_sessions FROM analytics.health"


@pytest.mark.parametrize("status", [404, 410])
def test_a_session_that_upstream_reports_as_unknown_holds_nothing_back_and_is_counted(
    archive: Archive, status: int
) -> None:
    archive.webhook(1, turn(1, "unknown"))
    archive.webhook(5, turn(2, "known"))
    archive.reading(10, b'{"message": "Session not found"}', status, session_id="unknown")
    assert archive.rows("SELECT state, reason FROM analytics.coverage WHERE session_id = 'unknown'") == [
        ("unverified", "history_gone")
    ]
    assert archive.rows(_COMPLETE) == [(START + timedelta(minutes=5), 1, 0, 0)]
    archive.webhook(20, turn(3, "unknown"))  # somebody speaks there again
    assert archive.rows(_COMPLETE) == [(START + timedelta(minutes=1), 0, 0, 0)]
    archive.reading(30, b'{"message": "Session not found"}', status, session_id="unknown")
    assert archive.rows(_COMPLETE) == [(START + timedelta(minutes=5), 1, 0, 0)]


def test_a_session_with_lost_content_holds_nothing_back_and_is_counted(archive: Archive) -> None:
    archive.webhook(1, deleted("chat-1", "lost"))
    archive.webhook(5, turn(2, "known"))
    archive.reading(10, b"{}", 404, session_id="lost")
    assert archive.rows("SELECT state FROM analytics.coverage WHERE session_id = 'lost'") == [("lost",)]
    assert archive.rows("SELECT complete_through, lost_sessions FROM analytics.health") == [
        (START + timedelta(minutes=5), 1)
    ]


@pytest.mark.parametrize(("status", "body"), [(503, b""), (200, b"not JSON")])
def test_a_session_that_could_not_be_read_holds_back_the_archive(archive: Archive, status: int, body: bytes) -> None:
    archive.webhook(1, turn(1, "unread"))
    archive.webhook(5, turn(2, "known"))
    if status == 200:
        archive.reading(10, body, status, session_id="unread")
    assert archive.rows(_COMPLETE) == [(START + timedelta(minutes=1), 0, 0, 0)]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (responses.unavailable_event("unread"), "history_unavailable"),
        (responses.parse_history("unread", 200, b"not JSON"), "history_unreadable"),
    ],
)
def test_a_session_that_expired_before_it_could_be_read_holds_nothing_back_and_is_counted(
    archive: Archive, event: Event, reason: str
) -> None:
    archive.webhook(1, turn(1, "unread"))
    archive.webhook(5, turn(2, "known"))
    expired = 24 * 60 + 10
    archive.record(expired, event, "history")
    archive.reading(expired, answer(*said(2), session_id="known"), session_id="known")
    coverage = "SELECT reason, reconciled_at, next_reading_at FROM analytics.coverage WHERE session_id = 'unread'"
    assert archive.rows(coverage) == [(reason, None, None)]
    counts = "unknown_sessions, lost_sessions, unread_sessions"
    assert archive.rows(f"SELECT complete_through = now(), {counts} FROM analytics.health") == [(True, 0, 0, 1)]
    archive.webhook(expired + 5, turn(3, "unread"))  # the conversation continues: a reading is planned
    assert archive.rows(_COMPLETE) == [(START + timedelta(minutes=1), 0, 0, 0)]


def test_i10_a_rebuild_gives_the_same_rows(archive: Archive) -> None:
    for number in (1, 3, 4):
        archive.webhook(number, turn(number))
    archive.webhook(5, turn(1, "never read"))
    archive.webhook(6, deleted("nobody knows", None))
    archive.webhook(7, created("told later", None))
    archive.webhook(8, created("told later", "never read"))
    archive.reading(10, answer(*said(1), *said(2), *said(3)))
    archive.webhook(11, deleted("chat-3", None))
    archive.record(12, responses.register({"id": "registered", "createdAt": "2026-01-05T08:00:00Z"}), "application")
    before = archive.dump()
    assert sum(rebuild(archive.engine, TIMING)) > 0
    assert archive.dump() == before
    with transaction(archive.engine) as connection:
        for table in ("messages", "chats", "sessions"):
            connection.execute(text(f"DELETE FROM archiver.{table} WHERE session_id <> ''"))
        connection.execute(text("INSERT INTO archiver.sessions VALUES ('made up', 'epoch', 'epoch')"))
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == before


@pytest.mark.parametrize(
    ("quiet", "lifetime"), [(300, 86_400), (3_600, 7_200), (10, 600)], ids=["default", "long_quiet", "short"]
)
def test_the_next_reading_after_events_is_the_same_in_sql_as_in_python(
    engine: Engine, quiet: int, lifetime: int
) -> None:
    """`Timing.due_after` and the upsert of sessions: events of a session arrive in any order, in several batches."""
    timing = Timing(timedelta(seconds=quiet), timedelta(seconds=lifetime))
    chance = random.Random(quiet)
    times = {
        f"s{number}": [
            START
            + timedelta(seconds=chance.choice([0, 1, 0.998, 1.2]) * lifetime)
            + chance.random() * chance.choice([timing.wait, timing.lifetime])
            for _ in range(chance.randint(1, 5))
        ]
        for number in range(100)
    }
    for place in range(5):
        arrivals = {key: [each[place]] for key, each in times.items() if place < len(each)}
        with transaction(engine) as connection:
            upsert_sessions(connection, arrivals, timing)
    expected = {key: timing.due_after(max(each), timing.read_by(min(each))) for key, each in times.items()}
    found = rows(engine, "SELECT session_id, reconcile_at FROM archiver.sessions WHERE session_id <> ''")
    assert dict(found) == expected
