"""A database with data, at any revision of the schema, is upgraded with its contents, and is sound afterwards."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from archiver import events, ledger
from archiver.archive import Timing
from archiver.archive.rebuild import rebuild
from archiver.database import schema, transaction
from archiver.events import Delivery, Event, responses
from tests.conftest import Cluster
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver

REVISIONS = [path.name[:4] for path in sorted(Path("migrations/versions").glob("[0-9]*.py"))]
NOW = datetime(2026, 1, 5, tzinfo=UTC)
TIMING = Timing()
TABLES = (
    *("events", "sessions", "chats", "messages", "quarantine", "pauses", "backfills", "acts", "erasures", "holds"),
    *("outbox", "changes", "subscriptions"),
)
Rows = list[dict[str, Any]]


def fill(engine: Engine) -> None:
    """Events, histories, a rejected body, an act, a hold and a subscription."""
    observed = [created("c1", "s1"), created("c2", "s1", input="ünï 🙂"), created("c3", None), created("c4", "s2")]
    for number, body in enumerate([*observed, deleted("c4", "s2"), created("c1", "s1")]):
        event = events.parse(body)
        assert isinstance(event, events.Event)
        record(engine, Delivery(event, NOW + timedelta(minutes=number), "key"))
    body = b'{"session": {"messages": [{"role": "user", "content": "only history"}]}}'
    record(engine, Delivery(responses.parse_history("s2", 200, body), NOW, None, responses.SOURCE))
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO archiver.quarantine (received_at, last_received_at, delivery_count, reason, detail, body,"
            " body_digest) VALUES (now(), now(), 2, 'not_json', '', 'x', sha256('x'))",
            "INSERT INTO archiver.pauses VALUES ('callhq', now(), 'busy')",
            "INSERT INTO archiver.backfills VALUES ('all', now())",
            "INSERT INTO archiver.acts (at, actor, kind, reason, detail)"
            r""" VALUES (now(), 'x', 'hold.add', 'y', '{"hold"\: 1, "session_id"\: "s1"}')""",
            "INSERT INTO archiver.holds (placed_at, author, reason, session_id) VALUES (now(), 'x', 'y', 's1')",
        ):
            connection.execute(text(statement))


def record(engine: Engine, observation: Delivery[Event]) -> None:
    with transaction(engine) as connection:
        ledger.record(connection, [observation], TIMING)


def contents(engine: Engine) -> Mapping[str, Rows]:
    """The rows of each table that there is."""
    with transaction(engine) as connection:
        values = {}
        for table in TABLES:
            if connection.scalar(text("SELECT to_regclass(:name)"), {"name": f"archiver.{table}"}) is not None:
                query = text(f"SELECT to_jsonb(t)::text FROM archiver.{table} t ORDER BY 1")
                values[table] = [json.loads(row) for row in connection.scalars(query)]
        return values


def copy(source: Mapping[str, Rows], engine: Engine) -> None:
    """Insert the rows, as far as the tables and columns exist."""
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM archiver.sessions"))
        for table in contents(engine):
            names = "SELECT attname FROM pg_attribute WHERE attrelid = CAST(:table AS regclass) AND attnum > 0"
            query = text(f"{names} AND NOT attisdropped")
            columns = ", ".join(connection.scalars(query, {"table": f"archiver.{table}"}))
            connection.execute(
                text(
                    f"INSERT INTO archiver.{table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns}"
                    f" FROM jsonb_populate_recordset(CAST(NULL AS archiver.{table}), CAST(:rows AS jsonb))"
                ),
                {"rows": json.dumps(source[table])},
            )


def archived(engine: Engine) -> list[Rows]:
    result = contents(engine)
    return [result[table] for table in ("sessions", "chats", "messages")]


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_with_data_is_upgraded_from_each_revision(
    cluster: Cluster, engine: Engine, empty_database_url: str, revision: str, tmp_path: Path
) -> None:
    fill(engine)
    older = cluster.engine(empty_database_url)
    schema.upgrade(older, revision)
    copy(contents(engine), older)
    before = contents(older)
    with older.begin() as connection:  # numbers go on after those that were copied
        for table in before:
            has_number = any("id" in row for row in before[table])
            name = f"pg_get_serial_sequence('archiver.{table}', 'id')"
            connection.execute(text(f"SELECT setval({name}, 100) WHERE {has_number} AND {name} IS NOT NULL"))

    schema.upgrade(older)

    after = contents(older)
    for table, rows in before.items():
        remaining = (
            sorted(({name: row.get(name) for name in rows[0]} for row in after[table]), key=str) if rows else []
        )
        # Migration 0002 makes sessions due that were never read.
        ignored = {"reconcile_at", "read_by"} if table == "sessions" else set()
        assert [without(row, ignored) for row in remaining] == [
            without(row, ignored) for row in sorted(rows, key=str)
        ]

    for _ in rebuild(older, TIMING):
        pass
    rebuilt = archived(older)
    for _ in rebuild(engine, TIMING):
        pass
    assert [transcript(older, name) for name in ("s1", "s2")] == [transcript(engine, name) for name in ("s1", "s2")]
    for _ in rebuild(older, TIMING):
        pass
    assert archived(older) == rebuilt
    older.dispose()
    for command in ("seal", "verify"):
        ended = archiver(command, database_url=empty_database_url, ARCHIVER_HOME=str(tmp_path))
        assert ended.returncode == 0, ended.stdout + ended.stderr


def without(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def transcript(engine: Engine, session_id: str) -> list[Any]:
    with transaction(engine) as connection:
        query = text(
            "SELECT position, chat_id, role, content, source FROM analytics.messages"
            " WHERE session_id = :session_id ORDER BY position"
        )
        return [tuple(row) for row in connection.execute(query, {"session_id": session_id})]
