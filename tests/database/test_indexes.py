"""Indexes of the archive: created while receivers write, again after an interruption, and used by analysts' plans."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from archiver import database
from archiver.database import catalogue, schema, transaction
from tests.support.analysts import measure
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version
from tests.support.waiting import until

NAMES = [
    "chats_began_at_idx",
    "chats_history_turn_id_idx",
    "chats_updated_at_idx",
    "sessions_first_event_at_idx",
    "sessions_incomplete_idx",
]
LISTED = ", ".join(f"'{name}'" for name in NAMES)
FOUND = (
    "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    f" WHERE c.relname IN ({LISTED}) ORDER BY 1"
)
VALID = [(name, True) for name in NAMES]


@pytest.fixture
def earlier(engine: Engine) -> Engine:
    """An archive in use that lacks the indexes."""
    record(engine, created("c1"), created("c2"))
    schema.downgrade(engine, "0022")
    assert rows(engine, FOUND) == []
    return engine


def test_an_upgrade_from_several_revisions_before_creates_them(engine: Engine) -> None:
    record(engine, created("c1"))
    schema.downgrade(engine, "0018")
    schema.upgrade(engine)
    assert rows(engine, FOUND) == VALID
    with transaction(engine) as connection:
        schema.check(connection)
        assert catalogue.select_differences(connection) == []


def test_an_index_whose_creation_was_interrupted_is_created_again(earlier: Engine) -> None:
    with earlier.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        for name in NAMES[:2]:
            with pytest.raises(SQLAlchemyError):  # its rows are not unique
                connection.execute(text(f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON archiver.chats (source)"))
    assert rows(earlier, FOUND) == [(name, False) for name in NAMES[:2]]
    schema.upgrade(earlier)
    assert rows(earlier, FOUND) == VALID
    with transaction(earlier) as connection:
        assert catalogue.select_differences(connection) == []


@contextmanager
def writing(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written to the tables and goes on."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE archiver.chats SET status = 'x' WHERE chat_id = 'c1'")
        connection.execute("UPDATE archiver.sessions SET status = 'x' WHERE session_id = 'none'")
        yield connection


def test_receivers_write_while_an_index_is_created(earlier: Engine, database_url: str) -> None:
    waiting = "SELECT FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND wait_event_type = 'Lock'"
    with writing(database_url) as transaction_in_use:
        migrating = threading.Thread(target=schema.upgrade, args=(earlier,))
        migrating.start()
        until(lambda: rows(earlier, waiting) != [], "the creation waits for the transaction")
        record(earlier, created("c3", "s3"), created("c4"))
        assert rows(earlier, waiting) != []
        transaction_in_use.commit()
        migrating.join()
    assert rows(earlier, FOUND) == VALID
    assert rows(earlier, "SELECT count(*) FROM archiver.chats") == [(4,)]


def test_an_old_transaction_is_named_and_the_next_migration_goes_on(
    earlier: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "INDEX_LOCK_SECONDS", 2)
    monkeypatch.setattr(schema, "LOCK_WAIT_SECONDS", 1.0)
    with writing(database_url) as holder, pytest.raises(schema.SchemaError, match=rf"{holder.info.backend_pid}\b"):
        schema.upgrade(earlier)
    assert [is_valid for _, is_valid in rows(earlier, FOUND)] == [False]
    schema.upgrade(earlier)
    assert rows(earlier, FOUND) == VALID


def test_two_migrations_at_once_create_each_index_once(earlier: Engine, database_url: str) -> None:
    other = database.connect(database.database_url(database_url))
    threads = [threading.Thread(target=schema.upgrade, args=(each,)) for each in (earlier, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.dispose()
    assert rows(earlier, FOUND) == VALID
    assert rows(earlier, "SELECT version_num FROM archiver.schema_version") == [(schema.head(),)]


# Plans

_FILL = [
    "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, coverage, reason)"
    " SELECT 's' || n, now() - n * interval '10 minutes', now(),"
    " CASE WHEN n % 500 = 0 THEN 'open' ELSE 'complete' END, 'agreed' FROM generate_series(1, 5000) n",
    # Every tenth turn is known only from history.
    "INSERT INTO archiver.chats (session_id, chat_id, source, first_received_at, created_at, updated_at, began_at)"
    " SELECT 's' || n / 4, CASE WHEN h THEN E'\\x1f' || n ELSE 'c' || n END,"
    " CASE WHEN h THEN 'history' ELSE 'webhook' END, at, CASE WHEN NOT h THEN at END, CASE WHEN NOT h THEN at END,"
    " CASE WHEN h THEN at END"
    " FROM (SELECT n, n % 10 = 0 AS h, now() - n * interval '150 s' AS at FROM generate_series(4, 20003) n) t",
    "INSERT INTO archiver.messages (session_id, chat_id, ordinal, role, content, source)"
    " SELECT session_id, chat_id, o, CASE o WHEN 0 THEN 'user' ELSE 'assistant' END, repeat('text ', 20), source"
    " FROM archiver.chats, generate_series(0, 1) o",
    "ANALYZE archiver.sessions, archiver.chats, archiver.messages",
]
_SINCE = "now() - interval '1 hour'"
QUESTIONS = {
    "turns of a window": (f"SELECT * FROM analytics.chats WHERE began_at >= {_SINCE}", {"chats_began_at_idx"}),
    "lines of a window": (
        f"SELECT * FROM analytics.lines WHERE began_at >= {_SINCE}",
        {"chats_began_at_idx", "messages_pkey"},
    ),
    "turn by chat id": ("SELECT * FROM analytics.chats WHERE chat_id = 'c77'", {"chats_chat_id_idx"}),
    "turn by its id": (
        "SELECT * FROM analytics.chats WHERE turn_id = 's7#30'",
        {"chats_chat_id_idx", "chats_history_turn_id_idx"},
    ),
    "lines of a turn": (
        "SELECT * FROM analytics.lines WHERE turn_id = 's7#30'",
        {"chats_chat_id_idx", "chats_history_turn_id_idx", "messages_pkey"},
    ),
    "transcript": ("SELECT * FROM analytics.transcript('s7')", {"messages_pkey", "chats_pkey"}),
    "extract by time": (
        f"SELECT * FROM analytics.chats WHERE updated_at > {_SINCE} ORDER BY updated_at LIMIT 10000",
        {"chats_updated_at_idx"},
    ),
    "deletions": (f"SELECT count(*) FROM analytics.chats WHERE deleted_at >= {_SINCE}", {"chats_deleted_at_idx"}),
    "coverage of a window": (
        f"SELECT state, count(*) FROM analytics.coverage WHERE first_event_at >= {_SINCE} GROUP BY 1",
        {"sessions_first_event_at_idx"},
    ),
    "complete through": (
        "SELECT min(coalesce(reconciled_at, first_event_at)) FROM analytics.coverage"
        " WHERE (state = 'open' OR next_reading_at IS NOT NULL) AND NOT (reason = 'history_gone' OR state = 'lost')",
        {"sessions_incomplete_idx"},
    ),
}


def test_questions_about_a_window_or_one_thing_read_through_indexes_alone(engine: Engine) -> None:
    execute(engine, *_FILL)
    for question, (query, indexes) in QUESTIONS.items():
        plan = str(rows(engine, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")[0][0])
        scanned = re.findall(r"'Node Type': 'Seq Scan'.*?'Relation Name': '(\w+)'", plan)
        assert {*scanned} <= {"erasures"}, (question, plan)
        assert {*re.findall(r"'Index Name': '(\w+)'", plan)} >= indexes, (question, plan)


@on_one_version  # before Postgres 17, a LIMIT did not end the parts of a UNION ALL early
def test_the_first_lines_are_read_without_the_rest(engine: Engine, database_url: str) -> None:
    execute(engine, *_FILL)
    with psycopg.connect(database_url) as connection:
        assert measure(connection, "SELECT * FROM analytics.lines LIMIT 100").rows < 500


def test_complete_through_asks_what_its_index_answers(engine: Engine) -> None:
    ((source,),) = rows(engine, "SELECT prosrc FROM pg_proc WHERE proname = 'complete_through'")
    asked = " ".join(source.split())
    query, _ = QUESTIONS["complete through"]
    assert query.partition(" FROM ")[2] in asked
    assert "min(coalesce(reconciled_at, first_event_at))" in asked
