"""Locks: no login that may only read makes the archiver wait, and the holder of a lock is named."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine

from archiver import database, embedded
from archiver.compliance import seals
from archiver.database import Lock, catalogue, locks, roles, schema, transaction
from tests.conftest import Cluster
from tests.support.feeds import publish
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.receivers import AS_IN_PRODUCTION, archiver, serving, serving_with
from tests.support.rows import execute, rows
from tests.support.servers import as_writer, let_writer_in
from tests.support.slowness import slow_rows
from tests.support.upstreams import simulated
from tests.support.versions import on_one_version
from tests.support.waiting import until

# The numbers that an older version of the archiver locked.
NUMBERS = tuple(0x63616C6C_68710000 + number for number in range(1, 5))


def as_login(url: str, role: str | None) -> str:
    """The URL of a login of its own, with that role or with none."""
    name = f"login_{role or 'without_role'}"
    with psycopg.connect(url, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone():
            granted = sql.SQL(" IN ROLE {}").format(sql.Identifier(role)) if role else sql.SQL("")
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN{}").format(sql.Identifier(name), granted))
    return re.sub(r"^postgresql://postgres@", f"postgresql://{name}@", url)


@contextmanager
def session(url: str, *statements: str, application: str = "psql") -> Iterator[psycopg.Connection]:
    """A transaction that did this and is idle."""
    with psycopg.connect(url, application_name=application) as connection:
        for statement in statements:
            connection.execute(statement)
        yield connection
        connection.rollback()


@pytest.fixture(params=[None, roles.READER, roles.AUDITOR])
def login(request: pytest.FixtureRequest, database_url: str) -> str:
    return as_login(database_url, request.param)


STATEMENTS = (
    *(f"LOCK TABLE {{}} IN {mode} MODE" for mode in ("ACCESS SHARE", "ROW EXCLUSIVE", "EXCLUSIVE")),
    # Which Postgres would plan, locks and all, before it looks at privileges.
    "PREPARE p AS DELETE FROM {}",
    "PREPARE p AS SELECT FROM {} FOR UPDATE",
    # Which Postgres would queue for an exclusive lock first.
    "CREATE RULE r AS ON INSERT TO {} DO NOTHING",
)


def test_only_the_writer_and_the_owner_can_lock(login: str, database_url: str) -> None:
    with psycopg.connect(login) as connection, psycopg.connect(as_writer(database_url)) as writer:
        for lock in Lock:
            for statement in STATEMENTS:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.format(f"archiver_jobs.{lock}"))
                connection.rollback()
            writer.execute(f"LOCK TABLE archiver_jobs.{lock} IN EXCLUSIVE MODE")


def test_no_advisory_lock_of_any_login_keeps_anything_waiting(
    login: str, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.database.LOCK_SECONDS", 0.2)
    with session(login, *(f"SELECT pg_advisory_lock({number})" for number in NUMBERS)):
        record(engine, created("c1", "s1"))
        record(engine, created("c2", None))  # which is recorded alone
        assert [each.id for each in seals.seal(engine)] == [1]
        assert publish(engine) > 0
        assert archiver("migrate", database_url=database_url).returncode == 0
        schema.downgrade(engine, "-1")
        schema.upgrade(engine)


def test_no_lock_that_a_reader_can_take_on_what_he_reads_keeps_anything_waiting(
    engine: Engine, database_url: str
) -> None:
    record(engine, created("c0", "s0"))
    reader = as_login(database_url, roles.READER)
    views = [row[0] for row in rows(engine, "SELECT viewname FROM pg_views WHERE schemaname = 'analytics'")]
    held = [f"SELECT FROM analytics.{view}" for view in views]
    held += [f"LOCK TABLE analytics.{view} IN ACCESS SHARE MODE" for view in views]
    with session(reader, *held):
        record(engine, created("c1", "s1"))
        record(engine, created("c2", None))
        assert [each.id for each in seals.seal(engine)] == [1]
        assert publish(engine) > 0


def test_the_archiver_takes_no_advisory_lock() -> None:
    package = Path(database.__file__).parent.parent
    assert [path for path in package.rglob("*.py") if "pg_advisory" in path.read_text(encoding="utf-8")] == []
    assert [path for path in package.rglob("*.py") if "pg_try_advisory" in path.read_text(encoding="utf-8")] == []


def test_a_lock_that_is_waited_for_is_reported_with_its_holder(database_url: str) -> None:
    """By the log, `doctor` and `status`, to which Postgres shows as little as to any ordinary user."""
    url = as_writer(database_url)
    held = "LOCK TABLE archiver_jobs.lock_placement IN EXCLUSIVE MODE"
    with serving_with(AS_IN_PRODUCTION, database_url) as receiver:
        with session(database_url, held, application="a-tool") as holder:
            named = f"process {holder.info.backend_pid} (user postgres, application a-tool)"
            answer = receiver.post(created("c1", "s1"))
            assert answer.json()["status"] == "spooled"
            until(lambda: '"lock wait"' in receiver.stderr(), "the log says so")
            line = next(each for each in receiver.stderr().splitlines() if '"lock wait"' in each)
            for part in (f'"pid": {holder.info.backend_pid}', '"user": "postgres"', '"application": "a-tool"'):
                assert part in line
            until(lambda: receiver.metric("archiver_lock_waiting_sessions") >= 1, "so does the metric")
            doctor = archiver("doctor", database_url=url, ARCHIVER_WEBHOOK_SECRETS="a-secret-for-tests")
            status = archiver("status", database_url=url)
            assert doctor.returncode == 1
            shown = " ".join(doctor.stdout.split())
            assert named in shown
            assert f"pg_terminate_backend({holder.info.backend_pid})" in shown
            assert named in " ".join(status.stdout.split())
            holder.rollback()
        until(lambda: receiver.metric("archiver_spool_events") == 0, "what was spooled is archived")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM archiver.events").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM archiver.quarantine").fetchone() == (0,)


def test_the_holder_behind_a_queue_is_named_and_not_the_queue(cluster: Cluster, database_url: str) -> None:
    engine = cluster.engine(as_writer(database_url))
    with session(database_url, "LOCK TABLE archiver.events IN SHARE MODE", application="first") as holder:
        others = [threading.Thread(target=_wait_for_events, args=(database_url,)) for _ in range(3)]
        for each in others:
            each.start()
        waiting = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'archiver.events'::regclass"
        until(lambda: len(rows(engine, waiting)) == 3, "all wait")
        with transaction(engine) as connection:
            (item,) = locks.select_holders(connection, 0)
        assert (item.pid, item.user, item.application) == (holder.info.backend_pid, "postgres", "first")
        assert (item.relations, item.waiting) == (["archiver.events"], 3)
        holder.rollback()
        for each in others:
            each.join()
    with transaction(engine) as connection:
        assert locks.select_holders(connection, 0) == []
    engine.dispose()


def _wait_for_events(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE archiver.events IN EXCLUSIVE MODE")


# Migrations


@pytest.fixture
def reader(database_url: str) -> str:
    return as_login(database_url, roles.READER)


def test_a_migration_names_the_reader_that_blocks_it_and_blocks_no_other(
    engine: Engine, database_url: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_WAIT_SECONDS", 3.0)
    monkeypatch.setattr(schema, "PAUSE_SECONDS", 0.5)
    schema.downgrade(engine, "0002")
    execute(
        engine,
        "GRANT USAGE ON SCHEMA analytics TO archiver_reader",
        "GRANT SELECT ON analytics.conversations TO archiver_reader",
    )
    with session(reader, "SELECT FROM analytics.conversations", application="dashboard") as holder:
        named = rf"process {holder.info.backend_pid} \(user login_archiver_reader, application dashboard\)"
        with pytest.raises(schema.SchemaError, match=named):
            schema.upgrade(engine)
    schema.upgrade(engine)
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [(schema.head(),)]


def test_a_migration_goes_on_once_the_reader_has_read(engine: Engine, database_url: str, reader: str) -> None:
    schema.downgrade(engine, "0002")
    execute(
        engine,
        "GRANT USAGE ON SCHEMA analytics TO archiver_reader",
        "GRANT SELECT ON analytics.conversations TO archiver_reader",
    )
    with session(reader, "SELECT FROM analytics.conversations") as holder:
        migrating = threading.Thread(target=schema.upgrade, args=(engine,))
        migrating.start()
        waiting = (
            "SELECT 1 FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE NOT granted AND datname = current_database()"
        )
        with psycopg.connect(database_url, autocommit=True) as looking:
            until(lambda: looking.execute(waiting).fetchall(), "it waits")
        holder.rollback()
        migrating.join()
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [(schema.head(),)]


def test_a_blocked_migration_keeps_the_revisions_before_and_the_next_one_continues(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_WAIT_SECONDS", 1.0)
    schema.downgrade(engine, "0026")
    with (
        session(database_url, "SELECT FROM archiver.uncontributed"),  # which 0028 changes
        pytest.raises(schema.SchemaError, match="beyond 0027; `archiver migrate` continues from there"),
    ):
        schema.upgrade(engine)
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [("0027",)]
    schema.upgrade(engine)
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [(schema.head(),)]
    with transaction(engine) as connection:
        assert catalogue.select_differences(connection) == []


@on_one_version
def test_the_work_of_a_migration_does_not_count_as_a_wait_for_a_lock(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_LOCK_SECONDS", 0.5)
    monkeypatch.setattr(schema, "LOCK_WAIT_SECONDS", 2.0)
    monkeypatch.setattr(schema, "PAUSE_SECONDS", 0.2)
    record(engine, created("a", "slow"))
    schema.downgrade(engine, "0027")
    slow_rows(engine, "archiver.uncontributed", "session_id", "slow", "PERFORM pg_sleep(2)")
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'analytics.health'::regclass"
    with ThreadPoolExecutor(1) as pool, session(database_url, "SELECT FROM analytics.health") as holder:
        migrating = pool.submit(schema.upgrade, engine)
        until(lambda: rows(engine, waiting), "it waits")
        until(lambda: not rows(engine, waiting), "its first attempt ends")
        holder.rollback()
        migrating.result(60)
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == [(schema.head(),)]


def test_a_migration_waits_for_another_one_and_finds_nothing_left_to_do(engine: Engine, database_url: str) -> None:
    with session(database_url, "SELECT FROM archiver.schema_version FOR UPDATE") as another:
        schema_of = rows(engine, "SELECT version_num FROM archiver.schema_version")
        another.execute("UPDATE archiver.schema_version SET version_num = '0005'")
        another.commit()
    with session(database_url, "SELECT FROM archiver.schema_version FOR UPDATE") as another:
        another.execute(sql.SQL("UPDATE archiver.schema_version SET version_num = {}").format(schema_of[0][0]))
        migrating = threading.Thread(target=schema.upgrade, args=(engine,))
        migrating.start()
        until(lambda: _waits_for_a_row(database_url), "it waits")
        another.commit()
        migrating.join()
    assert rows(engine, "SELECT version_num FROM archiver.schema_version") == schema_of


def _waits_for_a_row(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return bool(
            connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'").fetchone()
        )


# No room for locks


def test_i4_a_session_that_takes_all_locks_there_are_costs_no_event_and_is_named(tmp_path: Path) -> None:
    few = {"max_locks_per_transaction": "10", "max_connections": "20"}
    with embedded.running(tmp_path / "home", options=few) as postgres:
        engine = database.connect(database.database_url(postgres.url))
        schema.upgrade(engine)
        let_writer_in(postgres.url)
        with serving(postgres.url, "--no-migrate") as receiver:
            assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
            with psycopg.connect(postgres.url, autocommit=True, application_name="greedy") as greedy:
                with pytest.raises(psycopg.errors.OutOfMemory):
                    greedy.execute("SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) AS n")
                assert receiver.post(created("c2", "s2")).json()["status"] == "spooled"
                assert "max_locks_per_transaction" in receiver.stderr()
                for command in ("doctor", "status", "migrate"):
                    ended = archiver(
                        command, database_url=postgres.url, ARCHIVER_WEBHOOK_SECRETS="a-secret-for-tests"
                    )
                    assert ended.returncode == 1
                    assert "max_locks_per_transaction" in ended.stdout + ended.stderr
                    assert "Traceback" not in ended.stderr
            until(lambda: receiver.metric("archiver_spool_events") == 0, "what was spooled is archived")
        assert rows(engine, "SELECT count(*) FROM archiver.events") == [(2,)]
        assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]
        engine.dispose()


def test_a_session_that_holds_most_of_the_locks_is_named_by_doctor(tmp_path: Path) -> None:
    few = {"max_locks_per_transaction": "10", "max_connections": "20"}
    with embedded.running(tmp_path / "home", options=few) as postgres:
        engine = database.connect(database.database_url(postgres.url))
        with psycopg.connect(postgres.url, autocommit=True, application_name="greedy") as greedy:
            greedy.execute("SELECT pg_advisory_lock(n) FROM generate_series(1, 250) AS n")
            with transaction(engine) as connection:
                used = locks.select_usage(connection)
            assert (used.application, used.pid) == ("greedy", greedy.info.backend_pid)
        assert used.usage > 0.75
        engine.dispose()


def test_a_reader_beside_a_whole_installation_stops_nothing(database_url: str) -> None:
    """`serve` with its worker: ingest, seals and the feed go on beside a login that holds all that it can."""
    reader = as_login(database_url, roles.READER)
    with (
        session(reader, *(f"SELECT pg_advisory_lock({number})" for number in NUMBERS), "TABLE analytics.messages"),
        simulated() as callhq,
        serving(database_url, "--worker", ARCHIVER_SEAL_EVERY="1", **callhq.settings) as receiver,
    ):
        assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
        with psycopg.connect(database_url, autocommit=True) as looking:
            for table in ("seals", "changes"):
                query = sql.SQL("SELECT 1 FROM archiver.{}").format(sql.Identifier(table))
                until(lambda query=query: looking.execute(query).fetchone(), f"there are {table}")  # type: ignore[misc]
        assert archiver("migrate", database_url=database_url).returncode == 0
