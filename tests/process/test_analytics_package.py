"""The dbt models and the dashboard of `deploy/analytics`, with the privileges of `archiver_reader`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine

from archiver.compliance.erasure import Target
from tests.support.erasures import erase, read, record, said
from tests.support.exports import fill
from tests.support.feeds import publish
from tests.support.payloads import created
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version

PACKAGE = Path(__file__).parents[2] / "deploy" / "analytics"
DBT = Path(sys.executable).parent.parent / "dbt" / "bin" / "dbt"  # `make test` installs it


@pytest.fixture
def analyst(database_url: str) -> Iterator[str]:
    """The same database for a login that reads the views and owns the schema `marts`, and nothing else."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = f"analyst_{connection.info.dbname}"
        connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE archiver_reader".encode())
        connection.execute(f"CREATE SCHEMA marts AUTHORIZATION {name}".encode())
        yield database_url.replace("postgresql://postgres@", f"postgresql://{name}@")
        connection.execute("DROP SCHEMA marts CASCADE")
        connection.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def reader(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url) as connection:
        connection.execute("SET ROLE archiver_reader")
        yield connection


def dbt(command: str, url: str, folder: Path, status: int = 0) -> str:
    assert DBT.exists(), "dbt is not installed: make .venv/dbt/.installed"
    target = conninfo_to_dict(url)
    environment = {
        "PGHOST": str(target["host"]),
        "PGPORT": str(target["port"]),
        "PGUSER": str(target["user"]),
        "PGDATABASE": str(target["dbname"]),
    }
    arguments = ["--project-dir", PACKAGE, "--profiles-dir", PACKAGE, "--target-path", folder, "--log-path", folder]
    ended = subprocess.run(
        [DBT, "--no-use-colors", "--no-version-check", *command.split(), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout


def conversations(engine: Engine) -> dict[str, tuple[str, str]]:
    """Each row of the mart, and the transaction that wrote it."""
    found = rows(engine, "SELECT session_id, c::text, xmin::text FROM marts.conversations c")
    return {session_id: (whole, written_by) for session_id, whole, written_by in found}


@on_one_version
def test_the_models_follow_the_archive(engine: Engine, analyst: str, tmp_path: Path) -> None:
    assert "PASS freshness of callhq.health" in dbt("source freshness", analyst, tmp_path)
    record(engine, created("c0", "s0"), created("c1", "s1"), created("c2", "s2", input="a secret"))
    record(engine, created("c3", "s3"), minute=1)  # the newest, which is read again
    publish(engine)
    assert "ERROR STALE freshness" in dbt("source freshness", analyst, tmp_path, status=1)  # none is reconciled
    assert "PASS=" in dbt("build", analyst, tmp_path)
    before = conversations(engine)
    assert set(before) == {"s0", "s1", "s2", "s3"}

    record(engine, created("c4", "s1", createdAt="2024-01-16T00:00:00Z"), created("c5", "s4"), minute=2)
    read(engine, "s4", 3, *said("c5", "c6"))
    erase(engine, Target("s2"))
    publish(engine)
    execute(
        engine,
        *(f"DELETE FROM archiver.{name} WHERE session_id = 's3'" for name in ("messages", "chats", "sessions")),
        "DELETE FROM archiver.summaries WHERE session_id = 's3'",
    )
    assert "WARN=0 ERROR=0" in dbt("build", analyst, tmp_path)
    after = conversations(engine)
    assert set(after) == {"s0", "s1", "s2", "s4"}
    assert after["s0"] == before["s0"]  # not written again
    assert "a secret" in before["s2"][0]
    assert "a secret" not in after["s2"][0]
    same = "FROM analytics.sessions s JOIN marts.conversations c USING (session_id)"
    assert rows(engine, f"SELECT count(*) {same} WHERE to_jsonb(s) <@ to_jsonb(c)") == [(4,)]
    daily = "SELECT day::text, sum(chats)::int FROM {}.daily GROUP BY day ORDER BY day"
    assert rows(engine, daily.format("marts")) == rows(engine, daily.format("analytics"))

    # A migration may replace any view.
    with engine.connect() as connection:
        connection.exec_driver_sql("DROP VIEW analytics.sessions")
        connection.exec_driver_sql("DROP VIEW analytics.daily")
        connection.rollback()


def queries() -> list[tuple[str, str]]:
    board = json.loads((PACKAGE / "grafana.json").read_bytes())
    return [(panel["title"], target["rawSql"]) for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.parametrize(("title", "query"), queries())
def test_each_query_of_the_dashboard_has_an_answer(
    engine: Engine, reader: psycopg.Connection, title: str, query: str
) -> None:
    fill(engine)
    publish(engine)
    # As Grafana replaces them.
    for macro, value in (("$__timeFrom()", "'2023-01-01T00:00:00Z'"), ("$__timeTo()", "'2027-01-01T00:00:00Z'")):
        query = query.replace(macro, value)
    assert "$" not in query
    cursor = reader.execute(query.encode())
    found = cursor.fetchall()
    assert found, title
    names = [column.name for column in cursor.description or ()]
    assert names[0] in {"time", "metric", "feed", "since the newest seal"}
    assert len(names) == len(found[0])
    assert any(value is not None for row in found for value in row[1:] or row)


@on_one_version
def test_every_column_of_the_views_has_a_comment_for_tools_that_show_it(engine: Engine) -> None:
    assert (
        rows(
            engine,
            "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0"
            " WHERE c.relnamespace = 'analytics'::regnamespace AND NOT a.attisdropped"
            " AND (col_description(c.oid, a.attnum) IS NULL OR obj_description(c.oid) IS NULL)",
        )
        == []
    )
