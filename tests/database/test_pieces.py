"""History responses in pieces: the exact bytes again, in room that grows with the transcript, proven and erasable."""

import hashlib
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import events, ledger
from archiver.archive import Timing, pieces
from archiver.archive.pieces import MIN_SPLIT_BYTES, PieceIndex, ResponseAssembler
from archiver.archive.rebuild import rebuild
from archiver.compliance import erasure, export, seals
from archiver.compliance.export.selection import Selection
from archiver.database import schema, snapshot, transaction
from archiver.events import Delivery, Event, responses
from archiver.ledger import compaction
from tests.support.payloads import created
from tests.support.rows import DERIVED, execute, rows
from tests.support.slowness import holding, slow_rows
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres

START = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
TIMING = Timing()
Said = tuple[str, str]


def answer(messages: Sequence[Said], minute: int = 0, **options: Any) -> bytes:
    """A response; its time of update, of another length each time, stands before the messages and after them."""
    result = [{"role": role, "content": content} for role, content in messages]
    session = {"updated": f"minute {minute}", "messages": result, "updatedAt": f"{minute}", "id": "s1"}
    return json.dumps({"message": "ok", "session": session}, **options).encode()


def conversation(turns: int, size: int = 1_500) -> list[Said]:
    """Words that do not compress."""
    words = random.Random(7)  # the same each time

    def said(number: int, role: str) -> Said:
        return role, f"{number} " + words.randbytes(size // 2).hex()

    return [said(number, role) for number in range(turns) for role in ("user", "assistant")]


def record(engine: Engine, minute: float, event: Event, source: str = responses.SOURCE) -> None:
    with transaction(engine) as connection:
        observation = Delivery(event, START + timedelta(minutes=minute), None, source)
        ledger.record(connection, [observation], TIMING)


def read(engine: Engine, minute: int, messages: Sequence[Said], **options: Any) -> bytes:
    body = answer(messages, minute, **options)
    record(engine, minute, responses.parse_history("s1", 200, body))
    return body


def webhook(number: int, words: Sequence[Said]) -> Event:
    moment = (START + timedelta(minutes=number)).isoformat()
    values: dict[str, Any] = {"input": words[0][1], "output": [{"role": "assistant", "content": words[1][1]}]}
    event = events.parse(created(f"c{number}", "s1", createdAt=moment, updatedAt=moment, **values))
    assert isinstance(event, Event)
    return event


def kept(engine: Engine) -> list[bool]:
    """Of each response, whether it is kept as bytes."""
    query = "SELECT body IS NOT NULL FROM archiver.events WHERE type = 'history.read' ORDER BY id"
    return [each for (each,) in rows(engine, query)]


def bodies(engine: Engine) -> list[bytes]:
    """The bytes of each response, from wherever they are."""
    query = (
        "SELECT coalesce(body, archiver.body_of(session_id, frame, runs)) FROM archiver.events"
        " WHERE type = 'history.read' ORDER BY id"
    )
    return [bytes(each) for (each,) in rows(engine, query)]


def faults(engine: Engine) -> list[str]:
    with snapshot(engine, statement_seconds=60) as connection:
        return [finding.fault for finding in seals.verify(connection)]


def archived(engine: Engine) -> list[Any]:
    return [sorted(rows(engine, f"SELECT t::text FROM archiver.{table} t")) for table in DERIVED]


def used(engine: Engine) -> int:
    """Bytes of the ledger's files, dead rows and indexes included."""
    query = "SELECT pg_total_relation_size('archiver.events') + pg_total_relation_size('archiver.pieces')"
    ((size,),) = rows(engine, query)
    return int(size)


# Pure


_texts = st.sampled_from(["ok", "yes", "", "}{][", '"\\', "é\u2028", "\x00", "long " * 100]) | st.text(max_size=20)
_lines = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), _texts), min_size=1, max_size=12)
_styles = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@settings(max_examples=300, deadline=None)
@given(st.lists(_lines, min_size=1, max_size=6), _styles)
@example([[("user", "half \ud83d of an emoji")], [("user", "half \ud83d of an emoji"), ("assistant", "\ude00")]], {})
def test_the_bytes_of_any_response_are_reassembled(shown: list[list[Said]], style: dict[str, Any]) -> None:
    known = PieceIndex("s1", [])
    made = []
    for minute, lines in enumerate(shown):
        body = answer(lines, minute, **style) if style.get("ensure_ascii", True) else answer(lines, minute)
        result = pieces.split("s1", body)
        assert result is not None
        made.append((body, result.frame, pieces.numbers(known.runs(result.messages))))
    restored = ResponseAssembler({each["number"]: each["content"] for each in known.new})
    for body, frame, runs in made:
        assert b"".join(restored.parts(frame, runs)) == body


@pytest.mark.parametrize("words", ["ok", "question {}"])
def test_a_growing_history_takes_one_run_and_each_message_once(words: str) -> None:
    lines = [("user" if n % 2 else "assistant", words.format(n)) for n in range(200)]
    known = PieceIndex("s1", [])
    for length in range(1, 201):
        result = pieces.split("s1", answer(lines[:length], length))
        assert result is not None
        assert known.runs(result.messages) == [(1, length)]
    assert len(known.new) == 200


def test_a_history_cut_at_the_start_and_changed_within_takes_few_runs() -> None:
    lines = conversation(100, size=40)
    known = PieceIndex("s1", [])
    for number in range(20):
        changed = [*lines[5 : 20 + number * 8]]
        changed[-9] = ("assistant", f"draft {number}")
        result = pieces.split("s1", answer(changed))
        assert result is not None
        assert len(known.runs(result.messages)) <= 3 + number
    assert len(known.new) <= 200 + 20 * 10


@pytest.mark.parametrize(
    "body",
    [
        b'{"session": {"messages": []}}',
        b'{"session": {"messages": [{"role": "user", "content": "a"} ,{"role": "user"},  {"role": "user"}]}}',
        b'{"session": {"messages": [{"role": "user", "content": NaN}]}}',
        b"<html>",
        b'{"session": {"messages": "none"}}',
    ],
)
def test_what_cannot_be_split_is_kept_as_it_is(body: bytes) -> None:
    assert pieces.split("s1", body) is None


# In the ledger


def test_a_small_response_that_a_later_one_holds_as_a_whole_keeps_its_digest_alone(
    engine: Engine,
) -> None:
    lines = conversation(3, size=100)
    result = [read(engine, minute, lines[: 2 * minute]) for minute in (1, 2, 3)]
    assert kept(engine) == [False, False, True]
    assert bodies(engine) == result
    query = "SELECT salt, body_digest FROM archiver.events ORDER BY id"
    for (salt, digest), body in zip(rows(engine, query), result, strict=True):
        assert hashlib.sha256(salt + body).digest() == digest


def test_a_small_response_that_shows_what_the_later_one_does_not_keeps_its_bytes(engine: Engine) -> None:
    lines = conversation(3, size=100)
    result = [read(engine, 1, lines[:4]), read(engine, 2, [*lines[:2], *lines[4:]]), read(engine, 3, lines)]
    assert kept(engine) == [False, True, True]
    assert bodies(engine) == result


def test_i12_the_room_of_all_responses_grows_with_the_transcript(engine: Engine) -> None:
    lines = conversation(60)
    result = []
    for turn in range(60):
        record(engine, turn, webhook(turn, lines[2 * turn : 2 * turn + 2]), events.WEBHOOK)
        result.append(read(engine, turn, lines[: 2 * turn + 2]))
    assert bodies(engine) == result
    transcript = sum(len(content) for _, content in lines)
    query = "SELECT sum(octet_length(body)) FROM archiver.events"
    contents = "SELECT sum(octet_length(content)) FROM archiver.pieces"
    stored = sum(int(each or 0) for ((each,),) in (rows(engine, query), rows(engine, contents)))
    assert stored < 2.5 * transcript
    assert used(engine) < 10 * transcript  # where nothing is vacuumed, some small responses are left as dead rows
    assert faults(engine) == []


def test_i12_windows_of_a_history_take_the_room_of_what_is_new_in_them(engine: Engine) -> None:
    lines = conversation(80)
    result = [read(engine, turn, lines[max(0, 2 * turn - 40) : 2 * turn]) for turn in range(1, 81)]
    assert bodies(engine) == result
    transcript = sum(len(content) for _, content in lines)
    ((stored,),) = rows(engine, "SELECT sum(octet_length(content)) FROM archiver.pieces")
    assert stored < 2 * transcript


@pytest.fixture
def grown(engine: Engine) -> Engine:
    """A session of which some responses are in pieces, large and small, and one is not."""
    lines = conversation(40)
    for turn in (*range(4), 30, 39):
        record(engine, turn, webhook(turn, lines[2 * turn : 2 * turn + 2]), events.WEBHOOK)
        read(engine, turn, lines[: 2 * turn + 2])
    read(engine, 40, lines[:10])
    seals.seal(engine)
    return engine


def test_i9_seals_verify_and_prove_responses_in_pieces(grown: Engine) -> None:
    assert False in kept(grown)
    assert faults(grown) == []
    for (event_id,) in rows(grown, "SELECT id FROM archiver.events WHERE runs IS NOT NULL"):
        with transaction(grown) as connection:
            assert seals.prove(connection, event_id).event == event_id


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE archiver.pieces SET content = content || 'x' WHERE number = 3",
        "DELETE FROM archiver.pieces WHERE number = 3",
        "DELETE FROM archiver.pieces WHERE number IN (SELECT runs[2] FROM archiver.events)",
        "UPDATE archiver.events SET runs = '{1,1}' WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET runs = '{5,1}' WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET runs = '{}' WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET frame = '{}' WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET body = NULL, runs = '{1,2}', frame = ARRAY['{'::bytea, ',', '}']"
        " WHERE chat_id = 'c0'",
        "UPDATE archiver.pieces SET session_id = 's2'",
    ],
)
def test_i9_a_false_compaction_is_found(grown: Engine, tampering: str) -> None:
    execute(grown, tampering, unguarded=True)
    assert set(faults(grown)) == {"not_restorable"}
    # What is damaged stops neither its session nor the others.
    record(grown, 100, webhook(1_000, conversation(1)), events.WEBHOOK)
    assert sum(rebuild(grown, TIMING)) > 0


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE archiver.pieces SET content = 'x'",
        "DELETE FROM archiver.pieces",
        "TRUNCATE archiver.pieces",
        "UPDATE archiver.events SET runs = '{1,1}' WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET frame = NULL, runs = NULL WHERE runs IS NOT NULL",
        "UPDATE archiver.events SET body = NULL, runs = '{1,2}', frame = ARRAY['{'::bytea, ',', '}']",
        "UPDATE archiver.events SET body = NULL WHERE chat_id = 'c0'",
    ],
)
def test_i9_the_guard_allows_only_bytes_that_pieces_reassemble_to_be_dropped(grown: Engine, tampering: str) -> None:
    with pytest.raises(DBAPIError, match=r"append-only|is made of these pieces"):
        execute(grown, tampering)


def test_i10_a_rebuild_makes_the_same_of_responses_in_pieces(grown: Engine) -> None:
    before = archived(grown)
    execute(grown, *(f"DELETE FROM archiver.{table} WHERE session_id <> ''" for table in DERIVED))
    for _ in rebuild(grown, TIMING):
        pass
    assert archived(grown) == before


def test_an_export_holds_the_exact_bytes_and_is_checked_offline(grown: Engine, tmp_path: Path) -> None:
    expected = export.ExportRequest(Selection(is_all=True), ["jsonl"], "tester")
    export.make(grown, tmp_path / "out", expected)
    lines = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_bytes().splitlines()]
    assert [line["body"].encode() for line in lines if line["type"] == "history.read"] == bodies(grown)
    assert [finding for finding in export.check(tmp_path / "out") if finding.fault != "unsigned"] == []


def erase(engine: Engine, *targets: erasure.Target) -> None:
    erasure.order(engine, targets, "request", erasure.AuditEntry("erase", "tester", None))
    for _ in erasure.sweep(engine, TIMING):
        pass


@pytest.mark.parametrize("chat_id", ["", "c0"])
def test_i8_an_erasure_takes_the_pieces_too(grown: Engine, chat_id: str) -> None:
    words = conversation(1)
    erase(grown, erasure.Target("s1", chat_id))
    assert rows(grown, "SELECT count(*) FROM archiver.pieces") == [(0,)]
    held = rows(grown, "SELECT t::text FROM archiver.events t UNION ALL SELECT t::text FROM archiver.messages t")
    for _, content in words:
        assert not [row for (row,) in held if content in row or content.encode().hex() in row]
    seals.seal(grown)
    assert faults(grown) == []
    before = archived(grown)
    for _ in rebuild(grown, TIMING):
        pass
    assert archived(grown) == before


# Ledgers of earlier versions


def as_before(engine: Engine) -> None:
    """Put every response back as bytes, as earlier versions kept it."""
    execute(
        engine,
        "UPDATE archiver.events SET body = archiver.body_of(session_id, frame, runs), frame = NULL, runs = NULL"
        " WHERE runs IS NOT NULL",
        "DELETE FROM archiver.pieces",
        unguarded=True,
    )


def test_the_duty_compacts_what_earlier_versions_kept_as_bytes(grown: Engine) -> None:
    before, item = archived(grown), bodies(grown)
    as_before(grown)
    assert all(kept(grown))
    done = sum(step.responses for step in compaction.compact(grown, ""))
    assert done == len(item) - 1
    assert kept(grown) == [*[False] * done, True]
    assert bodies(grown) == item
    assert faults(grown) == []
    for _ in rebuild(grown, TIMING):
        pass
    assert archived(grown) == before
    assert sum(step.responses for step in compaction.compact(grown, "")) == 0


def test_i12_the_duty_works_in_steps_and_goes_on_after_each(grown: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    as_before(grown)
    monkeypatch.setattr(compaction, "RESPONSES_PER_STEP", 2)
    first = next(compaction.compact(grown, ""))
    assert (first.responses, first.last) == (2, "")
    steps = list(compaction.compact(grown, ""))
    assert [step.responses for step in steps] == [2, 2, 0]
    assert steps[-1].last is None


def test_a_session_that_is_locked_keeps_no_other_from_being_compacted(grown: Engine) -> None:
    as_before(grown)
    for minute in range(3):
        body = answer([*conversation(30), ("user", str(minute))], minute).replace(b'"id": "s1"', b'"id": "s2"')
        record(grown, 100 + minute, responses.parse_history("s2", 200, body))
    as_before(grown)
    with holding(grown, "SELECT 1 FROM archiver.sessions WHERE session_id = 's1' FOR UPDATE"):
        steps = list(compaction.compact(grown, ""))
    assert steps[-1].last is None
    whole = "SELECT session_id FROM archiver.events WHERE type = 'history.read' AND body IS NOT NULL GROUP BY 1"
    assert rows(grown, f"{whole} HAVING count(*) > 1") == [("s1",)]


def test_a_compaction_is_repeated_when_the_same_response_arrives(grown: Engine) -> None:
    """The two lock the session and the response in opposite order; Postgres ends one of them (40P01)."""
    result = bodies(grown)
    as_before(grown)
    slow_rows(grown, "archiver.sessions", "session_id", "s1", "PERFORM pg_sleep(6)")
    with (
        ThreadPoolExecutor() as pool,
        holding(
            grown,
            "SET LOCAL deadlock_timeout = '120s'",  # the other one finds it
            "UPDATE archiver.events SET delivery_count = delivery_count + 1 WHERE type = 'history.read'",
        ) as repeated,
    ):
        compacting = pool.submit(lambda: sum(step.responses for step in compaction.compact(grown, "")))
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        until(lambda: rows(grown, sleeping), "it has the session")
        repeated.execute(text("UPDATE archiver.sessions SET read_by = read_by WHERE session_id = 's1'"))
        repeated.commit()
        assert compacting.result(120) == len(result) - 1
    assert bodies(grown) == result


def test_a_reading_after_the_upgrade_makes_room_for_itself(grown: Engine) -> None:
    as_before(grown)
    read(grown, 60, conversation(41))
    assert kept(grown) == [False] * 8


def test_a_downgrade_puts_the_bytes_back(grown: Engine) -> None:
    result = bodies(grown)
    schema.downgrade(grown, "0009")
    query = "SELECT body FROM archiver.events WHERE type = 'history.read' ORDER BY id"
    assert [bytes(each) for (each,) in rows(grown, query)] == result
    schema.upgrade(grown)
    assert sum(step.responses for step in compaction.compact(grown, "")) == len(result) - 1
    assert bodies(grown) == result


def test_what_a_session_may_keep_as_bytes_is_bounded(engine: Engine) -> None:
    lines = conversation(20, size=200)
    for minute in range(1, 40):
        shown = random.Random(minute).sample(lines, 30)  # the same each time
        read(engine, minute, shown)
        ((whole,),) = rows(engine, "SELECT sum(octet_length(body)) FROM archiver.events")
        assert whole <= MIN_SPLIT_BYTES
    with transaction(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM archiver.events WHERE runs IS NOT NULL"))
