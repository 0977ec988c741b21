"""The write path against a real Postgres: once (I3), in any order (I5)."""

import itertools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import ledger
from archiver.archive.facts import other_facts
from archiver.database import Lock, execute, is_lock_timeout, roles, transaction
from archiver.database.errors import is_conflict
from archiver.events import Delivery, Event, parse, responses
from tests.support.ingestion import take
from tests.support.observations import NOW, observe, record
from tests.support.payloads import created, deleted, envelope
from tests.support.rows import DERIVED, empty, rows
from tests.support.slowness import slow_rows
from tests.support.waiting import until


def record_again(engine: Engine, *bodies: bytes, locks_late: bool) -> list[ledger.Recorded]:
    """And once more where others were in the way, as ingest does."""
    while True:
        try:
            with transaction(engine) as connection:
                return ledger.record(connection, [observe(body) for body in bodies], locks_late=locks_late)
        except DBAPIError as error:
            if not is_conflict(error) and not is_lock_timeout(error):
                raise


def archive(engine: Engine) -> dict[str, list[Any]]:
    """What upstream told, without the times of arrival."""
    return {
        "sessions": rows(
            engine, "SELECT session_id, assistant_id, name, status FROM analytics.conversations ORDER BY 1"
        ),
        "chats": rows(
            engine,
            "SELECT session_id, chat_id, assistant_id, status, cost, variables::text, created_at, updated_at,"
            " occurred_at, deleted_at, source FROM archiver.chats ORDER BY 1, 2",
        ),
        "messages": rows(
            engine, "SELECT session_id, position, chat_id, role, content FROM analytics.messages ORDER BY 1, 2"
        ),
    }


def test_i3_a_fact_is_stored_once_and_its_redeliveries_are_counted(engine: Engine) -> None:
    first, second = record(engine, created(), created(at=1_705_311_999_000))
    (third,) = record(engine, created())
    assert (first.is_new, second.is_new, third.is_new) == (True, False, False)
    assert rows(engine, "SELECT id, delivery_count FROM archiver.events") == [(first.id, 3)]
    assert [row[3:] for row in archive(engine)["messages"]] == [
        ("user", "question of chat-1"),
        ("assistant", "answer to chat-1"),
    ]


def test_bodies_of_sessions_that_were_read_are_not_looked_up_twice(engine: Engine) -> None:
    """They are made anew as a whole, from all that the ledger tells: under a lock the same is not sent twice."""
    record(engine, created())
    asked = other_facts({("session-1", "chat-1"): []})

    def answered() -> list[Any]:
        with transaction(engine) as connection:
            return execute(connection, asked)[0]

    assert [row.chat_id for row in answered()] == ["chat-1"]
    result = responses.parse_history("session-1", 200, b'{"session": {"messages": []}}')
    with transaction(engine) as connection:
        ledger.record(connection, [Delivery(result, NOW, None, responses.SOURCE)])
    assert answered() == []


def test_i3_the_bytes_are_kept_as_they_came(engine: Engine) -> None:
    body = b' {"type" : "chat.created","chat":{"id":"1","sessionId":"s","input":"\\u0000 \\ud800 ok"}}\n'
    record(engine, body)
    assert [bytes(row[0]) for row in rows(engine, "SELECT body FROM archiver.events")] == [body]
    assert archive(engine)["messages"] == [("s", 1, "1", "user", "\ufffd \ufffd ok")]


def test_i3_the_newest_revision_wins_and_an_empty_output_never_replaces_a_filled_one(engine: Engine) -> None:
    filled = created(updatedAt="2024-01-15T09:30:05Z")
    emptied = created(updatedAt="2024-01-15T09:30:09Z", output=[], status="archived")
    record(engine, created(output=[], updatedAt="2024-01-15T09:30:00Z"))
    record(engine, emptied)
    record(engine, filled)
    assert [row[4] for row in archive(engine)["messages"]] == ["question of chat-1", "answer to chat-1"]
    assert archive(engine)["chats"][0][3] == "archived"
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(3,)]


def test_i3_a_shorter_revision_leaves_no_message_of_the_longer_one(engine: Engine) -> None:
    many = [{"role": "assistant", "content": str(n)} for n in range(5)]
    record(engine, created(output=many))
    record(engine, created(output=many[:1], updatedAt="2024-01-15T10:00:00Z"))
    assert [row[4] for row in archive(engine)["messages"]] == ["question of chat-1", "0"]


def test_i5_a_deletion_before_its_creation_leaves_a_tombstone_with_content(engine: Engine) -> None:
    record(engine, deleted())
    record(engine, created())
    (chat,) = archive(engine)["chats"]
    assert chat[9] == datetime(2024, 1, 15, 9, 46, 40, tzinfo=UTC)
    assert len(archive(engine)["messages"]) == 2


def test_i5_a_deletion_without_a_session_finds_its_chat_in_either_order(engine: Engine) -> None:
    record(engine, created("early"), deleted("early", session_id=None))
    record(engine, deleted("late", session_id=None))
    record(engine, created("late"))
    assert [(row[0], row[1], row[9] is not None) for row in archive(engine)["chats"]] == [
        ("session-1", "early", True),
        ("session-1", "late", True),
    ]


def test_i4_an_unknown_event_is_recorded_and_projects_nothing(engine: Engine) -> None:
    record(engine, b'{"type": "assistant.renamed", "chat": {"id": "1", "sessionId": "s"}}')
    assert rows(engine, "SELECT type, session_id, chat_id FROM archiver.events") == [("assistant.renamed", "s", "1")]
    assert archive(engine) == {"sessions": [], "chats": [], "messages": []}


def test_i9_each_row_commits_to_its_body_through_a_salt(engine: Engine) -> None:
    record(engine, created("a"), created("b"))
    assert rows(
        engine,
        "SELECT count(DISTINCT salt), bool_and(length(salt) = 16), bool_and(body_digest = sha256(salt || body))"
        " FROM archiver.events",
    ) == [(2, True, True)]


def deliveries(seed: int) -> list[bytes]:
    """A few chats in a few sessions: revised, deleted, retried in new envelopes, some without a session."""
    rng = random.Random(seed)
    bodies = []
    for number in range(rng.randint(1, 4)):
        chat_id, session_id = f"chat-{number}", f"session-{rng.randint(1, 2)}"
        for revision in range(rng.randint(1, 3)):
            values = (
                {"updatedAt": f"2024-01-15T09:3{number}:0{revision}Z"} if rng.random() < 0.6 else {"updatedAt": None}
            )
            output = [] if rng.random() < 0.3 else [{"role": "assistant", "content": f"answer {revision}"}]
            at = 1_705_311_000_000 + number * 60_000 + revision * 1000
            fields = values | {"output": output, "createdAt": f"2024-01-15T09:3{number}:00Z", "cost": revision}
            bodies.append(created(chat_id, session_id, at, **fields))
            if rng.random() < 0.4:  # the same fact again, in a later envelope
                bodies.append(created(chat_id, session_id, at + rng.randint(1, 90_000), **fields))
        if rng.random() < 0.4:
            bodies.append(deleted(chat_id, session_id if rng.random() < 0.5 else None))
        if rng.random() < 0.2:
            bodies.append(created(chat_id, None, 1_705_311_000_000, updatedAt="2024-01-15T09:20:00Z"))
    return bodies


def play(engine: Engine, bodies: Sequence[bytes], rng: random.Random) -> None:
    remaining = list(bodies)
    while remaining:
        size = rng.randint(1, 4)
        record(engine, *remaining[:size])
        remaining = remaining[size:]


def test_i3_i5_any_order_any_batching_and_any_redelivery_end_in_the_same_archive(engine: Engine) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
    def check(seed: int, order: random.Random) -> None:
        bodies = deliveries(seed)
        archives, ledgers = [], []
        for _ in range(2):
            empty(engine, "events", *DERIVED)
            play(engine, bodies, order)
            archives.append(archive(engine))
            ledgers.append(rows(engine, "SELECT dedupe_key, delivery_count FROM archiver.events ORDER BY 1"))
            order.shuffle(bodies)
        assert archives[0] == archives[1]
        assert ledgers[0] == ledgers[1]

    check()


def test_i5_a_late_deletion_without_its_session_sees_the_chat_that_was_recorded_in_between(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as threads:
        with transaction(engine) as beside:
            Lock.RECORDING.take(beside, exclusive=False)
            recording = threads.submit(record_again, engine, deleted("c", None), locks_late=True)
            waits = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep($1)%' AND wait_event = 'PgSleep'"
            until(lambda: rows(engine, waits), "it waits for the lock")
            record(engine, created("c", "s"))
        recording.result(120)
    rows_found = rows(engine, "SELECT session_id, chat_id, deleted_at IS NOT NULL FROM archiver.chats")
    assert rows_found == [("s", "c", True)]


def test_i5_a_late_chat_sees_its_deletion_that_was_recorded_in_between_without_a_session(engine: Engine) -> None:
    with transaction(engine) as connection:
        connection.execute(text("CREATE TABLE public.gate AS SELECT 1 AS number"))
    slow_rows(engine, "archiver.messages", "content", "slow", "PERFORM 1 FROM public.gate FOR SHARE")
    with ThreadPoolExecutor(1) as threads:
        with transaction(engine) as beside:
            beside.execute(text("SELECT 1 FROM public.gate FOR UPDATE"))
            recording = threads.submit(record_again, engine, created("c", "s", input="slow"), locks_late=True)
            until(lambda: rows(engine, "SELECT 1 FROM pg_locks WHERE NOT granted"), "it is held up")
            record(engine, deleted("c", None))
        recording.result(120)
    rows_found = rows(engine, "SELECT session_id, chat_id, deleted_at IS NOT NULL FROM archiver.chats")
    assert rows_found == [("s", "c", True)]


def test_i5_facts_that_are_recorded_at_once_with_early_and_late_locks_end_in_the_same_archive(engine: Engine) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 10_000), rng=st.randoms(use_true_random=False))
    def check(seed: int, rng: random.Random) -> None:
        bodies = deliveries(seed)
        empty(engine, "events", *DERIVED)
        play(engine, bodies, rng)
        alone = archive(engine)
        empty(engine, "events", *DERIVED)
        rng.shuffle(bodies)
        with ThreadPoolExecutor(4) as threads:
            late = [rng.random() < 0.6 for _ in bodies]
            for done in [
                threads.submit(record_again, engine, body, locks_late=is_late)
                for body, is_late in zip(bodies, late, strict=True)
            ]:
                done.result(120)
        assert archive(engine) == alone

    check()


AT = 1_705_311_000_000


SETS = {
    "same chat object, session told only in one envelope": [
        envelope("chat.created", AT, sessionId="s", assistant={"id": "A"}, chat={"id": "a", "input": "x"}),
        envelope("chat.created", AT + 5000, chat={"id": "a", "input": "x"}),
    ],
    "deletion, session told only in one envelope": [
        envelope("chat.deleted", AT, sessionId="s", chat={"id": "a"}),
        envelope("chat.deleted", AT + 5000, chat={"id": "a"}),
    ],
    "labels of a turn whose session came later": [
        envelope("chat.created", AT, chat={"id": "a", "assistantId": "A", "createdAt": "2024-01-01T00:00:00Z"}),
        envelope("chat.deleted", AT + 5000, chat={"id": "a", "sessionId": "s"}),
    ],
    "labels where only envelopes tell times": [
        envelope("chat.created", AT, chat={"id": "a", "sessionId": "s", "assistantId": "A1"}),
        envelope("chat.created", AT + 5000, chat={"id": "b", "sessionId": "s", "assistantId": "A2"}),
    ],
    "session name told beside an unchanged chat": [
        envelope("chat.created", AT, chat={"id": "a", "sessionId": "s"}),
        envelope("chat.created", AT + 5000, session={"name": "N"}, chat={"id": "a", "sessionId": "s"}),
    ],
    "variables told beside an unchanged chat": [
        envelope("chat.created", AT, chat={"id": "a", "sessionId": "s"}),
        envelope(
            "chat.created",
            AT + 5000,
            assistantOverrides={"variableValues": {"t": 1}},
            chat={"id": "a", "sessionId": "s"},
        ),
    ],
}


@pytest.mark.parametrize("bodies", SETS.values(), ids=SETS)
def test_i5_any_order_ends_in_the_same_archive(engine: Engine, bodies: list[bytes]) -> None:
    ends = set()
    for order in itertools.permutations(bodies):
        empty(engine, "events", *DERIVED)
        for number, body in enumerate(order):
            take(engine, body, seconds=number)
        ends.add(
            str(
                [
                    rows(
                        engine,
                        "SELECT session_id, assistant_id, name, status FROM analytics.conversations ORDER BY 1",
                    ),
                    rows(
                        engine,
                        "SELECT session_id, chat_id, assistant_id, variables::text, occurred_at, deleted_at"
                        " FROM archiver.chats ORDER BY 1, 2",
                    ),
                    rows(
                        engine, "SELECT session_id, chat_id, ordinal, content FROM archiver.messages ORDER BY 1, 2, 3"
                    ),
                ]
            )
        )
    assert len(ends) == 1, "\n".join(sorted(ends))


def test_a_user_with_the_privileges_that_doctor_asks_for_can_write(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("DO $$BEGIN CREATE ROLE writer; EXCEPTION WHEN duplicate_object THEN NULL; END$$"))
        for statement in roles.missing(connection, roles.WRITER, "writer"):
            connection.execute(text(statement))
        assert roles.missing(connection, roles.WRITER, "writer") == []
    for body in (created("a", None), created("a")):
        event = parse(body)
        assert isinstance(event, Event)
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL ROLE writer"))
            ledger.record(connection, [Delivery(event, NOW, "k")])


def test_i5_when_a_session_was_first_heard_of_does_not_depend_on_batches(engine: Engine) -> None:
    bodies = [envelope("chat.deleted", AT, chat={"id": "a"}), created("a", "s")]
    for batches in ([[0, 1]], [[0], [1]], [[1], [0]]):
        empty(engine, "events", *DERIVED)
        for batch in batches:
            with transaction(engine) as connection:
                facts = [parse(bodies[number]) for number in batch]
                ledger.record(
                    connection,
                    [
                        Delivery(fact, NOW + timedelta(minutes=number), "k")
                        for number, fact in zip(batch, facts, strict=True)
                        if isinstance(fact, Event)
                    ],
                )
        assert rows(engine, "SELECT first_event_at, last_event_at FROM archiver.sessions WHERE session_id = 's'") == [
            (NOW, NOW + timedelta(minutes=1))
        ], batches


def test_i10_any_number_of_unassigned_facts_that_came_first_date_a_session(engine: Engine) -> None:
    """Two turns of one session are placed by one batch: the older of the facts that waited counts."""

    def record(seconds: float, *bodies: bytes) -> None:
        observations = []
        for body in bodies:
            event = parse(body)
            assert isinstance(event, Event)
            observations.append(Delivery(event, NOW + timedelta(seconds=seconds), "k"))
        with transaction(engine) as connection:
            ledger.record(connection, observations)

    record(1, created("a", None))
    record(2, created("b", None))
    record(3, created("a", "s"), created("b", "s"))
    with transaction(engine) as connection:
        query = text("SELECT first_event_at FROM archiver.sessions WHERE session_id = 's'")
        assert connection.scalar(query) == NOW + timedelta(seconds=1)
