"""Settings of tables, roles and databases by which `doctor` recognises unsafe, slow or impossible writes."""

import pytest
from psycopg import sql
from sqlalchemy import Engine

from archiver.database import transaction
from archiver.operations.doctor import Finding
from archiver.operations.doctor.table_checks import examine_tables
from tests.conftest import Cluster
from tests.support import servers
from tests.support.rows import execute


def findings(engine: Engine) -> list[Finding]:
    with transaction(engine) as connection:
        return [each for each in examine_tables(connection) if " is off: tables grow" not in each.detail]


@pytest.mark.parametrize("whose", ["DATABASE {name}", "ROLE test_writer IN DATABASE {name}", "ROLE test_writer"])
def test_guards_that_do_not_run_are_named_with_the_remedy(engine: Engine, cluster: Cluster, whose: str) -> None:
    assert findings(engine) == []
    whose = whose.format(name=engine.url.database)
    cluster.execute(f"ALTER {whose} SET session_replication_role = replica")
    engine.dispose()
    try:
        (found,) = findings(engine)
        assert (found.check, found.verdict) == ("guards", "failure")
        assert "session_replication_role is replica" in found.detail
        assert found.advice == f"As an administrator: ALTER {whose} RESET session_replication_role;"
    finally:
        cluster.execute(sql.SQL("ALTER ROLE {} RESET ALL").format(sql.Identifier(servers.WRITER)))
    cluster.execute(found.advice.removeprefix("As an administrator: "))
    engine.dispose()
    assert findings(engine) == []


def test_a_role_in_which_triggers_run_is_no_finding(engine: Engine, cluster: Cluster) -> None:
    cluster.execute(f"ALTER DATABASE {engine.url.database} SET session_replication_role = local")
    engine.dispose()
    assert findings(engine) == []
    cluster.execute(f"ALTER DATABASE {engine.url.database} RESET session_replication_role")
    engine.dispose()


PUBLISHED = "CREATE PUBLICATION everything FOR TABLE archiver.sessions, archiver.events"


@pytest.mark.parametrize(
    ("statements", "is_refused"),
    [
        (["ALTER TABLE archiver.sessions REPLICA IDENTITY NOTHING"], False),
        ([PUBLISHED], False),
        ([f"{PUBLISHED} WITH (publish = 'insert')", "ALTER TABLE archiver.sessions REPLICA IDENTITY NOTHING"], False),
        ([PUBLISHED, "ALTER TABLE archiver.sessions REPLICA IDENTITY FULL"], False),
        ([PUBLISHED, "ALTER TABLE archiver.sessions REPLICA IDENTITY USING INDEX sessions_pkey"], False),
        ([PUBLISHED, "ALTER TABLE archiver.sessions REPLICA IDENTITY NOTHING"], True),
        (
            [
                "CREATE PUBLICATION everything FOR ALL TABLES",
                "ALTER TABLE archiver.sessions REPLICA IDENTITY NOTHING",
            ],
            True,
        ),
    ],
)
def test_a_published_table_without_replica_identity_is_named(
    engine: Engine, statements: list[str], *, is_refused: bool
) -> None:
    execute(engine, *statements)
    found = [(each.check, each.verdict) for each in findings(engine)]
    assert found == ([("replication", "failure")] if is_refused else [])
    if is_refused:
        (finding,) = findings(engine)
        assert "archiver.sessions" in finding.detail
        execute(engine, "ALTER TABLE archiver.sessions REPLICA IDENTITY DEFAULT")
        assert findings(engine) == []


@pytest.mark.parametrize(
    "option", ["autovacuum_enabled = false", "autovacuum_enabled = off", "toast.autovacuum_enabled = 0"]
)
def test_a_table_that_is_not_vacuumed_is_named(engine: Engine, option: str) -> None:
    execute(engine, "ALTER TABLE archiver.events SET (autovacuum_enabled = on, autovacuum_vacuum_scale_factor = 0.1)")
    assert findings(engine) == []
    execute(engine, f"ALTER TABLE archiver.events SET ({option})")
    (found,) = findings(engine)
    assert (found.check, found.verdict) == ("autovacuum", "warning")
    assert "archiver.events" in found.detail
    execute(engine, "ALTER TABLE archiver.events RESET (autovacuum_enabled, toast.autovacuum_enabled)")
    assert findings(engine) == []
