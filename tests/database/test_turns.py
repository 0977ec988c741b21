"""Ids and times of turns, also of those known only from history; and lines before the first turn."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from archiver.archive import lock_and_rederive
from archiver.compliance import erasure
from archiver.compliance.erasure import Criteria, Target, targets
from archiver.compliance.export import selection
from archiver.database import transaction
from archiver.operations import overview
from tests.support.feeds import publish
from tests.support.histories import START, TIMING, Archive, answer, said, turn
from tests.support.payloads import created, event
from tests.support.rows import DERIVED, empty

GREETING = ("assistant", "Welcome!")
TURNS = "SELECT turn_id FROM analytics.chats ORDER BY began_at, turn_id"


def at(minute: float) -> datetime:
    return START + timedelta(minutes=minute)


def times(archive: Archive) -> dict[str, float]:
    """The minute at which each turn, and the lines before the first, began."""
    found = archive.rows("SELECT DISTINCT turn_id, began_at FROM analytics.messages")
    return {turn_id: (began_at - START) / timedelta(minutes=1) for turn_id, began_at in found}


# Ids


def test_the_id_of_a_turn_known_only_from_history_stays_while_history_grows_and_webhooks_claim_others(
    archive: Archive,
) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(GREETING, *said(1), *said(2), *said(3), *said(4)))
    assert archive.rows(TURNS) == [("chat-1",), ("session-1#4",), ("session-1#6",), ("session-1#8",)]
    archive.webhook(11, turn(2))
    assert archive.rows(TURNS) == [("chat-1",), ("chat-2",), ("session-1#6",), ("session-1#8",)]
    archive.reading(20, answer(GREETING, *said(1), *said(2), *said(3), *said(4), *said(5)))
    assert archive.rows(TURNS) == [("chat-1",), ("chat-2",), ("session-1#10",), ("session-1#6",), ("session-1#8",)]
    archive.webhook(21, turn(3))
    assert archive.rows("SELECT turn_id FROM analytics.chats WHERE chat_id IS NULL ORDER BY 1") == [
        ("session-1#10",),
        ("session-1#8",),
    ]


def test_the_parts_of_one_line_of_history_in_two_lost_turns_have_two_ids(archive: Archive) -> None:
    joined = [("user", "first one"), ("assistant", "a1\nanswer to chat-2\na3"), ("user", "last one")]
    archive.webhook(2, turn(2))
    archive.reading(10, answer(("user", "question of chat-1\nquestion of chat-2\nquestion of chat-3"), *joined))
    found = archive.rows("SELECT turn_id, ordinal FROM analytics.lines")
    assert len(set(found)) == len(found)


def test_every_message_has_the_id_and_the_time_of_its_turn_and_the_first_lines_number_0(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.webhook(5, created("c9", None, createdAt=at(5).isoformat()))  # unassigned
    archive.reading(10, answer(GREETING, *said(1), *said(2)))
    assert archive.rows("SELECT session_id, turn_id, ordinal FROM analytics.messages ORDER BY 1, position") == [
        ("", "c9", 0),
        ("", "c9", 1),
        ("session-1", "session-1#0", 0),
        ("session-1", "chat-1", 0),
        ("session-1", "chat-1", 1),
        ("session-1", "session-1#4", 0),
        ("session-1", "session-1#4", 1),
    ]
    turns = "SELECT session_id, turn_id, began_at, began_is_told, source, deleted_at FROM analytics."
    assert archive.rows(f"{turns}messages WHERE turn_id NOT LIKE '%#0' EXCEPT {turns}chats") == []
    assert archive.rows(f"{turns}chats EXCEPT {turns}messages") == []


# Times


def test_a_turn_known_only_from_history_began_between_its_neighbours(archive: Archive) -> None:
    archive.webhook(4, turn(4))
    archive.webhook(10, turn(10))
    archive.reading(20, answer(GREETING, *said(1), *said(4), *said(5), *said(6), *said(10), *said(12)))
    assert times(archive) == {
        "session-1#0": 4,
        "session-1#2": 4,
        "chat-4": 4,
        "session-1#6": 6,
        "session-1#8": 8,
        "chat-10": 10,
        "session-1#12": 10,
    }


def test_without_a_delivered_turn_they_began_with_the_session(archive: Archive) -> None:
    archive.reading(20, answer(GREETING, *said(1), *said(2), createdAt=at(2).isoformat()))
    assert times(archive) == {"session-1#0": 2, "session-1#2": 2, "session-1#4": 2}


def test_the_next_turn_dates_those_before_it_that_only_history_knows(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), *said(2)))
    archive.webhook(13, turn(13))
    assert times(archive) == {"chat-1": 1, "session-1#3": 7, "chat-13": 13}


def test_the_first_turn_dates_a_greeting_and_so_does_its_revision(archive: Archive) -> None:
    sent = int(at(13).timestamp() * 1000)
    archive.reading(10, answer(GREETING))
    archive.webhook(13, created("chat-13", at=sent, createdAt=None, updatedAt=None))
    assert times(archive) == {"session-1#0": 13, "chat-13": 13}
    archive.webhook(14, created("chat-13", at=sent, createdAt=at(15).isoformat(), updatedAt=None, output="more"))
    assert times(archive) == {"session-1#0": 15, "chat-13": 15}


def test_began_is_told_says_whether_upstream_reported_the_time(archive: Archive) -> None:
    archive.webhook(1, created("created", createdAt=at(-3).isoformat()))
    archive.webhook(2, event("chat.created", int(at(-1).timestamp() * 1000), {"id": "sent", "sessionId": "s2"}))
    archive.webhook(3, b'{"type": "chat.created", "chat": {"id": "arrived", "sessionId": "s3", "input": "x"}}')
    archive.reading(9, answer(*said(1), session_id="s4"), session_id="s4")
    expected = [("created", -3, True), ("sent", -1, True), ("arrived", 3, False), ("s4#1", 9, False)]
    found = archive.rows("SELECT turn_id, began_at, began_is_told FROM analytics.chats ORDER BY began_at")
    assert [(turn_id, began_at, told) for turn_id, began_at, told in found] == [
        (turn_id, at(minute), told) for turn_id, minute, told in expected
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(["delivered", "late", "lost", "alone"]), min_size=1, max_size=8),
    st.booleans(),
    st.lists(st.integers(1, 9), max_size=2, unique=True),
)
def test_i10_times_follow_the_transcript_and_a_rebuild_gives_the_same(
    archive: Archive, kinds: Sequence[str], has_greeting: bool, read_after: Sequence[int]
) -> None:
    empty(archive.engine, *DERIVED, "events", "pieces")
    shown = [GREETING] if has_greeting else []
    for number, kind in enumerate(kinds, 1):
        shown += [said(number)[1]] if kind == "alone" else said(number)
        if kind == "delivered":
            archive.webhook(number, turn(number))
        if number in read_after:
            archive.reading(number + 0.5, answer(*shown))
    archive.reading(20, answer(*shown))
    for number, kind in enumerate(kinds, 1):
        if kind == "late":
            archive.webhook(20 + number, turn(number))
    lines = archive.rows("SELECT began_at, turn_id, content FROM analytics.messages ORDER BY position")
    assert [content for _, _, content in lines] == [content for _, content in shown]
    assert [line[0] for line in lines] == sorted(line[0] for line in lines)
    assert list(dict.fromkeys(turn_id for _, turn_id, _ in lines if turn_id.startswith("chat-"))) == [
        f"chat-{number}" for number, kind in enumerate(kinds, 1) if kind in {"delivered", "late"}
    ]
    derived = archive.dump()
    with transaction(archive.engine) as connection:
        connection.execute(text("UPDATE archiver.chats SET began_at = now()"))
        lock_and_rederive(connection, ["session-1"], TIMING)
    assert archive.dump() == derived


# Lines before the first turn are no turn


@pytest.fixture
def greeted(archive: Archive) -> Archive:
    """A turn that was delivered and one that was not, after a greeting; and a session that consists of a greeting."""
    archive.webhook(1, turn(1))
    archive.reading(10, answer(GREETING, *said(1), *said(2)))
    archive.reading(10, answer(GREETING, session_id="s2"), session_id="s2")
    return archive


def test_the_views_count_a_greeting_as_a_message_and_not_as_a_turn(greeted: Archive) -> None:
    assert greeted.rows("SELECT turn_id, chat_id FROM analytics.chats ORDER BY 1") == [
        ("chat-1", "chat-1"),
        ("session-1#4", None),
    ]
    assert greeted.rows("SELECT session_id, chats, messages, repaired_messages FROM analytics.conversations") == [
        ("session-1", 2, 5, 2),
        ("s2", 0, 1, 0),
    ]
    assert greeted.rows(
        "SELECT sum(chats), sum(conversations), sum(conversations_started), sum(messages), sum(repaired_messages)"
        " FROM analytics.daily"
    ) == [(2, 1, 1, 6, 2)]


def test_the_commands_do_not_count_a_greeting_as_a_turn(greeted: Archive) -> None:
    with transaction(greeted.engine) as connection:
        assert overview.select_overview(connection).chats == 2
        counts = targets.count(connection, [Target("session-1", ""), Target("s2", "")])
        assert (counts.turns, counts.messages) == (2, 6)


def test_a_greeting_is_no_turn_that_webhooks_missed(archive: Archive) -> None:
    archive.reading(10, answer(GREETING, *said(1)))
    with transaction(archive.engine) as connection:
        silence = overview.select_silence(connection)
    assert (silence.turns, silence.sessions) == (1, 1)


def test_holds_and_exports_find_a_session_by_its_turns_and_without_one_by_its_own_time(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(GREETING, *said(1)))
    archive.reading(10, answer(GREETING, session_id="s2", createdAt=at(2).isoformat()), session_id="s2")
    found = {}
    for since in (0, 1.5, 5):
        criteria = Criteria(since=at(since))
        with transaction(archive.engine) as connection:
            number = erasure.insert_hold(connection, criteria, "judge@court", "case 7")
            held = erasure.covering(connection, [Target("session-1", ""), Target("s2", "")])
            erasure.release_hold(connection, number, "judge@court", "closed")
            exported, _ = selection.count(connection, selection.Selection(criteria=[criteria]))
        found[since] = [each.session_id for each in held], exported
    assert found == {0: (["s2", "session-1"], 2), 1.5: (["s2"], 1), 5: ([], 0)}


def test_i8_an_erased_session_keeps_no_greeting(greeted: Archive) -> None:
    erasure.order(greeted.engine, [Target("session-1", "")], "request", erasure.AuditEntry("erase", "anna", "asked"))
    assert sum(step.events for step in erasure.sweep(greeted.engine, TIMING)) > 0
    assert greeted.rows("SELECT session_id, turn_id FROM analytics.chats") == [("session-1", "chat-1")]
    assert greeted.rows("SELECT DISTINCT session_id FROM analytics.messages") == [("s2",)]
    assert greeted.rows("SELECT session_id FROM archiver.chats WHERE chat_id = E'\\x1f'") == [("s2",)]


# Views and functions over them

COLUMNS = "turn_id, session_id, ordinal, role, content, content_kind, began_at, began_is_told, source, deleted_at"


def test_lines_are_the_messages_without_position(greeted: Archive) -> None:
    greeted.webhook(30, event("chat.deleted", int(at(30).timestamp() * 1000), {"id": "chat-1"}))
    greeted.webhook(31, created("c9", None))
    columns = f"{COLUMNS}, history_content"
    lines = greeted.rows(f"SELECT {columns} FROM analytics.lines ORDER BY session_id, turn_id, ordinal")
    assert lines == greeted.rows(f"SELECT {columns} FROM analytics.messages ORDER BY session_id, turn_id, ordinal")
    assert len(lines) == 8
    assert {line[9] is None for line in lines} == {True, False}


def test_the_transcript_of_a_session_is_its_messages_in_order(greeted: Archive) -> None:
    names = "position, turn_id, ordinal, role, content, content_kind, began_at, source, deleted_at"
    found = greeted.rows(f"SELECT {names} FROM analytics.transcript('session-1')")
    assert [row[4] for row in found] == ["Welcome!", *(content for number in (1, 2) for _, content in said(number))]
    assert found == greeted.rows(
        f"SELECT {names} FROM analytics.messages WHERE session_id = 'session-1' ORDER BY position"
    )
    assert greeted.rows("SELECT * FROM analytics.transcript('no such session')") == []


def test_changed_sessions_come_in_pages_in_order_of_their_last_change(archive: Archive) -> None:
    for minute, name in enumerate(["a", "b", "a", "c"]):
        archive.webhook(minute, created(f"chat-{minute}", f"session-{name}", createdAt=at(minute).isoformat()))
    publish(archive.engine)
    call = "SELECT session_id, cursor FROM analytics.changed_sessions"
    assert archive.rows(f"{call}(0, 100)") == [("session-b", 2), ("session-a", 3), ("session-c", 4)]
    assert archive.rows(f"{call}(0, 2)") == [("session-a", 1), ("session-b", 2)]
    assert archive.rows(f"{call}(2, 100)") == [("session-a", 3), ("session-c", 4)]
    assert archive.rows(f"{call}(4, 100)") == []


def test_conversations_started_adds_up_and_conversations_does_not(archive: Archive) -> None:
    for day in range(3):
        minute = day * 24 * 60
        archive.webhook(minute, created(f"chat-{day}", createdAt=at(minute).isoformat()))
    found = archive.rows("SELECT conversations, conversations_started, chats FROM analytics.daily ORDER BY day")
    assert found == [(1, 1, 1), (1, 0, 1), (1, 0, 1)]


def test_a_column_has_one_type_in_all_views_and_functions_and_counts_are_bigint(archive: Archive) -> None:
    found: list[Any] = archive.rows(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a JOIN pg_class c"
        " ON c.oid = a.attrelid WHERE c.relnamespace = 'analytics'::regnamespace AND a.attnum > 0"
        " UNION SELECT name, format_type(type, NULL) FROM pg_proc p, unnest(p.proargnames, p.proallargtypes,"
        " p.proargmodes) AS f (name, type, mode) WHERE p.pronamespace = 'analytics'::regnamespace AND mode = 't'"
    )
    types = dict(found)
    assert len(types) == len(found), sorted(found)
    counts = {name: kind for name, kind in types.items() if name.endswith(("chats", "messages", "conversations"))}
    assert {*counts.values()} == {"bigint"}
    assert types["cost"] == "numeric"
    times = {name: kind for name, kind in types.items() if name.endswith(("_at", "_through"))}
    assert {*times.values()} == {"timestamp with time zone"}


def test_every_function_that_is_a_query_may_run_in_parallel_and_reads_one_state(archive: Archive) -> None:
    functions = archive.rows(
        "SELECT proname, provolatile::text, proparallel::text FROM pg_proc"
        " WHERE pronamespace = 'analytics'::regnamespace"
        " AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'sql') ORDER BY 1"
    )
    assert {name for name, _, _ in functions} >= {"changed_sessions", "complete_through", "transcript"}
    assert {tuple(rest) for _, *rest in functions} == {("s", "s")}


def test_the_planner_knows_how_many_messages_have_a_role(archive: Archive) -> None:
    for number in range(20):
        archive.webhook(number, turn(number))
    with archive.engine.begin() as connection:
        connection.execute(text("ANALYZE archiver.messages"))
    plan = archive.rows("EXPLAIN (FORMAT JSON) SELECT FROM archiver.messages WHERE role = 'user'")
    assert plan[0][0][0]["Plan"]["Plan Rows"] == 20
