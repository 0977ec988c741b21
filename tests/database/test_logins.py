"""Logins that read the archive: what `archiver_metrics` sees, and what `doctor` says of limits and old snapshots."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from archiver import database
from archiver.database import roles, transaction
from archiver.operations.doctor import Finding, login_checks
from archiver.operations.doctor.login_checks import examine_logins, examine_snapshots
from tests.conftest import Cluster
from tests.support.erasures import as_writer
from tests.support.histories import Archive, answer, said, turn
from tests.support.rows import rows

DOCS = Path(__file__).parents[2] / "docs"
# What a reader of numbers does not see. A new column of a view belongs here or to `roles.NEEDED`.
WITHHELD = {
    ("conversations", "name"),
    ("sessions", "first_question"),
    ("sessions", "first_answer"),
    ("sessions", "variables"),
    ("chats", "external_id"),
    ("chats", "variables"),
    ("messages", "content"),
    ("messages", "history_content"),
    ("lines", "content"),
    ("lines", "history_content"),
    ("variable_rollups", "value"),
}


def columns(engine: Engine) -> list[tuple[str, str]]:
    query = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'analytics'"
    return [(view, column) for view, column in rows(engine, query)]


def test_each_column_is_numbers_or_withheld(engine: Engine) -> None:
    readable = {
        (view, column)
        for view, column in columns(engine)
        if rows(
            engine,
            f"SELECT has_column_privilege('{roles.METRICS}', 'analytics.{view}', '{column}', 'SELECT')",
        )
        == [(True,)]
    }
    assert {*columns(engine)} - readable == WITHHELD


def test_numbers_are_read_and_content_is_refused(archive: Archive) -> None:
    archive.webhook(1, turn(1))
    archive.reading(10, answer(*said(1), *said(2)))
    with archive.engine.connect() as connection:

        def ask(query: str) -> object:
            with connection.begin():
                connection.execute(text(f"SET LOCAL ROLE {roles.METRICS}"))
                return connection.scalar(text(query))

        assert ask("SELECT count(*) FROM analytics.messages WHERE role = 'user'") == 2
        assert ask("SELECT sum(messages) FROM analytics.daily") == 4
        assert ask("SELECT max(cursor) FROM analytics.changed_sessions(0, 100)") == ask(
            "SELECT max(cursor) FROM analytics.changes"
        )
        assert ask("SELECT analytics.complete_through() IS NOT NULL") is True
        for query in (
            *(f"SELECT {column} FROM analytics.{view}" for view, column in sorted(WITHHELD)),
            "SELECT * FROM analytics.chats",
            "SELECT chats FROM analytics.chats",
            "SELECT count(*) FROM analytics.transcript('session-1')",
            "SELECT count(*) FROM archiver.messages",
        ):
            with pytest.raises(ProgrammingError) as refused:
                ask(query)
            assert database.sqlstate(refused.value) == "42501", query


# Limits


@pytest.fixture
def logins(cluster: Cluster) -> Iterator[Cluster]:
    names = ("dashboard", "chart", "counsel", "analysts")
    for name in names:
        cluster.execute(f"CREATE ROLE {name} {'NOLOGIN' if name == 'analysts' else 'LOGIN'}")
    yield cluster
    for name in names:
        cluster.execute(f"DROP ROLE {name}")


def logins_finding(engine: Engine) -> Finding:
    with transaction(engine) as connection:
        return examine_logins(connection)


def test_a_login_without_limits_is_named_with_the_lines_of_the_page(engine: Engine, logins: Cluster) -> None:
    assert logins_finding(engine).verdict == "ok"
    logins.execute("GRANT archiver_reader TO analysts")
    logins.execute("ALTER ROLE analysts SET statement_timeout = '1s'")  # which its members do not inherit
    logins.execute("GRANT analysts TO dashboard")
    finding = logins_finding(engine)
    assert (finding.check, finding.verdict) == ("logins", "warning")
    assert "dashboard lacks default_transaction_read_only, idle_in_transaction_session_timeout, jit" in finding.detail
    (page,) = re.findall(
        r"```sql\n(ALTER ROLE dashboard SET .*?)```", (DOCS / "data-model.md").read_text(), re.DOTALL
    )
    for line in page.strip().splitlines():
        logins.execute(line)
    assert logins_finding(engine).verdict == "ok"
    logins.execute("ALTER ROLE dashboard SET statement_timeout = '0ms'")
    finding = logins_finding(engine)
    assert finding.advice == "As an administrator: ALTER ROLE \"dashboard\" SET statement_timeout = '60s';"
    logins.execute(finding.advice.removeprefix("As an administrator: "))
    assert logins_finding(engine).verdict == "ok"


def test_a_login_has_the_limits_of_its_database_and_its_own_win(engine: Engine, logins: Cluster) -> None:
    logins.execute("GRANT archiver_auditor TO counsel")
    assert "counsel lacks idle_in_transaction_session_timeout, statement_timeout" in logins_finding(engine).detail
    logins.execute(f"ALTER DATABASE {engine.url.database} SET statement_timeout = '5min'")
    logins.execute(
        f"ALTER ROLE counsel IN DATABASE {engine.url.database} SET idle_in_transaction_session_timeout = 1"
    )
    assert logins_finding(engine).verdict == "ok"
    logins.execute("ALTER ROLE counsel SET statement_timeout = 0")
    assert "counsel lacks statement_timeout" in logins_finding(engine).detail


def test_a_login_that_runs_the_archiver_needs_no_limits(engine: Engine, logins: Cluster) -> None:
    logins.execute("GRANT archiver_metrics, archiver_writer TO chart")
    assert logins_finding(engine).verdict == "ok"
    logins.execute("REVOKE archiver_writer FROM chart")
    assert "chart lacks" in logins_finding(engine).detail


# Snapshots


def snapshots(engine: Engine) -> Finding:
    with transaction(engine) as connection:
        return examine_snapshots(connection)


def test_an_old_snapshot_is_named_with_its_user_and_its_end(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(psycopg.connect(database_url, application_name="a dashboard")) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM analytics.daily")
        assert snapshots(engine).verdict == "ok"
        monkeypatch.setattr(login_checks, "OLD_SECONDS", 0.0)
        finding = snapshots(engine)
        assert (finding.check, finding.verdict) == ("snapshots", "warning")
        assert (
            f"process {reader.info.backend_pid} (user {reader.info.user}, application a dashboard" in finding.detail
        )
        assert f"pg_terminate_backend({reader.info.backend_pid})" in finding.advice
        reader.rollback()
        assert "a dashboard" not in snapshots(engine).detail


def test_an_old_snapshot_is_named_to_a_user_who_may_not_see_its_time(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_writer(database_url) as writer, closing(psycopg.connect(database_url)) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM analytics.daily")
        monkeypatch.setattr(login_checks, "OLD_SECONDS", 0.0)
        assert snapshots(writer).verdict == "ok"
        monkeypatch.setattr(login_checks, "OLD_TRANSACTIONS", 0)
        assert re.search(
            rf"process {reader.info.backend_pid} \(.*state hidden\) for [0-9]+", snapshots(writer).detail
        )
        assert snapshots(engine).verdict == "warning"
