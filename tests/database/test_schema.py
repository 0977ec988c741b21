"""Migrations, drift, the views that dashboards read, and who may read what."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from archiver import database, events
from archiver.archive import rollups
from archiver.database import catalogue, identity, roles, schema, tables, transaction
from archiver.events import Delivery
from archiver.ledger import quarantine
from tests.conftest import Cluster
from tests.support.feeds import publish
from tests.support.observations import record
from tests.support.payloads import created, deleted
from tests.support.rows import execute, rows

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VIEWS = {
    "conversations": "session_id assistant_id name status started_at last_message_at chats messages user_messages"
    " assistant_messages cost deleted_chats coverage",
    "chats": "turn_id session_id chat_id assistant_id status cost variables created_at updated_at began_at"
    " began_is_told source deleted_at",
    "messages": "turn_id session_id position ordinal chat_id role content created_at began_at source deleted_at"
    " content_kind history_content",
    "lines": "turn_id session_id ordinal role content content_kind began_at began_is_told source deleted_at",
    "daily": "day assistant_id conversations conversations_started chats messages cost deleted_chats"
    " repaired_messages",
    "rollups": "bucket assistant_id conversations_started chats messages cost deleted_chats repaired_messages"
    " latency",
    "variable_rollups": "bucket assistant_id variable value conversations_started chats messages cost deleted_chats"
    " repaired_messages latency",
    "variables": "name state known_values is_full",
    "coverage": "session_id state first_event_at reconciled_at repaired_messages reason",
    "changes": "cursor type session_id chat_id seal_id changed_at epoch",
    "epochs": "number epoch began_at cursor given",
    "health": "complete_through unknown_sessions lost_sessions unread_sessions feed_lag_seconds summary_cursor"
    " rollups_lag_seconds waiting_sessions"
    " oldest_snapshot_seconds",
    "sessions": "session_id assistant_id started_at last_message_at turns messages user_messages assistant_messages"
    " cost deleted_chats repaired_messages coverage reason first_question first_answer answer_seconds variables"
    " changed_cursor",
}
TABLES = (
    "events",
    "sessions",
    "chats",
    "messages",
    "quarantine",
    "pauses",
    "backfills",
    "recounts",
    "acts",
    "erasures",
    "removals",
    "holds",
    "seals",
    "outbox",
    "changes",
    "subscriptions",
    "deliveries",
    "attempts",
    "workers",
    "duties",
    "epochs",
    "epoch_faults",
    "pieces",
    "summaries",
    "search",
    "search_partitions",
    "search_state",
    "contributions",
    "rollups",
    "days",
    "stale_buckets",
    "uncontributed",
    "promoted_variables",
    "variable_values",
    "session_values",
    "variable_rollups",
    "users",
    "logins",
)
INTERNAL_VIEWS = ("contributed",)


# Migrations


def test_an_empty_database_comes_to_head_and_a_second_time_changes_nothing(empty: Engine) -> None:
    for _ in range(2):
        schema.upgrade(empty)
        with transaction(empty) as connection:
            schema.check(connection)
            assert schema.current(connection) == schema.head()
    record(empty, created())


def test_a_downgrade_with_data_leaves_nothing_and_a_second_upgrade_works(engine: Engine) -> None:
    record(engine, created(), deleted())
    with transaction(engine) as connection:
        quarantine.upsert_quarantine(connection, [Delivery(events.parse(b"{"), NOW, None)])
    schema.upgrade(engine)
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(2,)]
    schema.downgrade(engine, "base")
    assert rows(
        engine,
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname IN ('archiver', 'analytics', 'public') AND c.relkind IN ('r', 'v', 'S', 'm')",
    ) == [("archiver", "schema_version")]
    schema.upgrade(engine)
    record(engine, created())
    assert rows(engine, "SELECT count(*) FROM analytics.messages") == [(2,)]


def test_check_says_that_nothing_was_ever_migrated(empty: Engine) -> None:
    with transaction(empty) as connection, pytest.raises(schema.SchemaError, match=r"no archiver schema.*migrate"):
        schema.check(connection)


def test_check_says_that_a_downgraded_database_has_no_schema(engine: Engine) -> None:
    schema.downgrade(engine, "base")
    with transaction(engine) as connection, pytest.raises(schema.SchemaError, match="archiver migrate"):
        schema.check(connection)


def test_a_newer_schema_is_neither_used_nor_touched(engine: Engine) -> None:
    execute(engine, "UPDATE archiver.schema_version SET version_num = '9999'")
    with transaction(engine) as connection, pytest.raises(schema.SchemaError, match=r"9999, newer.*upgrade"):
        schema.check(connection)
    with pytest.raises(schema.SchemaError, match="9999, newer"):
        schema.upgrade(engine)
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [("9999",)]


def test_a_failing_migration_leaves_nothing_behind(empty: Engine) -> None:
    execute(empty, "CREATE SCHEMA analytics", "CREATE TABLE analytics.daily (x int)")
    with pytest.raises(ProgrammingError, match="daily"):
        schema.upgrade(empty)
    assert rows(empty, "SELECT count(*) FROM pg_namespace WHERE nspname = 'archiver'") == [(0,)]
    execute(empty, "DROP TABLE analytics.daily")
    schema.upgrade(empty)


def test_two_processes_that_migrate_at_once_both_succeed(
    empty: Engine, empty_database_url: str, tmp_path: Path
) -> None:
    environment = os.environ | {"DATABASE_URL": empty_database_url, "ARCHIVER_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "archiver", "migrate"]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    with transaction(empty) as connection:
        schema.check(connection)


def test_every_statement_of_a_migration_has_bounded_waits(empty: Engine) -> None:
    execute(
        empty,
        "CREATE TABLE public.seen (command text, lock_limit interval, statement_limit interval)",
        "CREATE FUNCTION public.see() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen"
        " VALUES (tg_tag, current_setting('lock_timeout')::interval, current_setting('statement_timeout')::interval);"
        " END $$",
        "CREATE EVENT TRIGGER see ON ddl_command_start EXECUTE FUNCTION public.see()",
    )
    schema.upgrade(empty)
    schema.downgrade(empty, "base")
    execute(empty, "DROP EVENT TRIGGER see")
    assert {"CREATE TABLE", "CREATE VIEW", "DROP TABLE"} <= {row[0] for row in rows(empty, "TABLE public.seen")}
    unbounded = rows(
        empty,
        "SELECT * FROM public.seen WHERE lock_limit NOT BETWEEN '1ms' AND '1 minute'"
        " OR statement_limit NOT BETWEEN '1ms' AND '1 hour'",
    )
    assert unbounded == []


# Drift


def test_the_migrated_database_is_what_the_tables_say(engine: Engine) -> None:
    with transaction(engine) as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == tables.SCHEMA,
                "version_table": schema.VERSION_TABLE,
                "version_table_schema": tables.SCHEMA,
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        assert compare_metadata(context, tables.metadata) == []


def test_the_migrated_indexes_and_conditions_are_what_the_tables_say(engine: Engine, empty: Engine) -> None:
    # What Alembic does not compare: the conditions of partial indexes and the texts of checks.
    with transaction(empty) as connection:
        connection.execute(text("CREATE SCHEMA archiver"))
        tables.metadata.create_all(connection)
        declared = catalogue.read(connection)
    with transaction(engine) as connection:
        migrated = catalogue.read(connection)
    names = [name for name in declared if name.startswith(("index ", "constraint "))]
    assert len(names) > 60
    assert {name: migrated.get(name) for name in names} == {name: declared[name] for name in names}


def test_the_migrated_constraints_are_what_the_tables_say(engine: Engine) -> None:
    # What Alembic does not compare: checks, primary keys, and names.
    declared = {
        (table.name, constraint.name) for table in tables.metadata.tables.values() for constraint in table.constraints
    }
    migrated = rows(
        engine,
        "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE connamespace = 'archiver'::regnamespace"
        " AND contype <> 'n' AND conrelid <> 'archiver.schema_version'::regclass",
    )
    assert {(table.removeprefix("archiver."), name) for table, name in migrated} == declared
    assert rows(
        engine,
        "SELECT table_name, identity_generation FROM information_schema.columns"
        " WHERE table_schema = 'archiver' AND is_identity = 'YES' ORDER BY 1",
    ) == [
        (table, "ALWAYS")
        for table in (
            *("acts", "erasures", "events", "holds", "outbox", "promoted_variables", "quarantine", "recounts"),
            *("removals", "stale_buckets", "subscriptions", "variable_values"),
        )
    ]


def test_the_tables_of_a_session_can_be_distributed_by_it(engine: Engine) -> None:
    without = rows(
        engine,
        "SELECT conname FROM pg_constraint c WHERE connamespace = 'archiver'::regnamespace"
        " AND conrelid = ANY ('{archiver.events,archiver.sessions,archiver.chats,archiver.messages,"
        "archiver.summaries,archiver.contributions,archiver.uncontributed,archiver.session_values}'::regclass[])"
        " AND contype IN ('p', 'u', 'f') AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.conrelid"
        " AND a.attnum = ANY (c.conkey) AND a.attname = 'session_id')",
    )
    assert without == []


def test_every_table_view_and_column_says_what_it_means(engine: Engine) -> None:
    relations = rows(
        engine,
        "SELECT c.oid::regclass::text, obj_description(c.oid, 'pg_class') FROM pg_class c"
        " WHERE relnamespace IN ('archiver'::regnamespace, 'analytics'::regnamespace)"
        " AND relkind IN ('r', 'p', 'v', 'm') AND relname <> 'schema_version'",
    )
    assert len(relations) == len(TABLES) + len(INTERNAL_VIEWS) + len(VIEWS)
    assert [name for name, comment in relations if not comment] == []
    silent = rows(
        engine,
        "SELECT c.oid::regclass::text, attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE relnamespace IN ('archiver'::regnamespace, 'analytics'::regnamespace) AND relkind IN ('r', 'v', 'm')"
        " AND relname <> 'schema_version' AND attnum > 0 AND NOT attisdropped"
        " AND coalesce(col_description(c.oid, attnum), '') = ''",
    )
    assert silent == []
    assert (
        rows(
            engine,
            "SELECT nspname FROM pg_namespace WHERE nspname IN ('archiver', 'analytics')"
            " AND obj_description(oid, 'pg_namespace') IS NULL",
        )
        == []
    )


# Who may read


def refused(engine: Engine, statement: str, role: str = roles.READER) -> bool:
    """Whether this role is denied the statement; it must not fail in any other way."""
    try:
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL ROLE {role}"))
            connection.execute(text(statement))
    except ProgrammingError as error:
        if database.sqlstate(error) == "42501":  # insufficient privilege
            return True
        raise
    except OperationalError as error:
        if database.sqlstate(error) == "55000":  # a view that no role can write
            return True
        raise
    return False


@pytest.mark.parametrize("view", VIEWS)
def test_the_reader_may_read_each_view(engine: Engine, view: str) -> None:
    assert not refused(engine, f"SELECT * FROM analytics.{view}")


@pytest.mark.parametrize("table", [*TABLES, "schema_version"])
def test_the_reader_may_read_no_table(engine: Engine, table: str) -> None:
    assert refused(engine, f"SELECT count(*) FROM archiver.{table}")
    assert refused(engine, f"DELETE FROM archiver.{table}")
    assert refused(engine, f"TRUNCATE archiver.{table}")


@pytest.mark.parametrize("view", INTERNAL_VIEWS)
def test_the_reader_may_read_no_internal_view(engine: Engine, view: str) -> None:
    assert refused(engine, f"SELECT * FROM archiver.{view}")
    assert refused(engine, f"DELETE FROM archiver.{view}")


@pytest.mark.parametrize("view", VIEWS)
def test_the_reader_may_change_nothing_through_a_view(engine: Engine, view: str) -> None:
    column = VIEWS[view].split()[0]
    assert (
        rows(
            engine,
            f"SELECT p FROM unnest('{{INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) p"
            f" WHERE has_table_privilege('{roles.READER}', 'analytics.{view}', p)"
            f" OR p IN ('INSERT', 'UPDATE') AND has_column_privilege('{roles.READER}',"
            f" 'analytics.{view}', '{column}', p)",
        )
        == []
    )


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE analytics.mine (x int)",
        "CREATE TABLE archiver.mine (x int)",
        "CREATE TABLE public.mine (x int)",
        "CREATE VIEW analytics.mine AS SELECT 1",
        "CREATE SCHEMA mine",
        "CREATE ROLE mine",
        "DROP VIEW analytics.daily",
        "UPDATE analytics.chats SET status = 'x'",
        "INSERT INTO analytics.chats (session_id, status) VALUES ('s', 'c')",
        "DELETE FROM analytics.chats",
        "COPY archiver.events TO STDOUT",
        "SELECT pg_read_file('/etc/passwd')",
    ],
)
def test_the_reader_may_create_change_and_see_nothing_else(engine: Engine, statement: str) -> None:
    assert refused(engine, statement)


def test_the_reader_has_no_privileged_attribute(engine: Engine) -> None:
    assert rows(
        engine,
        "SELECT rolsuper, rolcanlogin, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication FROM pg_roles"
        f" WHERE rolname = '{roles.READER}'",
    ) == [(False,) * 6]
    assert (
        rows(
            engine,
            "SELECT 1 FROM pg_auth_members WHERE member = 'archiver_reader'::regrole",
        )
        == []
    )


@pytest.fixture
def owner(cluster: Cluster, empty_database_url: str) -> Iterator[Engine]:
    """An ordinary user, owner of an empty database and of nothing else."""
    url = database.database_url(empty_database_url)
    cluster.execute("CREATE ROLE ordinary LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB")
    cluster.execute(f"ALTER DATABASE {url.database} OWNER TO ordinary")
    ordinary = url.set(username="ordinary", drivername="postgresql").render_as_string(hide_password=False)
    engine = cluster.engine(ordinary)
    yield engine
    engine.dispose()
    cluster.execute(f"ALTER DATABASE {url.database} OWNER TO postgres")
    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
    ) as connection:
        connection.execute("DROP OWNED BY ordinary CASCADE")
    cluster.execute("DROP ROLE ordinary")


@pytest.fixture
def _no_reader(cluster: Cluster) -> Iterator[None]:
    """The role belongs to the whole server, so other databases keep it under another name meanwhile."""
    cluster.execute(f"ALTER ROLE {roles.READER} RENAME TO reader_aside")
    yield
    cluster.execute(f"ALTER ROLE reader_aside RENAME TO {roles.READER}")


def test_an_ordinary_user_migrates_and_records(owner: Engine) -> None:
    schema.upgrade(owner)
    record(owner, created("a"), deleted("b", session_id=None))
    record(owner, created("b"), deleted("a"))
    assert rows(owner, "SELECT current_user, count(*), count(deleted_at) FROM analytics.chats") == [
        ("ordinary", 2, 2)
    ]
    schema.downgrade(owner, "base")
    schema.upgrade(owner)


@pytest.mark.usefixtures("_no_reader")
def test_a_reader_role_made_later_may_read_after_the_next_migrate(cluster: Cluster, owner: Engine) -> None:
    schema.upgrade(owner)  # which may not create roles
    assert rows(owner, f"SELECT 1 FROM pg_roles WHERE rolname = '{roles.READER}'") == []
    with transaction(owner) as connection:
        assert roles.READER not in roles.existing(connection)
    cluster.execute(f"CREATE ROLE {roles.READER} NOLOGIN")
    cluster.execute(f"GRANT {roles.READER} TO ordinary")
    try:
        assert refused(owner, "SELECT * FROM analytics.messages")
        schema.upgrade(owner)
        assert [view for view in VIEWS if refused(owner, f"SELECT * FROM analytics.{view}")] == []
        assert all(refused(owner, f"SELECT * FROM archiver.{table}") for table in TABLES)
    finally:
        execute(owner, "DROP SCHEMA analytics CASCADE")
        cluster.execute(f"DROP ROLE {roles.READER}")


# Views


def test_each_view_has_the_columns_of_the_contract(engine: Engine) -> None:
    for view, columns in VIEWS.items():
        rows_found = rows(
            engine,
            "SELECT column_name FROM information_schema.columns"
            f" WHERE table_schema = 'analytics' AND table_name = '{view}'",
        )
        assert set(columns.split()) <= {row[0] for row in rows_found}, view
    assert {row[0] for row in rows(engine, "SELECT viewname FROM pg_views WHERE schemaname = 'analytics'")} == set(
        VIEWS
    )


DAY_1, DAY_2 = "2024-01-15T09:30:00Z", "2024-01-16T00:30:00Z"
PREMIUM = '{"customerTier": "Premium"}'
SECOND_DAY = 1_705_365_000_000  # DAY_2, as the envelope tells it


def at(day: int, hour: int, minute: int, second: int = 0) -> datetime:
    return datetime(2024, 1, day, hour, minute, second, tzinfo=UTC)


@pytest.fixture
def small(engine: Engine) -> Engine:
    """Two sessions, one of them over two days and with a deletion, and a turn whose session nobody told."""
    answers = [{"role": "tool", "content": "looked up"}, {"role": "assistant", "content": "found"}]
    record(
        engine,
        created("s1-late", "s1", SECOND_DAY, createdAt=DAY_2, updatedAt=DAY_2, cost="0.10", input="later"),
        created("s1-early", "s1", cost="0.20", output=answers),
        created("s2-only", "s2", assistantId="assistant-2", cost=None, output=None, updatedAt=None),
        created("lost", None, cost=5),
        deleted("s1-early", "s1"),
        b'{"type": "chat.created", "session": {"id": "s2", "name": "Anna", "status": "active"},'
        b' "chat": {"id": "s2-silent", "sessionId": "s2", "createdAt": "2024-01-15T09:31:00Z"}}',
    )
    return engine


def test_the_figures_of_conversations(small: Engine) -> None:
    assert rows(
        small,
        "SELECT session_id, assistant_id, name, status, started_at, last_message_at, chats, messages, user_messages,"
        " assistant_messages, cost, deleted_chats, coverage FROM analytics.conversations ORDER BY 1",
    ) == [
        ("s1", "assistant-1", None, None, at(15, 9, 30), at(16, 0, 30), 2, 5, 2, 2, Decimal("0.30"), 1, "open"),
        ("s2", "assistant-2", "Anna", "active", at(15, 9, 30), at(15, 9, 31), 2, 1, 1, 0, None, 0, "open"),
    ]


def test_the_figures_of_chats(small: Engine) -> None:
    assert rows(
        small,
        "SELECT session_id, chat_id, assistant_id, cost, variables::text, created_at, updated_at, source, deleted_at"
        " FROM analytics.chats ORDER BY 1, 2",
    ) == [
        (*("", "lost", "assistant-1", Decimal(5)), PREMIUM, at(15, 9, 30), at(15, 9, 30, 1), "webhook", None),
        (
            *("s1", "s1-early", "assistant-1", Decimal("0.20"), PREMIUM, at(15, 9, 30), at(15, 9, 30, 1), "webhook"),
            at(15, 9, 46, 40),
        ),
        (*("s1", "s1-late", "assistant-1", Decimal("0.10")), PREMIUM, at(16, 0, 30), at(16, 0, 30), "webhook", None),
        ("s2", "s2-only", "assistant-2", None, PREMIUM, at(15, 9, 30), None, "webhook", None),
        ("s2", "s2-silent", None, None, None, at(15, 9, 31), None, "webhook", None),
    ]


def test_the_messages_in_true_order(small: Engine) -> None:
    assert rows(
        small,
        "SELECT session_id, position, chat_id, role, content, deleted_at IS NOT NULL FROM analytics.messages"
        " ORDER BY 1, 2",
    ) == [
        ("", 1, "lost", "user", "question of lost", False),
        ("", 2, "lost", "assistant", "answer to lost", False),
        ("s1", 1, "s1-early", "user", "question of s1-early", True),
        ("s1", 2, "s1-early", "tool", "looked up", True),
        ("s1", 3, "s1-early", "assistant", "found", True),
        ("s1", 4, "s1-late", "user", "later", False),
        ("s1", 5, "s1-late", "assistant", "answer to s1-late", False),
        ("s2", 1, "s2-only", "user", "question of s2-only", False),
    ]


def test_the_figures_of_days(small: Engine) -> None:
    assert rows(
        small,
        "SELECT day, assistant_id, conversations, chats, messages, cost, deleted_chats, repaired_messages"
        " FROM analytics.daily ORDER BY 1, 2",
    ) == [
        (date(2024, 1, 15), "assistant-1", 1, 2, 5, Decimal("5.20"), 1, 0),
        (date(2024, 1, 15), "assistant-2", 1, 2, 1, None, 0, 0),
        (date(2024, 1, 16), "assistant-1", 1, 1, 2, Decimal("0.10"), 0, 0),
    ]


def test_the_figures_of_coverage(small: Engine) -> None:
    assert rows(
        small,
        "SELECT session_id, state, first_event_at, reconciled_at, repaired_messages FROM analytics.coverage"
        " ORDER BY 1",
    ) == [("s1", "open", NOW, None, 0), ("s2", "open", NOW, None, 0)]


def test_days_do_not_depend_on_the_readers_time_zone(small: Engine) -> None:
    with transaction(small) as connection:
        connection.execute(text("SET LOCAL TIME ZONE 'America/Los_Angeles'"))
        days = connection.scalars(text("SELECT DISTINCT day FROM analytics.daily ORDER BY 1")).all()
    assert days == [date(2024, 1, 15), date(2024, 1, 16)]


def test_turns_of_one_instant_are_ordered_by_their_envelopes(engine: Engine) -> None:
    result = 1_705_311_000_000
    record(engine, created("a", at=result + 2000), created("b", at=result + 1000), created("c", at=result))
    texts = rows(engine, "SELECT chat_id FROM analytics.messages WHERE role = 'user' ORDER BY position")
    assert texts == [("c",), ("b",), ("a",)]


def test_positions_are_without_gaps_in_every_session(engine: Engine) -> None:
    for number in range(6):
        record(engine, created(f"chat-{number}", f"s{number % 2}", createdAt=f"2024-01-15T0{9 - number}:00:00Z"))
    assert rows(
        engine,
        "SELECT session_id, array_agg(position ORDER BY position), array_agg(created_at ORDER BY position)"
        " = array_agg(created_at ORDER BY created_at) FROM analytics.messages GROUP BY 1 ORDER BY 1",
    ) == [("s0", [1, 2, 3, 4, 5, 6], True), ("s1", [1, 2, 3, 4, 5, 6], True)]


# Who may write


NUMBERED = ("events", "recounts", "acts", "erasures", "removals")


@pytest.mark.parametrize(("role", "table"), [*((roles.WRITER, table) for table in NUMBERED), (roles.AUDITOR, "acts")])
def test_no_writer_can_choose_the_id_of_a_sealed_row(engine: Engine, role: str, table: str) -> None:
    columns = [column for column in tables.metadata.tables[f"archiver.{table}"].columns if column.name != "id"]
    samples = {"TIMESTAMP": "now()", "BYTEA": "'\\x00'", "JSONB": "'{}'", "TEXT": "'x'", "BOOLEAN": "false"}
    samples |= {"BYTEA[]": "NULL", "INTEGER[]": "NULL"}
    values = ", ".join(samples.get(str(each.type.compile(engine.dialect)).split()[0], "1") for each in columns)
    names = ", ".join(column.name for column in columns)
    if table == "acts":  # its guard knows the kinds
        values = ", ".join(
            "'export'" if each.name == "kind" else value
            for each, value in zip(columns, values.split(", "), strict=True)
        )
    chosen = (
        f"INSERT INTO archiver.{table} (id, {names}) OVERRIDING SYSTEM VALUE VALUES (9000000000000000000, {values})"
    )
    assert refused(engine, chosen, role)
    assert not refused(engine, f"INSERT INTO archiver.{table} ({names}) VALUES ({values})", role)
    assert rows(engine, f"SELECT max(id) FROM archiver.{table}") == [(1,)]


SHADOWS = {
    "UPDATE archiver.events SET delivery_count = delivery_count - 1": [
        "CREATE FUNCTION evil.less(integer, integer) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR evil.< (leftarg = integer, rightarg = integer, function = evil.less)",
    ],
    "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = 'chosen'": [
        "CREATE FUNCTION evil.sha256(bytea) RETURNS bytea LANGUAGE sql AS $$SELECT 'chosen'\\:\\:bytea$$",
    ],
    "UPDATE archiver.holds SET reason = 'another', released_at = now()": [
        "CREATE FUNCTION evil.same(jsonb, jsonb) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        "CREATE OPERATOR evil.= (leftarg = jsonb, rightarg = jsonb, function = evil.same)",
    ],
}


@pytest.mark.parametrize("statement", SHADOWS)
def test_a_search_path_does_not_talk_a_guard_round(engine: Engine, statement: str) -> None:
    record(engine, created(), created())
    execute(
        engine,
        "INSERT INTO archiver.holds (placed_at, author, reason, session_id) VALUES (now(), 'x', 'y', 's')",
        *("CREATE SCHEMA evil", *SHADOWS[statement]),
    )
    with pytest.raises(IntegrityError, match=r"append-only|only grow|only placed and released"):
        execute(engine, "SET LOCAL search_path = evil, pg_catalog", statement)


def test_the_planner_keeps_no_samples_of_what_an_erasure_takes(engine: Engine) -> None:
    record(engine, *(created(f"c{number}", f"s{number}") for number in range(20)))
    publish(engine)
    with transaction(engine) as connection:
        rollups.sum_stale(connection, rollups.select_stale(connection))
    execute(engine, "UPDATE archiver.sessions SET status = 'MARK', name = 'MARK'", "ANALYZE")
    remaining = rows(
        engine,
        "SELECT tablename, attname FROM pg_stats WHERE schemaname = 'archiver'"
        " AND tablename IN ('sessions', 'chats', 'messages', 'summaries', 'contributions', 'rollups', 'days')",
    )
    assert {("summaries", "turns"), ("contributions", "chats"), ("rollups", "chats"), ("days", "chats")} <= {
        *remaining
    }
    taken = ["external_id", "status", "cost", "variables", "session_name", "session_status"]
    taken += ["name", "content", "first_question", "first_answer"]
    names = ("sessions", "chats", "messages", "summaries", "contributions", "rollups", "days")
    assert sorted({*remaining} & {(table, column) for table in names for column in taken}) == []


def test_an_auditor_may_read_the_rows_that_machines_remember(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL ROLE {roles.AUDITOR}"))
        for kind in identity.KINDS:
            assert connection.execute(kind.newest).first() is None
            connection.execute(kind.has, {"number": 1, "content": "2026-01-01"})
