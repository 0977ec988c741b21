"""Erased is erased (I8): in ledger, archive and quarantine, for good, and the rest stays as it was."""

import asyncio
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from archiver import database, events
from archiver.compliance import erasure
from archiver.compliance.erasure import Criteria, HeldError, Target, ordering, replay, requests
from archiver.compliance.erasure.quarantine_matches import delete_matches, select_matches
from archiver.compliance.erasure.targets import of_chats
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.history import leases
from archiver.inbound import Outcome, retry_quarantined, write
from archiver.inbound.writing import store
from archiver.ledger import quarantine
from tests.support.erasures import (
    ACT,
    NOW,
    TIMING,
    archive,
    as_writer,
    dump,
    dump_of,
    erase,
    hold,
    holds_text,
    is_rebuilt_the_same,
    quarantined,
    read,
    record,
    said,
    sweep,
    texts,
    words,
)
from tests.support.payloads import chat, created, deleted, event
from tests.support.rows import empty, execute, rows
from tests.support.waiting import until


def test_i8_an_erased_session_keeps_its_ids_and_times_and_nothing_else(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), deleted("c1", "s1"), created("c3", "s2"))
    read(engine, "s1", 10, *said("c1", "c2"), ("user", "only history"), ("assistant", "knows this"))
    chats = rows(engine, "SELECT chat_id, first_received_at, occurred_at, deleted_at FROM archiver.chats ORDER BY 1")
    before = archive(engine)[0]
    erase(engine, Target("s1"))
    assert texts(engine, "s1") == []
    assert texts(engine, "s2") == ["question of c3", "answer to c3"]
    after = rows(engine, "SELECT chat_id, first_received_at, occurred_at, deleted_at FROM archiver.chats ORDER BY 1")
    assert [row for row in after if row[0] != "\x1f5"] == [row for row in chats if row[0] != "\x1f5"]
    assert rows(
        engine,
        "SELECT name, status, assistant_id, coverage, reason, reconcile_at"
        " FROM archiver.sessions WHERE session_id = 's1'",
    ) == [(None, None, None, "unverified", "erased", None)]
    assert [row for row in archive(engine)[0] if row.startswith("(s2")] == [
        row for row in before if row.startswith("(s2")
    ]
    assert holds_text(engine, "question of c1", "answer to c2", "only history", "name of s1") == []
    assert holds_text(engine, "question of c3") == ["question of c3"]
    assert is_rebuilt_the_same(engine)


def test_i8_no_unsalted_digest_is_left(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    read(engine, "s1", 1, *said("c1"))
    record(engine, b'{"sessionId": "s1", broken')
    digests = rows(
        engine, "SELECT dedupe_key FROM archiver.events UNION ALL SELECT body_digest FROM archiver.quarantine"
    )
    execute(engine, "ANALYZE")
    assert all(digest.hex().encode() in dump(engine) for (digest,) in digests)
    erase(engine, Target("s1"))
    assert not any(digest.hex().encode() in dump(engine) for (digest,) in digests)


def test_i8_a_redelivery_and_a_late_history_do_not_bring_it_back(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    erase(engine, Target("s1"))
    before = archive(engine), rows(engine, "SELECT t::text FROM archiver.events t")
    again = record(engine, created("c1", "s1"), created("c1", "s1", output="other"), created("c9", "s1"), minute=5)
    again += record(engine, deleted("c1", None), event("session.closed", 1, chat("c1", "s1")), minute=6)
    again.append(read(engine, "s1", 7, *said("c1")))
    with transaction(engine) as connection:
        registration = Delivery(
            responses.register({"id": "s1", "name": "x"}), NOW, None, source=responses.APPLICATION
        )
        again += store(connection, [registration], TIMING)
    assert again == [Outcome("ignored", reason="erased")] * len(again)
    assert (archive(engine), rows(engine, "SELECT t::text FROM archiver.events t")) == before
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


def test_i8_what_is_refused_harms_no_other_of_its_batch(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    erase(engine, Target("s1"))
    published = record(
        engine, created("c2", "s2"), created("c1", "s1"), b"{", created("c3", None), created("c2", "s2")
    )
    assert [each.status for each in published] == ["stored", "ignored", "quarantined", "stored", "duplicate"]


def test_i8_an_erased_turn_goes_from_readings_too_and_the_others_stay(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s1"))
    greeting = ("assistant", "welcome")
    read(engine, "s1", 5, greeting, *said("c1", "c2"))
    read(engine, "s1", 10, greeting, *said("c1", "c2", "c3"), ("user", "only history"), ("assistant", "knows this"))
    whole = texts(engine, "s1")
    erase(engine, Target("s1", "c2"))
    assert texts(engine, "s1") == [each for each in whole if not each.endswith("c2")]
    assert holds_text(engine, "question of c2", "answer to c2") == []
    sources = rows(engine, "SELECT content, source FROM analytics.messages WHERE session_id = 's1'")
    assert dict(sources)["only history"] == "history"
    assert dict(sources)["question of c3"] == "webhook"
    assert rows(engine, "SELECT state, reason FROM analytics.coverage WHERE session_id = 's1'") == [
        ("unverified", "erased")
    ]
    assert is_rebuilt_the_same(engine)


def test_i8_the_wording_that_history_has_for_a_turn_goes_with_it_and_that_of_others_stays(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    read(engine, "s1", 5, *((role, text.replace(" ", "\u00a0")) for role, text in said("c1", "c2")))
    shown = "SELECT content, history_content FROM analytics.messages WHERE session_id = 's1' ORDER BY position"
    of_c1 = [(text, text.replace(" ", "\u00a0")) for _, text in said("c1")]
    assert rows(engine, shown)[:2] == of_c1
    assert holds_text(engine, "answer\u00a0to\u00a0c2") != []
    erase(engine, Target("s1", "c2"))
    assert holds_text(engine, "answer to c2", "answer\u00a0to\u00a0c2", "question\u00a0of\u00a0c2") == []
    assert rows(engine, shown) == of_c1
    assert is_rebuilt_the_same(engine)
    erase(engine, Target("s1"))
    assert holds_text(engine, "answer\u00a0to\u00a0c1", "question\u00a0of\u00a0c1") == []


def test_i8_turn_after_turn_can_be_erased_and_later_readings_are_not_taken(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s1"))
    read(engine, "s1", 10, *said("c1", "c2", "c3"))
    for number, chat_id in enumerate(["c2", "c1"]):
        erase(engine, Target("s1", chat_id))
        assert read(engine, "s1", 20 + number, *said("c1", "c2", "c3")).reason == "erased"
    assert texts(engine, "s1") == ["question of c3", "answer to c3"]
    assert holds_text(engine, "question of c2", "answer to c1") == []
    # What is said later goes on, and does not make it due to be read.
    record(engine, created("c4", "s1", createdAt="2024-01-15T10:30:00Z"), minute=30)
    assert texts(engine, "s1") == ["question of c3", "answer to c3", "question of c4", "answer to c4"]
    assert rows(engine, "SELECT reason, reconcile_at FROM archiver.sessions WHERE session_id = 's1'") == [
        ("erased", None)
    ]
    assert sweep(engine) == 0
    assert is_rebuilt_the_same(engine)


def test_i8_a_turn_of_a_session_that_was_never_read(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    erase(engine, Target("s1", "c1"))
    record(engine, created("c3", "s1"), minute=3)
    assert sorted(texts(engine, "s1")) == sorted(content for _, content in said("c2", "c3"))
    assert is_rebuilt_the_same(engine)


def test_i8_facts_without_a_session_are_erased_too(engine: Engine) -> None:
    record(engine, created("c1", None, input="homeless words"), created("c2", None))
    record(engine, created("c1", "s1"), minute=1)
    erase(engine, Target("s1"))
    assert holds_text(engine, "homeless words", "question of c1") == []
    assert record(engine, created("c1", None, input="homeless words"), minute=2) == [
        Outcome("ignored", reason="erased")
    ]
    assert texts(engine, "") == ["question of c2", "answer to c2"]
    assert is_rebuilt_the_same(engine)


def test_i8_clocks_that_differ_leave_nothing_of_a_later_erasure(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    read(engine, "s1", 5, *said("c1", "c2"))
    for chat_id, at in {"c1": NOW, "c2": NOW - timedelta(days=1)}.items():
        erase(engine, Target("s1", chat_id), erased_at={Target("s1", chat_id): at})
    assert holds_text(engine, "question of c1", "question of c2") == []


def test_i8_a_session_found_to_have_an_erased_turn_is_not_read_again(engine: Engine) -> None:
    record(engine, created("c1", None), created("c2", "s1"))
    erase(engine, Target("", "c1"))
    state_query = "SELECT reason, reconcile_at FROM archiver.sessions WHERE session_id = 's1'"
    assert rows(engine, state_query)[0][0] == "awaiting_history"
    assert record(engine, created("c1", "s1"), minute=1)[0].reason == "erased"
    assert rows(engine, state_query) == [("erased", None)]
    assert is_rebuilt_the_same(engine)


def test_i10_what_is_ordered_and_not_taken_yet_is_rebuilt_the_same(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    read(engine, "s1", 5, *said("c1"))
    erasure.order(engine, [Target("s1")], "request", ACT)
    assert is_rebuilt_the_same(engine)


def test_i8_facts_without_a_session_alone_go_from_the_sessions_that_have_their_turn(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    record(engine, created("c1", None, input="homeless words", updatedAt="2024-01-15T09:40:00Z"), minute=1)
    assert texts(engine, "s1") == ["homeless words", "answer to c1"]
    erase(engine, Target("", "c1"))
    assert texts(engine, "s1") == ["question of c1", "answer to c1"]
    assert holds_text(engine, "homeless words") == []
    assert is_rebuilt_the_same(engine)


def test_i8_it_is_ordered_only_once_those_who_write_have_committed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.ordering.LOCK_SECONDS", 0.1)
    observed = events.parse(created("c1", "s1"))
    assert isinstance(observed, events.Event)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as writing:
            store(writing, [Delivery(observed, NOW, "key")], TIMING)
            erasing = pool.submit(erase, engine, Target("s1"))
            waiting = "SELECT FROM pg_locks WHERE relation = 'archiver_jobs.lock_placement'::regclass AND NOT granted"
            until(lambda: erasing.done() or rows(engine, waiting), "it waits")
            record(engine, created("c2", "s2"))  # which does not wait for long behind it
            assert not erasing.done()
        erasing.result(120)
    assert texts(engine, "s1") == []
    assert holds_text(engine, "question of c1") == []


def test_i8_a_turn_erased_before_its_session_was_known_is_not_restored_by_that_session(
    engine: Engine,
) -> None:
    record(engine, created("c1", None))
    erase(engine, Target("", "c1"))
    assert holds_text(engine, "question of c1") == []
    assert record(engine, created("c1", "s1"), created("c2", "s1"), minute=1)[0].reason == "erased"
    assert read(engine, "s1", 2, *said("c1", "c2")).reason == "erased"
    assert texts(engine, "s1") == ["question of c2", "answer to c2"]
    assert holds_text(engine, "question of c1") == []
    assert is_rebuilt_the_same(engine)


def test_i8_facts_that_turn_out_to_be_of_an_erased_session_go_with_the_next_sweep_unless_held(engine: Engine) -> None:
    record(engine, created("c1", None), created("c2", None))
    erase(engine, Target("s1"))
    hold_id = hold(engine, assistant_id="assistant-1")
    # Only now is it told whose they are.
    again = record(engine, created("c1", "s1"), deleted("c2", "s1"), minute=1)
    assert {each.reason for each in again} == {"erased"}
    assert sweep(engine) == 0
    with transaction(engine) as connection:
        erasure.release_hold(connection, hold_id, "judge@court", "closed")
    assert sweep(engine) == 2
    assert holds_text(engine, "question of c1", "question of c2") == []
    assert rows(engine, "SELECT count(DISTINCT act_id) FROM archiver.erasures") == [(1,)]
    assert is_rebuilt_the_same(engine)


def test_i8_only_matching_quarantine_rows_are_deleted(engine: Engine) -> None:
    record(engine, created("chat-1", "s-1"))
    record(
        engine,
        b'{"sessionId": "s-1", broken',
        b'{"id": "chat-1" broken',
        b'{"id": "chat-12", "sessionId": "s-11" broken',
        b"nothing of anybody",
    )
    with transaction(engine) as connection:
        answer = responses.parse_history("s-1", 200, b"secret answer")
        quarantine.upsert_quarantine(connection, [Delivery(answer, NOW, None, responses.SOURCE)], "not_storable")
    erase(engine, Target("s-1"))
    assert [bytes(body) for (body,) in rows(engine, "SELECT body FROM archiver.quarantine ORDER BY id")] == [
        b'{"id": "chat-12", "sessionId": "s-11" broken',
        b"nothing of anybody",
    ]


def test_i8_quarantined_history_answers_of_its_session_go_with_a_turn(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s3"))
    with transaction(engine) as connection:
        for session_id in ("s1", "s3"):
            body = b"all words of " + session_id.encode()
            answer = responses.parse_history(session_id, 200, body)
            quarantine.upsert_quarantine(connection, [Delivery(answer, NOW, None, responses.SOURCE)], "not_storable")
    erase(engine, Target("s1", "c1"))
    assert quarantined(engine) == [b"all words of s3"]


def test_i8_the_quarantine_keeps_what_may_be_about_anything_held(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("h1", "held"), created("h2", "other", assistantId="a2"))
    record(engine, created("h3", None, assistantId="a2"), created("hé", "other", assistantId="a2"))
    bodies = [
        b'{"sessionId": "held", "also": "s1" broken',
        b'{"chat": "h1", "also": "s1" broken',
        b'{"said": "of tier Gold by c1" broken',
        b'{"said": "of other by c1" broken',
        b'{"chat": "h2", "also": "c1" broken',
        b'{"chat": "h3", "also": "c1" broken',
        b'{"chat": "h\\u00e9", "also": "c1" broken',
    ]
    record(engine, *bodies, b'{"sessionId": "s1", "said": "of helder" broken')
    holds = [hold(engine, session_id="held"), hold(engine, variable="tier", value="Gold")]
    holds.append(hold(engine, assistant_id="a2"))
    erase(engine, Target("s1"))
    assert quarantined(engine) == sorted(bodies)
    with transaction(engine) as connection:
        for hold_id in holds:
            erasure.release_hold(connection, hold_id, "judge@court", "closed")
    with transaction(engine) as connection:
        assert delete_matches(connection, select_matches(connection, [Target("s1")])) == len(bodies)


def test_i8_what_the_quarantine_was_found_to_hold_goes_with_the_order(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.ordering.BATCH_SIZE", 2)
    published = [b'{"sessionId": "s7" broken', b'{"customer": "Mary" broken']
    record(engine, b'{"sessionId": "s6", "and": "s9" broken', *published)
    targets = [Target("s7"), Target("s8"), Target("s9")]
    with transaction(engine) as connection:
        result = select_matches(connection, targets, [("customer", "Mary")])
    hold(engine, session_id="s6")  # placed since
    ordered = erasure.order(engine, targets, "request", ACT, matches=result)
    assert ordered.quarantined == 1
    assert quarantined(engine) == [published[1], b'{"sessionId": "s6", "and": "s9" broken']


def test_i8_more_quarantined_rows_are_deleted_at_once_than_a_statement_has_parameters(engine: Engine) -> None:
    record(engine, b"broken", b"broken too")
    ids = range(1, 70_000)
    with transaction(engine) as connection:
        quarantine.lock_rows(connection, ids)
        assert quarantine.delete_rows(connection, ids) == 2
        assert quarantine.delete_rows(connection, ids) == 0


# On request


def test_i8_a_request_reports_what_it_erased_without_a_command(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s2"))
    record(engine, b'{"sessionId": "s1" broken')
    selection = requests.Selection(["s1", "s9"], ["c3"])
    preview = requests.preview(engine, selection, "anna@desk", "she asked for it")
    assert (preview.counts.sessions, preview.counts.turns, preview.counts.quarantined) == (1, 3, 1)
    assert preview.unknown == [Target("s9")]
    assert holds_text(engine, "question of c1", "answer to c3", "broken") == [
        "question of c1",
        "answer to c3",
        "broken",
    ]
    steps: list[int] = []
    ordered = requests.order(engine, preview)
    report = requests.purge(engine, ordered, TIMING, lambda step: steps.append(step.events))
    assert (report.counts, report.held, report.repeating) == (preview.counts, {}, [])
    assert sum(steps) == 3
    assert holds_text(engine, "question of c1", "answer to c3", "broken") == []
    assert rows(engine, f"SELECT kind, actor, reason FROM archiver.acts WHERE id = {report.act_id}") == [
        ("erase", "anna@desk", "she asked for it")
    ]


@pytest.mark.parametrize("skip_held", [False, True])
def test_i8_a_hold_placed_after_the_preview_is_respected(engine: Engine, skip_held: bool) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    selection = requests.Selection(["s1", "s2"])
    preview = requests.preview(engine, selection, "anna@desk", "she asked for it", skip_held=skip_held)
    requests.refuse_held(engine, preview)  # nothing is held yet
    hold(engine, session_id="s2")
    if skip_held:
        report = requests.purge(engine, requests.order(engine, preview), TIMING, lambda _: None)
        assert [*report.held] == [Target("s2")]
        assert (report.counts.sessions, report.counts.events) == (1, 1)
        assert holds_text(engine, "question of c1", "question of c2") == ["question of c2"]
    else:
        with pytest.raises(HeldError):
            requests.order(engine, preview)
        assert rows(engine, "SELECT kind FROM archiver.acts ORDER BY id") == [("hold.add",), ("erase.refused",)]
        assert holds_text(engine, "question of c1", "question of c2") == ["question of c1", "question of c2"]


def test_i8_what_arrives_after_the_preview_goes_with_the_request(engine: Engine) -> None:
    record(engine, created("c1", "s1"), b'{"sessionId": "s1" broken before')
    preview = requests.preview(engine, requests.Selection(["s1"]), "anna@desk", "she asked for it")
    record(engine, created("c2", "s1"), b'{"sessionId": "s1" broken since')
    ordered = requests.order(engine, preview)
    assert ordered.counts.quarantined == 2
    requests.purge(engine, ordered, TIMING, lambda _: None)
    assert holds_text(engine, "question of c1", "question of c2", "broken before", "broken since") == []


def test_i8_a_list_of_several_rules_is_ordered_whole_or_not_at_all(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"), b'{"sessionId": "s2" broken')
    lines = [
        replay.ListedErasure("s1", "", NOW, "retention"),
        replay.ListedErasure("s2", "", NOW, "request"),
    ]
    preview = requests.preview_replay(engine, lines, "anna@desk", "a backup")
    hold(engine, session_id="s1")
    with pytest.raises(HeldError) as refused:
        requests.order(engine, preview)
    assert refused.value.ordered == 0
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(0,)]
    with transaction(engine) as connection:
        erasure.release_hold(connection, 1, "judge@court", "closed")
    report = requests.purge(engine, requests.order(engine, preview), TIMING, lambda _: None)
    assert (report.counts.sessions, report.counts.quarantined) == (2, 1)
    assert rows(engine, "SELECT session_id, rule, erased_at FROM archiver.erasures ORDER BY 1") == [
        ("s1", "retention", NOW),
        ("s2", "request", NOW),
    ]
    assert requests.preview_replay(engine, lines, "anna@desk", "again").by_rule == {}


def test_i8_a_replay_that_stopped_half_way_searches_the_quarantine_for_all_its_lines_when_it_is_run_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordering, "BATCH_SIZE", 1)
    record(engine, *(f'{{"sessionId": "s{n}" broken'.encode() for n in range(4)))
    lines = [replay.ListedErasure(f"s{n}", "", NOW, "request") for n in range(3)]

    def erase() -> requests.Report:
        preview = requests.preview_replay(engine, lines, "anna@desk", "a backup")
        return requests.purge(engine, requests.order(engine, preview), TIMING, lambda _: None)

    execute(engine, "ALTER TABLE archiver.erasures ADD CONSTRAINT stop CHECK (session_id <> 's2')")
    with pytest.raises(DBAPIError):
        erase()
    assert rows(engine, "SELECT session_id FROM archiver.erasures ORDER BY 1") == [("s0",), ("s1",)]
    execute(engine, "ALTER TABLE archiver.erasures DROP CONSTRAINT stop")
    assert erase().counts.quarantined == 3
    assert rows(engine, "SELECT body FROM archiver.quarantine") == [(b'{"sessionId": "s3" broken',)]
    # Run once more, it finds a delivery that was quarantined in between.
    record(engine, b'{"sessionId": "s1" broken again')
    assert erase().counts.quarantined == 1
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(1,)]


REFUSING = """
    CREATE FUNCTION archiver.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(1);
        RAISE EXCEPTION 'it cannot be stored' USING ERRCODE = '22000';
    END
    $$
"""


def test_i8_a_delivery_that_cannot_be_stored_is_not_quarantined_if_it_is_erased_at_the_same_time(
    engine: Engine, database_url: str
) -> None:
    execute(
        engine, REFUSING, "CREATE TRIGGER refuse BEFORE INSERT ON archiver.events EXECUTE FUNCTION archiver.refuse()"
    )

    async def write_one() -> list[Any]:
        writer = database.connect_async(database.database_url(database_url))
        try:
            return [*await write(writer, [Delivery(events.parse(created("c1", "s1")), NOW, "key")])]
        finally:
            await writer.dispose()

    placing = "SELECT FROM pg_locks WHERE relation = 'archiver_jobs.lock_placement'::regclass"
    with ThreadPoolExecutor(2) as pool:
        with engine.connect() as blocking:
            blocking.execute(text("SELECT pg_advisory_xact_lock(1)"))
            writing = pool.submit(asyncio.run, write_one())
            until(lambda: rows(engine, placing), "it is being recorded")
            erasing = pool.submit(erase, engine, Target("s1"))
            until(lambda: rows(engine, f"{placing} AND NOT granted"), "the erasure waits for that")
        assert writing.result(120) == [Outcome("ignored", reason="erased")]
        erasing.result(120)
    assert quarantined(engine) == []


def test_i8_an_unknown_event_that_mentions_an_erased_turn_goes_with_it(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    record(engine, b'{"type": "chat.rated", "sessionId": "s1", "rating": {"of": "c1", "words": "marker one"}}')
    record(engine, b'{"type": "chat.rated", "sessionId": "s1", "rating": {"of": "c10", "words": "marker two"}}')
    erase(engine, Target("s1", "c1"))
    assert holds_text(engine, "marker one", "marker two") == ["marker two"]


def test_i8_a_turn_known_only_from_unknown_events_is_erased_everywhere(engine: Engine) -> None:
    for number in ("c9", "c10"):
        published = {"type": "chat.rated", "sessionId": "s1", "chatId": number, "words": f"words of {number}!"}
        assert record(engine, json.dumps(published).encode())[0].status == "ignored"
    with transaction(engine) as connection:
        result = of_chats(connection, ["c9"])
    assert result == {Target("s1", "c9"), Target("", "c9")}
    erase(engine, *result)
    assert holds_text(engine, "words of c9!", "words of c10!") == ["words of c10!"]


def test_i8_what_was_ordered_and_not_erased_is_found_and_erased(engine: Engine) -> None:
    for number in range(3):
        record(engine, created(f"c{number}", f"s{number}"))
    erasure.order(engine, [Target("s0"), Target("s1", "c1")], "request", ACT)
    assert holds_text(engine, "question of c0", "question of c1") == ["question of c0", "question of c1"]
    assert sweep(engine) == 2
    assert holds_text(engine, "question of c0", "question of c1", "question of c2") == ["question of c2"]
    assert sweep(engine) == 0
    assert is_rebuilt_the_same(engine)


def test_i8_many_erasures_are_swept_page_by_page(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.sweeping.PAGE", 3)
    monkeypatch.setattr("archiver.compliance.erasure.sweeping.BATCH_SIZE", 2)
    monkeypatch.setattr("archiver.compliance.erasure.ordering.BATCH_SIZE", 2)
    record(engine, *(created(f"c{number}", f"s{number % 5}") for number in range(20)))
    targets = [Target(f"s{number % 5}", f"c{number}") for number in range(0, 20, 2)]
    for number in range(5):
        read(engine, f"s{number}", 9, *said(*(f"c{each}" for each in range(number, 20, 5))))
    ordered = erasure.order(engine, targets, "request", ACT)
    assert len(ordered.targets) == 10
    steps = list(erasure.sweep(engine, TIMING))
    assert len(steps) > 4
    remaining = [word for number in range(20) for word in (f"question of c{number}",)]
    dumped = [content for (content,) in rows(engine, "SELECT content FROM analytics.messages")]
    assert sorted(set(dumped) & set(remaining)) == sorted(f"question of c{number}" for number in range(1, 20, 2))
    assert rows(engine, "SELECT count(*) FROM archiver.acts") == [(1,)]


def test_i8_while_it_is_ordered_writers_wait_and_none_slips_through(engine: Engine) -> None:
    counter = itertools.count()
    record(engine, created("first", "s1"))

    def write(_: int) -> list[str]:
        result: list[str] = []
        for _ in range(15):
            number = next(counter)
            result += [
                each.status for each in record(engine, created(f"n{number}", "s1"), created(f"m{number}", "s2"))
            ]
        return result

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, number) for number in range(3)]
        while next(counter) < 12:
            pass
        erase(engine, Target("s1"))
        statuses = list(itertools.chain.from_iterable(each.result() for each in writing))
    assert statuses.count("stored") + statuses.count("ignored") == 90
    assert rows(engine, "SELECT count(*) FROM archiver.events WHERE session_id = 's1' AND body IS NOT NULL") == [(0,)]
    assert texts(engine, "s1") == []
    assert rows(engine, "SELECT count(*) FROM archiver.chats WHERE session_id = 's2'") == [(45,)]


@pytest.mark.parametrize(
    ("criteria", "held"),
    [
        ({"session_id": "s1"}, {"s1"}),
        ({"assistant_id": "a2"}, {"s2"}),
        ({"variable": "tier", "value": "Gold"}, {"s2"}),
        ({"variable": "tier", "value": "Silver"}, set()),
        ({"variable": "tier", "value": "Gold", "session_id": "s1"}, set()),
        ({"since": datetime(2024, 3, 1, tzinfo=UTC)}, {"s3"}),
        ({"until": datetime(2024, 1, 16, tzinfo=UTC)}, {"s1", ""}),
        ({"since": datetime(2024, 2, 1, tzinfo=UTC), "until": datetime(2024, 2, 2, tzinfo=UTC)}, {"s2"}),
        ({"assistant_id": "a1", "since": datetime(2024, 2, 1, tzinfo=UTC)}, {"s3"}),
        ({"session_id": "unheard of"}, {"unheard of"}),
    ],
)
def test_a_hold_covers_what_all_of_its_criteria_say(engine: Engine, criteria: dict[str, Any], held: set[str]) -> None:
    record(
        engine,
        created("c1", "s1", assistantId="a1", createdAt="2024-01-15T00:00:00Z"),
        created(
            "c2",
            "s2",
            assistantId="a2",
            createdAt="2024-02-01T00:00:00Z",
            assistantOverrides={"variableValues": {"tier": "Gold"}},
        ),
        created("c3", "s3", assistantId="a1", createdAt="2024-03-01T00:00:00Z"),
        created("c4", None, assistantId="a4", createdAt="2024-01-15T00:00:00Z"),
    )
    hold(engine, **criteria)
    targets = [Target("s1"), Target("s2", "c2"), Target("s3"), Target("unheard of"), Target("", "c4")]
    with transaction(engine) as connection:
        values = {target.session_id for target in erasure.covering(connection, targets)}
    assert values == held


def test_i8_a_hold_stops_an_erasure_as_a_whole_and_the_attempt_is_recorded(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"), created("c1", None))
    hold_id = hold(engine, session_id="s1")
    with pytest.raises(HeldError) as refused:
        erase(engine, Target("s1", "c1"), Target("s2"))
    # The facts that did not tell their session are those of the held one.
    assert refused.value.held == {Target("s1", "c1"): [hold_id], Target("", "c1"): [hold_id]}
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1", "question of c2"]
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(0,)]
    assert rows(engine, "SELECT kind, actor, detail -> 'holds' FROM archiver.acts WHERE kind LIKE 'erase%'") == [
        ("erase.refused", "anna@desk", [hold_id])
    ]
    done = erase(engine, Target("s1", "c1"), Target("s2"), skip_held=True)
    assert done.targets == [Target("s2")]
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1"]
    with transaction(engine) as connection:
        erasure.release_hold(connection, hold_id, "judge@court", "closed")
    erase(engine, Target("s1", "c1"))
    assert holds_text(engine, "question of c1") == []


def test_an_erased_turn_counts_on_the_day_on_which_its_delivery_happened(engine: Engine) -> None:
    monday, tuesday = "2024-01-15T23:59:59Z", 1_705_363_201_000  # two seconds later
    record(engine, created("c1", "s1", tuesday, createdAt=monday), created("c2", "s1", tuesday, createdAt=monday))
    days = "SELECT day::text, assistant_id, chats::int, messages::int FROM analytics.daily ORDER BY 1"
    assert rows(engine, days) == [("2024-01-15", "assistant-1", 2, 4)]
    erase(engine, Target("s1", "c1"))
    # That turn has none any more, and its session's counts.
    assert rows(engine, days) == [("2024-01-15", "assistant-1", 1, 2), ("2024-01-16", "assistant-1", 1, 0)]
    erase(engine, Target("s1"))
    assert rows(engine, days) == [("2024-01-16", None, 2, 0)]
    remaining = "SELECT chat_id, occurred_at::text, created_at, updated_at FROM archiver.chats ORDER BY 1"
    assert [row[2:] for row in rows(engine, remaining)] == [(None, None)] * 2
    assert is_rebuilt_the_same(engine)


PLACES_A_HOLD = """
    CREATE FUNCTION place_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO archiver.holds (placed_at, author, reason, session_id)
        SELECT now(), 'judge', 'case 9', 's0500' WHERE NOT EXISTS (SELECT FROM archiver.holds);
        RETURN NULL;
    END $$
"""


def test_i8_a_hold_placed_between_two_parts_of_an_erasure_is_reported_with_the_ordered_part(
    engine: Engine,
) -> None:
    named = [Target(f"s{number:04}") for number in range(ordering.BATCH_SIZE + 1)]
    execute(
        engine,
        PLACES_A_HOLD,
        "CREATE TRIGGER place AFTER INSERT ON archiver.erasures EXECUTE FUNCTION place_hold()",
    )
    with pytest.raises(HeldError) as refused:
        erasure.order(engine, named, "request", ACT)
    assert (refused.value.held, refused.value.ordered) == ({Target("s0500"): [1]}, ordering.BATCH_SIZE)
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(ordering.BATCH_SIZE,)]
    published = rows(engine, "SELECT kind, detail -> 'ordered' FROM archiver.acts ORDER BY id")
    assert published == [("erase", None), ("erase.refused", ordering.BATCH_SIZE)]


def test_i8_the_audit_entry_lists_skipped_targets_and_their_holds(engine: Engine) -> None:
    named = [Target(f"s{number:04}") for number in range(ordering.BATCH_SIZE + 1)]
    holds = [hold(engine, session_id=each) for each in ("s0000", "s0500")]
    assert len(erase(engine, *named, skip_held=True).targets) == ordering.BATCH_SIZE - 1
    published = "SELECT detail -> 'holds', detail -> 'held' FROM archiver.acts WHERE kind = 'erase'"
    assert rows(engine, published) == [(holds, 2)]


def test_i8_a_hold_keeps_a_session_of_which_a_turn_was_erased_before_it_was_known(engine: Engine) -> None:
    record(engine, created("c1", None), created("c2", "s1"))
    read(engine, "s1", 1, *said("c1", "c2"))
    hold_id = hold(engine, session_id="s1")
    erase(engine, Target("", "c1"))
    held = texts(engine, "s1")
    assert "question of c1" in held
    assert record(engine, created("c1", "s1"), minute=2)[0].reason == "erased"
    for _ in range(2):
        assert [step.held for step in erasure.sweep(engine, TIMING) if step.held] == [{Target("s1", "c1"): [hold_id]}]
        assert texts(engine, "s1") == held
        assert rows(engine, "SELECT type FROM archiver.events WHERE source = 'history' AND body IS NOT NULL") == [
            ("history.read",)
        ]
    assert is_rebuilt_the_same(engine)
    with transaction(engine) as connection:
        erasure.release_hold(connection, hold_id, "judge@court", "closed")
    assert sweep(engine) == 1
    remaining = "SELECT type FROM archiver.events WHERE source = 'history' AND body IS NOT NULL"
    assert rows(engine, remaining) == [("history.redacted",)]
    assert is_rebuilt_the_same(engine)


def test_i8_a_hold_placed_between_order_and_sweep_keeps_what_is_there(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    erasure.order(engine, [Target("s1"), Target("s2")], "request", ACT)
    hold_id = hold(engine, session_id="s1")
    assert sweep(engine) == 1
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1"]
    with transaction(engine) as connection:
        erasure.release_hold(connection, hold_id, "judge@court", "closed")
    assert sweep(engine) == 1
    assert holds_text(engine, "question of c1") == []


def test_only_a_hold_in_force_is_released(engine: Engine) -> None:
    hold_id = hold(engine, session_id="s1")
    for known in (True, False):
        with transaction(engine) as connection:
            if known:
                erasure.release_hold(connection, hold_id, "judge", "closed")
            else:
                with pytest.raises(erasure.HoldError, match="hold list"):
                    erasure.release_hold(connection, hold_id, "judge", "closed")
    with transaction(engine) as connection, pytest.raises(erasure.HoldError):
        erasure.insert_hold(connection, Criteria(), "judge", "all of it")


FORBIDDEN = [
    "UPDATE archiver.events SET body = NULL",
    "UPDATE archiver.events SET body = 'other'",
    "UPDATE archiver.events SET body = NULL, salt = NULL",
    "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = 'other'",
    "UPDATE archiver.events SET chat_id = 'other'",
    "DELETE FROM archiver.events",
    "TRUNCATE archiver.events",
    "UPDATE archiver.erasures SET rule = 'other'",
    "DELETE FROM archiver.erasures",
    "TRUNCATE archiver.erasures",
    "UPDATE archiver.acts SET actor = 'other'",
    "DELETE FROM archiver.acts",
    "DELETE FROM archiver.removals",
    "DELETE FROM archiver.holds",
    "UPDATE archiver.holds SET reason = 'other'",
    "UPDATE archiver.holds SET session_id = 'other', released_at = now()",
]


@pytest.mark.parametrize("role", ["", "SET LOCAL ROLE archiver_writer"])
@pytest.mark.parametrize("statement", FORBIDDEN)
def test_i8_nothing_but_an_erasure_changes_the_record(engine: Engine, statement: str, role: str) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    hold(engine, session_id="s2")
    erase(engine, Target("s1"))
    execute(engine, "INSERT INTO archiver.removals (event_id, act_id) VALUES (0, 0)")
    with engine.connect() as connection:
        connection.execute(text(role or "SELECT 1"))
        with pytest.raises(SQLAlchemyError, match=r"append-only|permission denied|only placed and released"):
            connection.execute(text(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO archiver.holds (placed_at, author, reason, session_id) VALUES (now(), 'x', 'y', 's')",
        "UPDATE archiver.holds SET released_at = now(), released_by = 'me'",
    ],
)
def test_who_writes_the_archive_neither_places_nor_releases_holds(engine: Engine, statement: str) -> None:
    hold(engine, session_id="s2")
    with engine.connect() as connection:
        connection.execute(text("SET LOCAL ROLE archiver_writer"))
        with pytest.raises(SQLAlchemyError, match="permission denied"):
            connection.execute(text(statement))


def test_who_writes_the_archive_may_erase(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s3"), b'{"s1" broken')
    read(engine, "s1", 3, *said("c1", "c2"))
    with as_writer(database_url) as writer:
        erase(writer, Target("s1", "c1"))
        erase(writer, Target("s3"))
        assert [each.reason for each in record(writer, created("c9", "s3"), created("c1", "s1"))] == ["erased"] * 2
        assert rows(writer, "SELECT current_user") == [("archiver_writer",)]
    assert holds_text(engine, "question of c1", "question of c2", "question of c3") == ["question of c2"]


SCHEDULED_THOUGH_ERASED = """
    SELECT s.session_id FROM archiver.sessions s
     WHERE (s.reconcile_at IS NOT NULL OR s.reason <> 'erased')
       AND EXISTS (SELECT FROM archiver.erasures e WHERE e.session_id = s.session_id AND e.session_id <> '')
"""


def register(engine: Engine, session_id: str, minute: float) -> Outcome:
    published = responses.register({"id": session_id, "name": "x"})
    delivery = Delivery(published, NOW + timedelta(minutes=minute), None, source=responses.APPLICATION)
    with transaction(engine) as connection:
        return store(connection, [delivery], TIMING)[0]


def test_i8_a_redelivered_turn_without_its_erased_session_does_not_schedule_the_session(engine: Engine) -> None:
    record(engine, created("c3", "s1"))
    erase(engine, Target("s1", "c3"))
    record(engine, created("c1", "s1"), minute=1)
    again = created("c1", None, output="said later", updatedAt="2024-01-15T09:40:00Z")
    assert record(engine, again, minute=2)[0].status == "stored"
    assert texts(engine, "s1") == ["question of c1", "said later"]
    assert rows(engine, SCHEDULED_THOUGH_ERASED) == []
    assert is_rebuilt_the_same(engine)


def test_i8_in_one_batch_with_facts_of_other_sessions_neither(engine: Engine) -> None:
    record(engine, created("c3", "s1"), created("c1", "s1"), created("c1", "s2"))
    erase(engine, Target("s1", "c3"))
    record(engine, deleted("c1", None), created("c9", "s9"), created("c1", "s2", status="failed"), minute=2)
    assert rows(engine, SCHEDULED_THOUGH_ERASED) == []
    due = rows(engine, "SELECT session_id FROM archiver.sessions WHERE reconcile_at IS NOT NULL ORDER BY 1")
    assert due == [("s2",), ("s9",)]
    assert is_rebuilt_the_same(engine)


def test_i8_a_quarantined_delivery_that_is_retried_does_not_schedule_an_erased_session(engine: Engine) -> None:
    record(engine, created("c3", "s1"), created("c1", "s1"))
    erase(engine, Target("s1", "c3"))
    with transaction(engine) as connection:
        body = deleted("c1", None)
        (row_id,) = quarantine.upsert_quarantine(
            connection, [Delivery(events.parse(body), NOW + timedelta(hours=1), None)], "not_storable"
        )
    outcome = retry_quarantined(engine, row_id)
    assert outcome is not None
    assert outcome.status == "stored"
    assert rows(engine, SCHEDULED_THOUGH_ERASED) == []
    assert is_rebuilt_the_same(engine)


def test_i8_a_reading_that_fails_while_its_session_is_erased_does_not_schedule_it(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    lease = NOW + timedelta(minutes=1)
    with transaction(engine) as connection:
        assert leases.claim(connection, ["s1"], NOW, lease).keys() == {"s1"}
    erase(engine, Target("s1", "c1"))
    with transaction(engine) as connection:
        leases.postpone(connection, "s1", lease, until=NOW + timedelta(minutes=5), failing_since=NOW)
    assert rows(engine, SCHEDULED_THOUGH_ERASED) == []


def test_i8_an_ordered_erasure_ends_the_schedule_though_nothing_of_it_can_go(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    erasure.order(engine, [Target("s1", "of another copy"), Target("s2")], "request", ACT)
    hold(engine, session_id="s2")
    sweep(engine)
    assert rows(engine, SCHEDULED_THOUGH_ERASED) == []
    assert texts(engine, "s2") == ["question of c2", "answer to c2"]
    assert is_rebuilt_the_same(engine)


CHATS = range(5)  # of two sessions
_chats = st.sampled_from(CHATS)
_steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["tell", "revise", "delete"]), _chats, st.booleans()),
        st.tuples(st.sampled_from(["read", "erase session", "sweep", "register"]), _chats, st.just(True)),
        st.tuples(st.sampled_from(["erase", "order", "break"]), _chats, st.just(True)),
    ),
    max_size=25,
)


class ErasureScenario:
    """What was told, and what was erased of it, step by step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.delivered: set[int] = set()  # and taken
        self.placed: set[int] = set()  # their session was told, be it taken or not
        self.erased: set[int] = set()
        self.unknowable: set[int] = set()  # erased when only a history had told their words
        self.closed: set[int] = set()  # sessions
        self.minute = 0

    def apply(self, step: tuple[str, int, bool]) -> None:
        what, chat_number, has_session = step
        self.minute += 1
        chat_id, session = f"c{chat_number}", chat_number % 2
        session_id = f"s{session}" if has_session else None
        is_gone = chat_number in self.erased or session in self.closed
        if what in ("tell", "revise", "delete"):
            texts: dict[str, Any] = {"input": words(chat_number), "output": words(chat_number, what)}
            body = deleted(chat_id, session_id) if what == "delete" else created(chat_id, session_id, **texts)
            (outcome,) = record(self.engine, body, minute=self.minute)
            # Without a session it may not be known yet whose it is.
            if is_gone and (has_session or chat_number in self.erased):
                assert outcome.reason == "erased"
            if outcome.reason != "erased" and what != "delete":
                self.delivered.add(chat_number)
            self.placed |= {chat_number} if has_session else set()
        elif what == "read":
            seen = [each for each in CHATS if each % 2 == session and each in self.placed]
            lines = [line for each in seen for line in (("user", words(each)), ("assistant", words(each, "tell")))]
            read(self.engine, f"s{session}", self.minute, *lines)
        elif what == "break":
            record(self.engine, b'{"chat": "%s", "input": "%s"' % (chat_id.encode(), words(chat_number).encode()))
        elif what == "sweep":
            sweep(self.engine)
        elif what == "register":
            register(self.engine, f"s{session}", self.minute)
        else:
            self.erase(what, chat_number)
        assert rows(self.engine, SCHEDULED_THOUGH_ERASED) == []

    def erase(self, what: str, chat_number: int) -> None:
        with transaction(self.engine) as connection:
            result = [Target(f"s{chat_number % 2}")]
            if what != "erase session":
                result = sorted(of_chats(connection, [f"c{chat_number}"]))
        erasure.order(self.engine, result, "request", ACT)
        if what == "erase session":
            self.closed.add(chat_number % 2)
        else:
            self.erased.add(chat_number)
            self.unknowable |= {chat_number} - self.delivered
        with transaction(self.engine) as connection:
            delete_matches(connection, select_matches(connection, result))
        if what != "order":
            sweep(self.engine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_steps)
@example([("delete", 0, True), ("read", 0, True), ("tell", 0, False), ("erase", 0, True)])
@example([("tell", 3, True), ("erase", 3, True), ("tell", 1, True), ("tell", 1, False)])
@example([("tell", 0, True), ("tell", 2, True), ("erase", 0, True), ("tell", 2, False)])
@example([("tell", 0, True), ("tell", 2, False), ("erase", 0, True), ("tell", 2, True), ("delete", 2, False)])
def test_i8_erased_content_stays_erased_and_the_rest_stays_in_any_order_of_steps(
    engine: Engine, steps: list[tuple[str, int, bool]]
) -> None:
    empty(engine, "messages", "chats", "sessions", "events", "quarantine", "erasures", "acts")
    scenario = ErasureScenario(engine)
    for step in steps:
        scenario.apply(step)
    sweep(engine)
    ledger_and_archive = b"".join(dump_of(engine, f"archiver.{name}") for name in ("events", "messages", "chats"))
    for number in CHATS:
        marker = words(number).encode()
        is_there = marker in ledger_and_archive or marker.hex().encode() in ledger_and_archive
        is_closed = number % 2 in scenario.closed and number in scenario.placed
        if is_closed or number in scenario.erased - scenario.unknowable:
            assert not is_there
        elif number in scenario.delivered - scenario.erased and number % 2 not in scenario.closed:
            assert is_there
    assert is_rebuilt_the_same(engine)
