"""Full-text search: what it finds, in which order, behind the feed; and what an erasure leaves of it."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, ProgrammingError

from archiver import database, settings
from archiver.archive import search
from archiver.archive.rebuild import rebuild
from archiver.archive.search import Item
from archiver.compliance.erasure import Target
from archiver.database import Lock, is_lock_timeout, roles, run, transaction
from archiver.operations import heartbeats
from archiver.operations.doctor import examine_database
from archiver.settings import SettingsError
from archiver.telemetry import duty_health
from archiver.telemetry.duty_health import Duty
from archiver.worker import indexing
from archiver.worker.indexing import UNUSED_SECONDS, Indexing
from tests.support.erasures import TIMING, as_writer, erase, read, record, said
from tests.support.feeds import publish
from tests.support.payloads import created, deleted
from tests.support.rows import empty, execute, rows
from tests.support.searching import found, index, keys, lexemes, matches
from tests.support.slowness import holding
from tests.support.versions import on_one_version
from tests.support.waiting import until

START = datetime(2025, 10, 5, 9, 0, tzinfo=UTC)


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).isoformat()


def turn(number: int, session_id: str | None = "session-1", minutes: float | None = None, **fields: Any) -> bytes:
    began = at(number if minutes is None else minutes)
    return created(f"chat-{number}", session_id, createdAt=began, updatedAt=began, **fields)


@pytest.fixture
def searched(engine: Engine) -> Engine:
    index(engine, "simple")
    return engine


def test_a_search_finds_a_message_and_highlights_its_words(searched: Engine) -> None:
    record(searched, turn(1, input="Please cancel my invoice"), turn(2))
    index(searched)
    assert found(searched, "cancel invoice") == [
        ("session-1", "chat-1", 0, "user", START + timedelta(minutes=1), "Please **cancel** my **invoice**")
    ]


def test_a_message_known_only_from_history_is_found_by_its_turn(searched: Engine) -> None:
    record(searched, turn(1))
    read(searched, "session-1", 5, ("assistant", "welcome aboard"), *said("chat-1"), ("user", "anything else"))
    index(searched)
    assert keys(searched, "welcome") == [("session-1", "session-1#0", 0)] == matches(searched, "welcome")
    assert keys(searched, "anything") == matches(searched, "anything")
    assert len(keys(searched, "anything")) == 1


def test_messages_from_before_the_index_are_found(engine: Engine) -> None:
    record(engine, *(turn(number, f"session-{number % 3}") for number in range(20)), turn(30, None))
    assert rows(engine, "SELECT count(*) FROM archiver.search") == [(0,)]
    index(engine, "simple")
    assert sorted(keys(engine, "question")) == matches(engine, "question")
    assert len(keys(engine, "question")) == 21


def test_a_turn_without_a_session_is_found_once_when_its_session_is_known(searched: Engine) -> None:
    record(searched, turn(1, None))
    index(searched)
    assert keys(searched, "question") == [("", "chat-1", 0)]
    record(searched, turn(1))
    index(searched)
    assert keys(searched, "question") == [("session-1", "chat-1", 0)]


def test_a_revision_replaces_the_words_and_a_deleted_turn_is_still_found(searched: Engine) -> None:
    record(searched, turn(1, input="first words"))
    index(searched)
    record(searched, turn(1, input="second words", status="revised"), minute=1)
    index(searched)
    assert keys(searched, "first") == []
    assert keys(searched, "second") == [("session-1", "chat-1", 0)]
    record(searched, deleted(), minute=2)
    index(searched)
    assert keys(searched, "second") == [("session-1", "chat-1", 0)]


def test_filters_by_time_and_assistant(searched: Engine) -> None:
    record(searched, turn(1), turn(2, assistantId="assistant-2"), turn(3))
    index(searched)
    assert [key[1] for key in keys(searched, "question")] == ["chat-3", "chat-2", "chat-1"]
    assert [key[1] for key in keys(searched, "question", since=at(2))] == ["chat-3", "chat-2"]
    assert [key[1] for key in keys(searched, "question", until=at(2))] == ["chat-1"]
    assert [key[1] for key in keys(searched, "question", assistant_id="assistant-2")] == ["chat-2"]


def test_a_turn_without_an_assistant_belongs_to_those_of_its_conversation(searched: Engine) -> None:
    record(searched, turn(1), turn(2, "session-2", assistantId="assistant-2"))
    for number in (1, 2):
        read(searched, f"session-{number}", 5, *said(f"chat-{number}"), ("user", "nothing else"))
    index(searched)
    assert [key[0] for key in keys(searched, "nothing", assistant_id="assistant-2")] == ["session-2"]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_pages_have_no_gap_and_no_message_twice(searched: Engine, most: int) -> None:
    # Several months, of which three have no partition, and several turns at the same time.
    minutes = [0, 0, 0, 1, 1, 50_000, 50_000, 50_001, 100_000, -100_000, -4_000_000, -4_000_000]
    bodies = [turn(number, f"session-{number % 2}", minute) for number, minute in enumerate(minutes)]
    record(searched, *bodies[:7])
    index(searched)
    record(searched, *bodies[7:])
    with without_new_partitions(searched):
        index(searched)
    before, pages = None, list[list[tuple[Any, ...]]]()
    while page := found(searched, "question", most=most, before=before):
        pages.append(page)
        before = page[-1][4]
    seen = [row for page in pages for row in page]
    assert sorted((row[0], row[1], row[2]) for row in seen) == matches(searched, "question")
    assert [row[4] for row in seen] == sorted((row[4] for row in seen), reverse=True)
    assert all(len(page) >= most for page in pages[:-1])
    assert len(pages) > 1


def test_a_backlog_and_a_stream_of_changes_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHANGES_PER_PAGE", 2)
    monkeypatch.setattr(search, "TURNS_PER_PAGE", 2)
    record(engine, *(turn(number, "session-1", input="old") for number in range(6)))
    index(engine, "simple", steps=0)
    record(engine, *(turn(number, "session-2", input="new") for number in range(10, 16)))
    index(engine, steps=2)
    assert len(keys(engine, "old")) == len(keys(engine, "new")) == 2
    index(engine, steps=2)
    assert len(keys(engine, "old")) == len(keys(engine, "new")) == 4
    index(engine)
    assert len(keys(engine, "old")) == len(keys(engine, "new")) == 6


def items_of_next_page(engine: Engine) -> Sequence[Item]:
    publish(engine)
    with transaction(engine) as connection:
        page = search.select_page(connection)
    return page.items if page else []


def test_a_turn_that_changes_alone_is_indexed_alone_also_after_a_reading(searched: Engine) -> None:
    record(searched, turn(1), turn(2))
    read(searched, "session-1", 5, *said("chat-1", "chat-2"))
    index(searched)
    record(searched, turn(30), minute=30)  # appended
    assert items_of_next_page(searched) == [Item("session-1", "chat-30")]
    index(searched)
    assert len(keys(searched, "question")) == 3
    # A turn that belongs before others may change their rows.
    record(searched, turn(0), minute=31)
    assert items_of_next_page(searched) == [Item("session-1", None)]
    index(searched)
    assert sorted(keys(searched, "question")) == matches(searched, "question")


def test_a_turn_whose_session_becomes_known_after_a_reading_leaves_no_row(searched: Engine) -> None:
    record(searched, turn(1), turn(2, None, input="markerone"))
    index(searched)
    read(searched, "session-1", 5, *said("chat-1"))
    index(searched)
    record(searched, turn(2, "session-1", input="markerone"), minute=6)
    index(searched)
    assert keys(searched, "markerone") == [("session-1", "chat-2", 0)]
    query = "SELECT session_id, chat_id, ordinal FROM archiver.search WHERE chat_id = 'chat-2' ORDER BY 3"
    assert rows(searched, query) == [("session-1", "chat-2", 0), ("session-1", "chat-2", 1)]


@contextmanager
def without_new_partitions(engine: Engine) -> Iterator[None]:
    """While a reader holds a lock for longer than a worker waits."""
    with engine.connect() as reader:
        reader.exec_driver_sql("SELECT FROM archiver_search.other")
        yield


def partitions(engine: Engine) -> list[tuple[str, int]]:
    return rows(engine, "SELECT tableoid::regclass::text, count(*) FROM archiver.search GROUP BY 1 ORDER BY 1")


def test_each_month_has_a_partition(searched: Engine) -> None:
    record(searched, turn(1, minutes=0), turn(2, minutes=50_000))
    index(searched)
    assert partitions(searched) == [("archiver_search.y2025m10", 2), ("archiver_search.y2025m11", 2)]


def test_a_month_whose_partition_cannot_be_added_is_indexed_and_gets_it_later(searched: Engine) -> None:
    record(searched, turn(1))
    with without_new_partitions(searched):
        index(searched)
    assert partitions(searched) == [("archiver_search.other", 2)]
    assert sorted(keys(searched, "question")) == matches(searched, "question")
    record(searched, turn(2))
    index(searched)
    assert partitions(searched) == [("archiver_search.y2025m10", 4)]
    assert sorted(keys(searched, "question")) == matches(searched, "question")


def test_a_late_webhook_takes_over_the_rows_of_the_history(searched: Engine) -> None:
    record(searched, turn(1), turn(3))
    read(searched, "session-1", 5, *said("chat-1", "chat-2", "chat-3"))
    index(searched)
    assert [key[1] for key in keys(searched, "question")][1] == "session-1#3"
    record(searched, turn(2), minute=10)
    index(searched)
    assert [key[1] for key in keys(searched, "question")] == ["chat-3", "chat-2", "chat-1"]
    assert rows(searched, "SELECT count(*) FROM archiver.search WHERE starts_with(chat_id, E'\\x1f')") == [(0,)]


# Erasure


def test_i8_no_word_of_an_erased_conversation_remains(searched: Engine) -> None:
    record(searched, turn(1, input="markerone"), turn(2, "session-2", input="markertwo"))
    index(searched)
    (before,) = rows(searched, "SELECT oid, relfilenode FROM pg_class WHERE relname = 'y2025m10'")
    erase(searched, Target("session-1"))
    assert lexemes(searched) & {"markerone", "markertwo"} == {"markertwo"}
    index(searched)
    assert keys(searched, "markerone") == []
    assert keys(searched, "markertwo") == [("session-2", "chat-2", 0)]
    # The files, also the index, are new ones that never contained the words.
    assert rows(searched, "SELECT oid, relfilenode FROM pg_class WHERE relname = 'y2025m10'") != [before]
    assert rows(searched, "SELECT name FROM archiver.search_partitions WHERE stale_at IS NOT NULL") == []
    assert pages_of_index(searched, b"markerone") == 0
    assert pages_of_index(searched, b"markertwo") > 0


def pages_of_index(engine: Engine, word: bytes) -> int:
    """How often the file of the month and that of its index contain a word."""
    files = rows(
        engine,
        "SELECT pg_relation_filepath(oid) FROM pg_class WHERE relname = 'y2025m10' UNION ALL SELECT"
        " pg_relation_filepath(indexrelid) FROM pg_index WHERE indrelid = 'archiver_search.y2025m10'::regclass",
    )
    execute(engine, "CHECKPOINT")
    return sum(bytes(rows(engine, f"SELECT pg_read_binary_file('{name}')")[0][0]).count(word) for (name,) in files)


def test_i8_no_word_of_an_erased_turn_remains_though_its_conversation_does(searched: Engine) -> None:
    record(searched, turn(1, input="markerone"), turn(2))
    index(searched)
    erase(searched, Target("session-1", "chat-1"))
    assert "markerone" not in lexemes(searched)
    assert keys(searched, "question") == [("session-1", "chat-2", 0)]


def test_i8_an_erased_turn_without_a_session_is_not_found(searched: Engine) -> None:
    record(searched, turn(1, None, input="markerone"))
    index(searched)
    erase(searched, Target.unassigned("chat-1"))
    assert "markerone" not in lexemes(searched)


def test_i8_words_of_an_earlier_revision_go_with_the_erasure(searched: Engine) -> None:
    record(searched, turn(1, input="markerone"))
    index(searched)
    record(searched, turn(1, input="markertwo", status="revised"), minute=1)
    index(searched)
    erase(searched, Target("session-1"))
    index(searched)
    assert pages_of_index(searched, b"markerone") == pages_of_index(searched, b"markertwo") == 0


def test_a_rebuild_keeps_what_is_written_and_deleted_while_it_runs(
    searched: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(searched, turn(1, input="markerone"), turn(2, "session-2"), turn(3, "session-2"))
    index(searched)
    execute(searched, "UPDATE archiver.search_partitions SET stale_at = clock_timestamp() WHERE name = 'y2025m10'")
    record(searched, turn(2, "session-2", input="revised question", status="revised"), turn(4), minute=1)
    publish(searched)
    with ThreadPoolExecutor(1) as pool:
        with transaction(searched) as connection:
            Lock.INDEXING.take(connection, exclusive=True)
            rebuilding = pool.submit(run, searched, partial(search.rebuild, name="y2025m10"), lock_seconds=60)
            until(lambda: is_waiting(searched), "the other session waits")
            # The rows are copied. Now some of them change, and some are erased.
            page = search.select_page(connection)
            assert page is not None
            assert search.index_page(connection, page) == (3, 0)
            connection.exec_driver_sql("DELETE FROM archiver.messages WHERE chat_id = 'chat-1'")
            search.delete_obsolete(connection, [Item("session-1", None)])
        assert rebuilding.result(60)
    assert sorted(keys(searched, "question")) == matches(searched, "question")
    assert len(keys(searched, "question")) == 3
    assert "markerone" not in lexemes(searched)
    # What was erased in the meantime is in the copy: it is rebuilt once more.
    monkeypatch.setattr(search, "REBUILD_PAUSE_SECONDS", 0.0)
    index(searched)
    assert pages_of_index(searched, b"markerone") == 0
    assert sorted(keys(searched, "question")) == matches(searched, "question")
    assert rows(
        searched,
        "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid"
        " WHERE c.relname = 'y2025m10' AND i.indisvalid",
    ) == [(2,)]


def test_a_partition_that_cannot_be_rewritten_delays_no_other(
    searched: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "EXCHANGE_LOCK_SECONDS", 0.1)
    monkeypatch.setattr(indexing, "EXCHANGE_PAUSE_SECONDS", 0.0)
    record(searched, turn(1, input="markerone"), turn(2, "session-2", 50_000, input="markertwo"))
    index(searched)
    erase(searched, Target("session-1"))
    erase(searched, Target("session-2"))
    stale = "SELECT name FROM archiver.search_partitions WHERE stale_at IS NOT NULL ORDER BY 1"
    assert rows(searched, stale) == [("y2025m10",), ("y2025m11",)]
    with holding(searched, "SELECT FROM archiver_search.y2025m10"):
        for _ in range(2):
            execute(searched, "DELETE FROM archiver.duties")
            index(searched)
        assert rows(searched, stale) == [("y2025m10",)]
    monkeypatch.setattr(search, "FAILED_PAUSE_SECONDS", 0.0)
    execute(searched, "DELETE FROM archiver.duties")
    index(searched)
    assert rows(searched, stale) == []


def test_only_the_exchange_waits_for_readers(searched: Engine) -> None:
    record(searched, turn(1), turn(2, "session-2"))
    index(searched)
    execute(searched, "UPDATE archiver.search_partitions SET stale_at = clock_timestamp() WHERE name = 'y2025m10'")
    work = partial(search.rebuild, name="y2025m10", attempts=1_000, pause=0.01)
    with ThreadPoolExecutor(1) as pool:
        with holding(searched, "SELECT FROM analytics.search('question')"):
            rebuilding = pool.submit(run, searched, work, lock_seconds=0.05)
            failed = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            until(lambda: rows(searched, failed) == [(1,)], "it pauses between two attempts")
            # Others write and search in the pauses.
            record(searched, turn(3, "session-3"))
            publish(searched)
            with transaction(searched) as connection:
                page = search.select_page(connection)
            assert page is not None
            assert run(searched, partial(search.index_page, page=page)) == (2, 0)
            assert len(keys(searched, "question")) == 3
        assert rebuilding.result(60)
    assert len(keys(searched, "question")) == 3


def test_the_index_does_not_restart_while_a_partition_is_rewritten(searched: Engine) -> None:
    record(searched, turn(1))
    index(searched)
    execute(searched, "UPDATE archiver.search_partitions SET stale_at = clock_timestamp() WHERE name = 'y2025m10'")
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%rebuild_search%'"
    with ThreadPoolExecutor(1) as pool:
        with holding(searched, "CREATE TABLE archiver_search.copy ()"):
            rebuilding = pool.submit(run, searched, partial(search.rebuild, name="y2025m10"), lock_seconds=60)
            until(lambda: rows(searched, blocked) == [(1,)], "it is under way")
            with pytest.raises(DBAPIError) as refused:
                run(searched, search.switch_off, lock_seconds=0.2)
            assert is_lock_timeout(refused.value)
            # It keeps no lock that the other one needs.
            with transaction(searched, lock_seconds=1) as connection:
                Lock.INDEXING.take(connection, exclusive=True)
        assert rebuilding.result(60)
    run(searched, search.switch_off)
    assert lexemes(searched) == set()


def is_waiting(engine: Engine) -> bool:
    return rows(
        engine,
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'archiver_jobs.lock_indexing'::regclass",
    ) == [(1,)]


def test_i8_an_erasure_waits_for_the_page_that_is_being_written(searched: Engine) -> None:
    record(searched, turn(1, input="markerone"))
    publish(searched)
    with ThreadPoolExecutor(1) as pool:
        with transaction(searched) as connection:
            page = search.select_page(connection)
            assert page is not None
            assert search.index_page(connection, page) == (2, 0)
            erasing = pool.submit(erase, searched, Target("session-1"))
            until(lambda: is_waiting(searched), "the other session waits")
        erasing.result(60)
    assert lexemes(searched) == set()


def test_i8_a_page_read_before_an_erasure_does_not_bring_its_words_back(searched: Engine) -> None:
    record(searched, turn(1, input="markerone"), turn(2, "session-2"))
    publish(searched)
    with transaction(searched) as connection:
        page = search.select_page(connection)
    assert page is not None
    erase(searched, Target("session-1"))
    assert run(searched, partial(search.index_page, page=page)) == (2, 0)
    assert keys(searched, "question") == [("session-2", "chat-2", 0)]
    assert "markerone" not in lexemes(searched)


# Interruptions


def test_a_worker_continues_where_another_was_killed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHANGES_PER_PAGE", 2)
    monkeypatch.setattr(search, "TURNS_PER_PAGE", 2)
    record(engine, *(turn(number, f"session-{number % 2}") for number in range(7)))
    index(engine, "simple", steps=2)
    assert 0 < len(keys(engine, "question")) < 7
    record(engine, *(turn(number, f"session-{number % 2}") for number in range(7, 12)))
    index(engine, steps=1)
    publish(engine)
    with engine.connect() as killed:  # in the middle of a page: its connection ends without a commit
        page = search.select_page(killed)
        assert page is not None
        assert search.index_page(killed, page) is not None
    index(engine)
    assert sorted(keys(engine, "question")) == matches(engine, "question")
    assert len(keys(engine, "question")) == 12


def test_two_workers_index_each_page_once(searched: Engine) -> None:
    record(searched, turn(1))
    publish(searched)
    with transaction(searched) as connection:
        page = search.select_page(connection)
    assert page is not None
    assert run(searched, partial(search.index_page, page=page)) == (2, 0)
    assert run(searched, partial(search.index_page, page=page)) is None
    assert rows(searched, "SELECT count(*) FROM archiver.search") == [(2,)]


def test_changes_that_the_feed_no_longer_has_are_indexed_again(searched: Engine) -> None:
    record(searched, *(turn(number) for number in range(3)))
    index(searched, steps=0)
    execute(searched, "DELETE FROM archiver.changes WHERE cursor < (SELECT max(cursor) FROM archiver.changes)")
    index(searched)
    assert sorted(keys(searched, "question")) == matches(searched, "question")
    assert len(keys(searched, "question")) == 3


# Any history

WORDS = ("alpha", "beta", "gamma")
_numbers, _minutes = st.integers(0, 4), st.integers(0, 90_000)
_steps = st.one_of(
    st.tuples(st.just("turn"), _numbers, st.sampled_from(["s1", "s2", None]), _minutes, st.sampled_from(WORDS)),
    st.tuples(st.just("delete"), _numbers),
    st.tuples(st.just("read"), st.sampled_from(["s1", "s2"]), st.lists(st.sampled_from(WORDS), max_size=3)),
    st.tuples(st.just("erase"), st.sampled_from([("s1", ""), ("s2", "chat-1"), ("s1", "chat-2"), ("", "chat-3")])),
    st.tuples(st.just("rebuild")),
    st.tuples(st.just("index")),
)


@on_one_version
def test_i8_after_any_history_a_search_equals_a_search_without_index(engine: Engine) -> None:
    @hypothesis_settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(st.lists(_steps, min_size=3, max_size=10))
    def check(steps: Sequence[tuple[Any, ...]]) -> None:
        empty(engine, "events", "erasures", "messages", "chats", "sessions", "search")
        index(engine, "english")
        index(engine, "simple")
        for minute, step in enumerate(steps):
            act(engine, minute, *step)
            assert lexemes(engine) <= known_words(engine) or step[0] not in {"erase", "index"}, step
        index(engine)
        for word in ("question", "answer", *WORDS):
            assert sorted(keys(engine, word)) == matches(engine, word), word
        assert lexemes(engine) == known_words(engine)

    check()


def act(engine: Engine, minute: int, kind: str, *values: Any) -> None:
    if kind == "turn":
        number, session_id, began, word = values
        record(engine, turn(number, session_id, began, input=f"{word} question", status=str(minute)), minute=minute)
    elif kind == "delete":
        record(engine, deleted(f"chat-{values[0]}", "s1"), minute=minute)
    elif kind == "read":
        read(engine, values[0], minute, *(("user", word) for word in values[1]))
    elif kind == "erase":
        erase(engine, Target(*values[0]))
    elif kind == "rebuild":
        list(rebuild(engine, TIMING))
    else:
        index(engine)


def known_words(engine: Engine) -> set[str]:
    query = "SELECT word FROM ts_stat('SELECT to_tsvector(''simple'', content) FROM analytics.messages')"
    return {row[0] for row in rows(engine, query)}


# Limits


def test_a_very_long_message_is_indexed_up_to_a_limit(searched: Engine) -> None:
    long = "first " + " ".join(f"w{number:x}" for number in range(200_000)) + " last"
    record(searched, turn(1, input=long), turn(2))
    index(searched)
    assert keys(searched, "first") == [("session-1", "chat-1", 0)]
    assert keys(searched, "last") == []
    assert keys(searched, "question") == [("session-1", "chat-2", 0)]


def test_a_message_that_cannot_be_indexed_is_skipped_alone(searched: Engine) -> None:
    # A check stands for a text on which Postgres fails or takes too long.
    record(searched, turn(0, "session-0"))
    index(searched)
    execute(searched, "ALTER TABLE archiver.search ADD CONSTRAINT no_such CHECK (chat_id <> 'chat-3')")
    record(searched, *(turn(number, f"session-{number}") for number in range(1, 8)))
    index(searched)
    assert len(keys(searched, "question")) == 7
    assert "chat-3" not in [key[1] for key in keys(searched, "question")]


def test_a_text_on_which_postgres_takes_too_long_is_skipped_alone(
    searched: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "PAGE_SECONDS", 1.0)
    monkeypatch.setattr(indexing, "ITEM_SECONDS", 1.0)
    # The parser of Postgres takes minutes for this.
    record(searched, turn(1, input="a_" * 50_000), turn(2), turn(3, "session-2"))
    index(searched)
    assert sorted(keys(searched, "question")) == [("session-1", "chat-2", 0), ("session-2", "chat-3", 0)]
    read(searched, "session-1", 5, *said("chat-2"), ("user", "the last question"))
    index(searched)
    assert len(keys(searched, "question")) == 3


@pytest.mark.parametrize("most", [0, 1001])
def test_the_number_of_results_is_limited(searched: Engine, most: int) -> None:
    with pytest.raises(DBAPIError, match="between 1 and 1000"):
        found(searched, "question", most=most)


@pytest.mark.parametrize("query", ["", "   ", "'", "a' OR 1=1 --", '"', "-", "!!! & |", "<->"])
def test_any_text_is_a_query(searched: Engine, query: str) -> None:
    record(searched, turn(1))
    index(searched)
    assert found(searched, query) == []


# Settings


def test_the_language_decides_which_words_are_equal_and_a_change_indexes_again(searched: Engine) -> None:
    record(searched, turn(1, input="cancelling invoices"))
    index(searched)
    assert keys(searched, "cancel invoice") == []
    index(searched, "english")
    assert keys(searched, "cancel invoice") == [("session-1", "chat-1", 0)]
    index(searched, "pg_catalog.simple")
    assert keys(searched, "cancel invoice") == []


def test_a_worker_with_another_language_does_not_index_again(
    searched: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    record(searched, turn(1, input="cancelling invoices"))
    index(searched)
    before = rows(searched, "SELECT * FROM archiver.search_state")

    async def switch_on() -> None:
        asynchronous = database.connect_async(searched.url, pool_size=1)
        await Indexing(asynchronous, Duty("search")).switch_on("english")
        await asynchronous.dispose()

    asyncio.run(switch_on())
    assert rows(searched, "SELECT * FROM archiver.search_state") == before
    printed = capsys.readouterr()
    assert "search index in another language" in printed.out + printed.err


def test_a_reader_may_search_and_not_read_the_index(searched: Engine) -> None:
    record(searched, turn(1))
    index(searched)
    with searched.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles.READER}")
        assert connection.exec_driver_sql("SELECT count(*) FROM analytics.search('question')").scalar() == 1
        with pytest.raises(ProgrammingError, match="permission denied"):
            connection.exec_driver_sql("SELECT * FROM archiver.search")


def test_without_an_index_a_search_says_so(engine: Engine) -> None:
    with pytest.raises(DBAPIError, match="search is off"):
        found(engine, "question")


def test_the_role_of_the_worker_suffices_for_everything(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "REBUILD_PAUSE_SECONDS", 0.0)
    with as_writer(database_url) as writer:
        index(engine, "simple", role=roles.WRITER)
        record(writer, turn(1, input="markerone"), turn(2, "session-2"))
        index(engine, role=roles.WRITER)
        erase(writer, Target("session-1"))
        index(engine, role=roles.WRITER)
        assert rows(engine, "SELECT name FROM archiver.search_partitions WHERE stale_at IS NOT NULL") == []
        assert keys(writer, "question") == [("session-2", "chat-2", 0)]
    index(engine, "english", role=roles.WRITER)
    assert keys(engine, "questions") == [("session-2", "chat-2", 0)]


def test_switched_off_it_keeps_no_word(searched: Engine) -> None:
    record(searched, turn(1))
    index(searched)
    run(searched, search.switch_off)
    record(searched, turn(2))
    index(searched)
    assert lexemes(searched) == set()
    with pytest.raises(DBAPIError, match="search is off"):
        found(searched, "question")
    index(searched, "simple")
    assert sorted(keys(searched, "question")) == matches(searched, "question")


def test_a_worker_with_search_off_deletes_no_index_that_another_keeps(
    searched: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(searched, turn(1))
    index(searched)
    other = heartbeats.Process("other", host="elsewhere", pid=7)

    def report(state: duty_health.State) -> None:
        with transaction(searched) as connection:
            heartbeats.upsert_worker(connection, other, {"search": duty_health.Report(state, datetime.now(UTC))})

    def findings(value: str) -> list[str]:
        monkeypatch.setenv("ARCHIVER_SEARCH", value)
        found = examine_database(settings.read(), searched)
        return [each.detail for each in found if each.check == "search" and each.verdict == "warning"]

    async def run() -> None:
        engine = database.connect_async(searched.url, pool_size=1)
        off, on = Indexing(engine, Duty("search")), Indexing(engine, Duty("search"))
        report("running")
        for seconds in (0, 100, 200):
            assert not await off.switch_off_unused(seconds)
        assert findings("on") == []
        assert "on for the worker elsewhere:7" in findings("off")[0]
        report("off")  # as after its restart with the same setting
        assert "off for the worker elsewhere:7" in findings("on")[0]
        assert not await off.switch_off_unused(200 + UNUSED_SECONDS / 2)
        assert keys(searched, "question") != []
        assert await off.switch_off_unused(200 + UNUSED_SECONDS)
        assert lexemes(searched) == set()
        await on.restart_if_deleted("simple")  # it had started just before
        await engine.dispose()

    asyncio.run(run())
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("search index kept for another worker") == 1
    index(searched)
    assert keys(searched, "question") != []


def test_an_unknown_language_is_an_error_that_says_where_the_names_are(searched: Engine) -> None:
    with pytest.raises(SettingsError, match=r"ARCHIVER_SEARCH_LANGUAGE.*'klingon'.*pg_ts_config"):
        index(searched, "klingon")


def test_doctor_names_an_unknown_language_and_a_late_index(searched: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(**values: str) -> list[tuple[str, str]]:
        with monkeypatch.context() as environment:
            for name, value in values.items():
                environment.setenv(name, value)
            configuration = settings.read()
        found = examine_database(configuration, searched)
        return [(each.verdict, each.detail) for each in found if each.check == "search"]

    assert findings() == [("ok", "The search index follows the archive.")]
    ((verdict, detail),) = findings(ARCHIVER_SEARCH_LANGUAGE="klingon")
    assert (verdict, "'klingon'" in detail) == ("failure", True)
    assert findings(ARCHIVER_SEARCH="off") == []
    ((verdict, detail), _) = findings(ARCHIVER_SEARCH_LANGUAGE="english")
    assert (verdict, "started with 'pg_catalog.simple'" in detail) == ("warning", True)
    record(searched, turn(1))
    publish(searched)
    execute(searched, "UPDATE archiver.changes SET changed_at = '2026-01-01Z'")
    ((verdict, detail),) = findings()
    assert (verdict, "since 2026-01-01" in detail) == ("warning", True)


def test_doctor_names_a_partition_with_erased_words_and_the_session_that_uses_the_index(searched: Engine) -> None:
    record(searched, turn(1))
    index(searched)
    execute(
        searched,
        "UPDATE archiver.search_partitions SET stale_at = now(), stale_since = '2026-01-01Z' WHERE name = 'y2025m10'",
    )

    def finding() -> tuple[str, str]:
        found = examine_database(settings.read(), searched)
        return next((each.detail, each.advice) for each in found if each.check == "search")

    detail, advice = finding()
    assert "archiver_search.y2025m10" in detail
    assert "since 2026-01-01 00:00:00" in detail
    assert "archiver worker" in advice
    with holding(searched, "SELECT FROM analytics.search('question')") as reader:
        pid = reader.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        detail, advice = finding()
        assert f"Process {pid} " in detail
        assert f"pg_terminate_backend({pid})" in advice
