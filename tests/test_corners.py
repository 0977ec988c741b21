"""Corners of the write path: each of these once broke."""

import asyncio
import itertools
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, text

from archiver import database, events, ledger
from archiver.database import roles, transaction
from archiver.events import Delivery, Event, Malformed, parse
from archiver.inbound import Outcome, UnavailableError, retry_quarantined, write
from tests.payloads import created
from tests.rows import DERIVED, empty, rows

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def take(engine: Engine, *bodies: bytes, seconds: float = 0) -> list[Outcome | UnavailableError]:
    async def written() -> list[Outcome | UnavailableError]:
        writing = database.connect_async(engine.url)
        try:
            return await write(writing, [Delivery(parse(b), NOW + timedelta(seconds=seconds), "k") for b in bodies])
        finally:
            await writing.dispose()

    return asyncio.run(written())


@pytest.mark.parametrize("cost", ["1e999999999", "-9e9999999"])
def test_a_cost_beyond_decimal_does_not_raise(cost: str) -> None:
    event = parse(created(cost=cost))
    assert isinstance(event, Event)
    assert event.chat is not None
    assert event.chat.cost is None


@pytest.mark.parametrize("cost", ["1e-16384", "1e-999999"])
def test_a_cost_too_small_for_postgres_does_not_quarantine(engine: Engine, cost: str) -> None:
    (answer,) = take(engine, created(cost=cost))
    assert isinstance(answer, Outcome)
    assert answer.status == "stored"


def test_ids_that_the_parser_accepts_fit_the_indexes(engine: Engine) -> None:
    rng = random.Random(1)
    one, other = ("".join(chr(rng.randint(0x800, 0xD7FF)) for _ in range(events.MAX_ID)) for _ in range(2))
    answer = take(engine, created(one, other))[0]
    assert isinstance(answer, Outcome)
    assert answer.reason != "not_storable"


def deeper(frames: int, call: Callable[[], Any]) -> Any:
    return deeper(frames - 1, call) if frames else call()


def test_parse_does_not_depend_on_the_callers_stack() -> None:
    for depth in (300, 500, 700, 900):
        body = b'{"type":"chat.created","chat":{"id":"1","x":%s}}' % (b"[" * depth + b"]" * depth)
        assert len({type(deeper(frames, partial(parse, body))) for frames in (0, 100, 300, 500)}) == 1


def e(event_type: str, at: int | None, **fields: Any) -> bytes:
    return json.dumps({"type": event_type} | ({"timestamp": at} if at else {}) | fields).encode()


T = 1_705_311_000_000
SETS = {
    "same chat object, session told only in one envelope": [
        e("chat.created", T, sessionId="s", assistant={"id": "A"}, chat={"id": "a", "input": "x"}),
        e("chat.created", T + 5000, chat={"id": "a", "input": "x"}),
    ],
    "deletion, session told only in one envelope": [
        e("chat.deleted", T, sessionId="s", chat={"id": "a"}),
        e("chat.deleted", T + 5000, chat={"id": "a"}),
    ],
    "labels of a turn whose session came later": [
        e("chat.created", T, chat={"id": "a", "assistantId": "A", "createdAt": "2024-01-01T00:00:00Z"}),
        e("chat.deleted", T + 5000, chat={"id": "a", "sessionId": "s"}),
    ],
    "labels where only envelopes tell times": [
        e("chat.created", T, chat={"id": "a", "sessionId": "s", "assistantId": "A1"}),
        e("chat.created", T + 5000, chat={"id": "b", "sessionId": "s", "assistantId": "A2"}),
    ],
    "session name told beside an unchanged chat": [
        e("chat.created", T, chat={"id": "a", "sessionId": "s"}),
        e("chat.created", T + 5000, session={"name": "N"}, chat={"id": "a", "sessionId": "s"}),
    ],
    "variables told beside an unchanged chat": [
        e("chat.created", T, chat={"id": "a", "sessionId": "s"}),
        e(
            "chat.created",
            T + 5000,
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


def test_unknown_events_that_differ_beside_their_chat_are_all_kept(engine: Engine) -> None:
    for status in ("in-progress", "ended"):
        take(engine, e("status-update", None, status=status, chat={"id": "1", "sessionId": "s"}))
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(2,)]


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


def test_a_trigger_that_raises_plainly_does_not_fail_the_batch(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
                " IF new.content = 'poison' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$"
            )
        )
        connection.execute(
            text("CREATE TRIGGER t BEFORE INSERT ON archiver.messages FOR EACH ROW EXECUTE FUNCTION public.f()")
        )
    answers = take(engine, created("bad", input="poison"), created("good"))
    assert [isinstance(a, Outcome) and a.status for a in answers] == ["quarantined", "stored"]


@pytest.mark.parametrize(
    ("zone", "moment"), [("Asia/Tokyo", "9999-12-31T23:59:59Z"), ("America/New_York", "0001-01-01T00:00:00Z")]
)
def test_the_databases_time_zone_does_not_make_a_time_poisonous(engine: Engine, zone: str, moment: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE {engine.url.database} SET timezone = '{zone}'"))
    engine.dispose()
    (answer,) = take(engine, e("chat.created", None, chat={"id": "1", "sessionId": "s"}, timestamp=moment))
    assert isinstance(answer, Outcome)
    assert answer.status == "stored"


def test_i4_a_retry_keeps_the_count(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE archiver.messages ADD CONSTRAINT p CHECK (content <> 'poison')"))
    for seconds in (0, 5, 9):
        (refused,) = take(engine, created(input="poison"), seconds=seconds)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE archiver.messages DROP CONSTRAINT p"))
    take(engine, created(input="poison"), seconds=20)
    assert isinstance(refused, Outcome)
    retry_quarantined(engine, refused.id)
    assert rows(engine, "SELECT delivery_count, last_received_at FROM archiver.events") == [
        (4, NOW + timedelta(seconds=20))
    ]


def test_a_chat_id_in_the_envelope_alone_is_the_same_fact_in_a_new_envelope() -> None:
    keys = set()
    for at in (T, T + 1):
        event = parse(e("chat.deleted", at, chatId="1"))
        assert not isinstance(event, Malformed)
        keys.add(event.dedupe_key)
    assert len(keys) == 1


def test_what_stands_beside_data_chat_is_read() -> None:
    event = parse(b'{"type":"chat.created","data":{"sessionId":"s","chat":{"id":"1"}}}')
    assert isinstance(event, Event)
    assert event.session_id == "s"


def test_i5_when_a_session_was_first_heard_of_does_not_depend_on_batches(engine: Engine) -> None:
    bodies = [e("chat.deleted", T, chat={"id": "a"}), created("a", "s")]
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


def test_i5_isolation_is_read_committed_regardless_of_the_database_default(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(f"ALTER DATABASE {engine.url.database} SET default_transaction_isolation = 'serializable'")
        )
    engine.dispose()
    assert rows(engine, "SHOW transaction_isolation") == [("read committed",)]


def test_i4_a_flat_chat_event_with_a_message_of_its_own_is_a_chat_event() -> None:
    event = parse(b'{"type":"chat.created","message":{"type":"text"},"chat":{"id":"a","sessionId":"s"}}')
    assert isinstance(event, Event)
    assert (event.type, event.chat_id) == ("chat.created", "a")


def test_i3_facts_that_differ_in_what_is_no_number_differ() -> None:
    keys = set()
    for cost in (b"NaN", b"null", b"1e400", b"9" * 5000, b"8" * 5000):
        event = parse(b'{"type":"chat.created","chat":{"id":"a","cost":%s}}' % cost)
        assert isinstance(event, Event)
        assert event.chat is not None
        assert event.chat.cost is None
        keys.add(event.dedupe_key)
    assert len(keys) == 5


@pytest.mark.parametrize("value", [{}, [], 1, None, True])
def test_i4_a_type_that_is_no_text_does_not_raise(value: Any) -> None:
    body = json.dumps({"type": value, "event": value, "message": {"type": value}}).encode()
    assert isinstance(parse(body), Malformed)


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


def test_the_worker_reaches_a_database_whose_folder_or_password_holds_a_space() -> None:
    url = database.database_url(
        "postgresql://anna:a%20b%2Bc@/archive?host=/tmp/my%20archive,/tmp/other&port=5432,5433"
    )
    result = conninfo_to_dict(database.conninfo(url, "a worker"))
    assert (result["host"], result["port"], result["password"]) == (
        "/tmp/my archive,/tmp/other",
        "5432,5433",
        "a b+c",
    )
    assert (result["user"], result["dbname"]) == ("anna", "archive")
