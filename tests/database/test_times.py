"""Impossible reported times: zero dates count as missing, and no time counts as later than its arrival."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archiver import events
from archiver.archive import Fact, Turn, fold
from archiver.archive.coverage import Reading
from archiver.archive.rebuild import rebuild
from archiver.archive.sessions import Rows, SessionFacts, derive
from archiver.events import CLOCK_TOLERANCE, EARLIEST, Event, responses, timestamp
from tests.support import servers
from tests.support.histories import START, TIMING, Archive, answer
from tests.support.payloads import chat, event

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

ZEROS = [
    *("", " ", "null", "None", "NaN", "undefined", "0", "-1", "0.0", "garbage"),
    *("0000-00-00", "0000-00-00 00:00:00", "0000-00-00T00:00:00Z", "0001-01-01", "0001-01-01T00:00:00"),
    *(
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00.0000000",
        "0001-01-01T00:00:00+14:00",
        "0001-01-02T00:00:00-12:00",
    ),
    *(
        "/Date(-62135596800000)/",
        "/Date(0)/",
        "1601-01-01T00:00:00Z",
        "1753-01-01T00:00:00",
        "-271821-04-20T00:00:00Z",
    ),
    *(
        "1899-12-30",
        "1899-12-31T00:00:00Z",
        "1900-01-01T00:00:00.000Z",
        "1904-01-01",
        "1980-01-01",
        "1999-12-31T23:00Z",
    ),
    *(
        "1970-01-01",
        "1970-01-01T00:00:00Z",
        "1970-01-01T01:00:00+01:00",
        "1969-12-31T23:59:59Z",
        "2000-01-01",
        "2001-01-01",
    ),
    *("-292275055-05-16T16:47:04.192Z", "-62135596800", "-62135596800000", "-9223372036854775808", "000000000"),
    *(0, 0.0, -0.0, -1, 1, -1_000, -1_000_000, -1_000_000_000, -62_135_596_800, -62_135_596_800_000, 978_307_200),
    *(-(2**63), -(2**31), -8_640_000_000_000_000, -2_208_988_800, 86_400, 946_684_800_000, float("nan")),
    *(None, False, True, [], {}, [0], {"seconds": 0}, float("-inf")),
]
FUTURE = [
    *("2099-01-01T00:00:00Z", "2100-06-01", "9999-12-31T23:59:59.9999999Z", "2262-04-11T23:47:16Z", 4_102_444_800),
    *(4_102_444_800_000, 17_675_172_000, 253_402_300_799_999, 9_007_199_254_740_991, 8_640_000_000_000_000),
    *("9" * 19, 2**63 - 1, 32_503_680_000, "2026-01-05T19:00:00Z", "2026-01-06", "2027-01-05T09:00:00Z"),
]


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).isoformat()


def revision(text: str, *, timestamp: Any = None, session_id: str = "session-1", **times: Any) -> bytes:
    """`chat.created` with this answer; `timestamp` is the envelope's."""
    values: dict[str, Any] = {"createdAt": at(0), "updatedAt": at(0)} | times
    content = chat("chat-1", session_id, input="What does it cost?", output=text, **values)
    return event("chat.created", timestamp, content)


def contents(archive: Archive) -> list[str]:
    return [content for _, _, content, _ in archive.transcript()]


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
def test_a_zero_date_is_no_time(zero: Any) -> None:
    assert timestamp(zero) is None
    result = events.parse(revision("yes", timestamp=zero, createdAt=zero, updatedAt=zero))
    assert isinstance(result, Event)
    assert result.chat is not None
    assert (result.occurred_at, result.chat.created_at, result.chat.updated_at) == (None, None, None)
    read = responses.parse_snapshot(responses.READ, "session-1", answer(("user", "q"), createdAt=zero))
    assert (read.messages, read.created_at) == ((events.Message("user", "q"),), None)
    registered = responses.register({"id": "session-1", "createdAt": zero})
    assert responses.parse_snapshot(registered.type, "session-1", registered.body).created_at is None


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
@settings(deadline=None)
@given(st.integers(int(EARLIEST.timestamp()), int(datetime(2100, 1, 1, tzinfo=UTC).timestamp())))
def test_the_unit_of_an_epoch_is_recognised(unit: int, seconds: int) -> None:
    for item in (seconds * unit, str(seconds * unit), float(seconds * unit)):
        result = timestamp(item)
        assert result is not None
        assert abs(result.timestamp() - seconds) < 1e-3


@on_one_version
@pytest.mark.parametrize(
    "zero", ["0001-01-01T00:00:00Z", 0, -1, "1970-01-01", "0000-00-00", "/Date(-62135596800000)/"]
)
def test_a_zero_date_dates_nothing_and_orders_nothing(archive: Archive, zero: Any) -> None:
    archive.webhook(1, revision("draft", timestamp=at(1), createdAt=zero, updatedAt=at(1)))
    archive.webhook(2, revision("final", timestamp=at(2), createdAt=zero, updatedAt=zero))
    archive.record(3, responses.register({"id": "session-1", "createdAt": zero}), "application")
    assert contents(archive) == ["What does it cost?", "final"]
    assert archive.rows("SELECT started_at, last_message_at FROM analytics.conversations") == [
        (START + timedelta(minutes=1), START + timedelta(minutes=1))
    ]
    assert archive.rows("SELECT day FROM analytics.daily") == [(START.date(),)]
    archive.reading(10, answer(("user", "What does it cost?"), ("assistant", "final"), createdAt=zero))
    assert archive.coverage() == ("complete", "agreed", 0)
    assert archive.rows("SELECT min(created_at) FROM archiver.sessions WHERE session_id <> ''") == [(None,)]


@on_one_version
def test_zero_dates_that_an_earlier_version_stored_count_as_not_given(archive: Archive) -> None:
    archive.webhook(1, revision("draft", timestamp=at(1), updatedAt=None))
    archive.webhook(2, revision("final", timestamp=0, updatedAt=None, createdAt=None))
    with archive.engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("UPDATE archiver.events SET occurred_at = '0001-01-01Z' WHERE occurred_at IS NULL")
        connection.exec_driver_sql("UPDATE archiver.events SET earliest_at = 'epoch' WHERE earliest_at IS NULL")
    list(rebuild(archive.engine, TIMING))
    assert contents(archive) == ["What does it cost?", "final"]
    assert archive.rows("SELECT occurred_at, created_at FROM archiver.chats") == [
        (START + timedelta(minutes=1), START)
    ]


@on_one_version
@pytest.mark.parametrize("place", ["timestamp", "updatedAt", "createdAt", "all"])
def test_i6_a_time_of_the_future_does_not_beat_history(archive: Archive, place: str) -> None:
    names = ["timestamp", "updatedAt", "createdAt"] if place == "all" else [place]
    result = [("user", "What does it cost?"), ("assistant", "FINAL ANSWER")]
    for number, future in enumerate(FUTURE):
        times = {"timestamp": at(1), "updatedAt": at(1)} | dict.fromkeys(names, future)
        archive.webhook(1, revision("PARTIAL", session_id=f"s{number}", **times))
        archive.reading(10, answer(*result, session_id=f"s{number}", createdAt=future), session_id=f"s{number}")
    assert [(role, content) for _, role, content, _ in archive.transcript()] == result * len(FUTURE)
    assert archive.rows("SELECT DISTINCT state FROM analytics.coverage") == [("repaired",)]
    archived = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == archived
    latest = START + timedelta(minutes=1) + CLOCK_TOLERANCE
    for column in ("started_at", "last_message_at"):
        assert archive.rows(f"SELECT 1 FROM analytics.conversations WHERE {column} > '{latest.isoformat()}'") == []
    for column in ("created_at", "updated_at", "occurred_at"):
        assert archive.rows(f"SELECT 1 FROM archiver.chats WHERE {column} > '{latest.isoformat()}'") == []
    assert archive.rows("SELECT DISTINCT created_at FROM archiver.sessions WHERE session_id <> ''") == [(None,)]


@on_one_version
@pytest.mark.parametrize(
    "times", [{"updatedAt": "2099-01-01"}, {"timestamp": 4_102_444_800, "updatedAt": None}], ids=repr
)
def test_i5_a_later_revision_replaces_one_of_the_future(archive: Archive, times: dict[str, Any]) -> None:
    archive.webhook(1, revision("draft", **times))
    archive.webhook(2, revision("final", timestamp=at(2), updatedAt=at(2)))
    assert contents(archive) == ["What does it cost?", "final"]


@on_one_version
def test_an_envelope_time_outweighs_an_update_of_the_future(archive: Archive) -> None:
    archive.webhook(2, revision("final", timestamp=at(2), updatedAt=at(2)))
    archive.webhook(3, revision("draft", timestamp=at(1), updatedAt="2099-01-01"))
    assert contents(archive) == ["What does it cost?", "final"]


@on_one_version
def test_a_deletion_of_the_future_happened_on_arrival(archive: Archive) -> None:
    archive.webhook(1, revision("yes", timestamp=at(1)))
    archive.webhook(2, event("chat.deleted", 4_102_444_800, {"id": "chat-1", "sessionId": "session-1"}))
    assert archive.rows("SELECT deleted_at FROM archiver.chats") == [(START + timedelta(minutes=2),)]


@on_one_version
def test_an_answer_that_history_does_not_show_leaves_a_session_unverified(archive: Archive) -> None:
    archive.webhook(1, revision("yes", timestamp=at(1)))
    archive.reading(10, answer(("user", "What does it cost?")))
    assert archive.coverage() == ("unverified", "texts_not_in_history", 0)
    archive.reading(20, answer(("user", "What does it cost?"), ("assistant", "yes")))
    assert archive.coverage() == ("complete", "agreed", 0)


@on_one_version
def test_a_revision_after_the_last_reading_with_messages_is_not_agreed(archive: Archive) -> None:
    archive.webhook(1, revision("draft", timestamp=at(1), updatedAt=at(1)))
    archive.reading(10, answer(("user", "What does it cost?"), ("assistant", "draft")))
    archive.webhook(15, revision("final", timestamp=at(15), updatedAt=at(15)))
    archive.reading(20, b"", 410)
    assert contents(archive) == ["What does it cost?", "final"]
    assert archive.coverage() == ("unverified", "history_gone", 0)


_texts = st.sampled_from(["yes", "no", "PARTIAL", "ok"])
_moments = (
    st.none() | st.integers(-3, 30).map(at) | st.sampled_from(["2099-01-01", 4_102_444_800_000, "0001-01-01", 0])
)
_revisions = st.tuples(st.integers(0, 2), _texts, _texts, _moments, _moments, _moments, st.integers(0, 9))


def _derived(revisions: list[tuple[Any, ...]], said: list[tuple[str, str]]) -> Rows:
    facts: dict[str, list[Fact]] = {}
    for number, text, output, created_at, updated_at, told_at, minute in revisions:
        content = chat(f"c{number}", input=text, output=output, createdAt=created_at, updatedAt=updated_at)
        result = events.parse(event("chat.created", told_at, content))
        assert isinstance(result, Event)
        fact = Fact(result, "webhook", START + timedelta(minutes=minute), result.occurred_at)
        facts.setdefault(f"c{number}", []).append(fact)
    turns: dict[str, Turn] = {chat_id: fold(own) for chat_id, own in facts.items()}
    read_at = START + timedelta(minutes=10)
    reading = Reading(
        responses.READ,
        read_at,
        read_at,
        1,
        responses.parse_snapshot(responses.READ, "s", answer(*said, session_id="s")),
    )
    heard_at = [fact.received_at for own in facts.values() for fact in own]
    return derive(SessionFacts("s", turns, [reading], [], heard_at, []), TIMING)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(_revisions, min_size=1, max_size=4),
    st.lists(st.tuples(_texts, _texts), max_size=3),
    st.booleans(),
)
@example([(0, "ok", "PARTIAL", None, "2099-01-01", None, 0)], [("ok", "yes")], False)
def test_i6_a_complete_session_has_the_texts_of_its_history(
    revisions: list[tuple[Any, ...]], turns: list[tuple[str, str]], is_cut: bool
) -> None:
    texts = [message for text, output in turns for message in (("user", text), ("assistant", output))]
    texts = texts[: len(texts) - is_cut]
    rows = _derived(revisions, texts)
    if rows.session["coverage"] in {"complete", "repaired"}:
        assert [(row["role"], row["content"]) for row in rows.messages] == texts


@settings(max_examples=100, deadline=None)
@given(st.lists(_revisions, min_size=1, max_size=4))
def test_no_archived_time_is_later_than_its_arrival(revisions: list[tuple[Any, ...]]) -> None:
    rows = _derived(revisions, [])
    latest = START + timedelta(minutes=10) + CLOCK_TOLERANCE
    times = [row[name] for row in [rows.session, *rows.chats] for name in row if name.endswith("_at")]
    assert all(EARLIEST <= time <= latest + TIMING.lifetime for time in times if time is not None)
    result = [row[name] for row in rows.chats for name in ("created_at", "updated_at", "occurred_at")]
    assert all(time <= latest for time in result if time is not None)
