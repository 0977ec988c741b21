"""No default of a role, a database or the environment changes what is stored, or how."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import sql

from archiver import database
from archiver.database import session as sessions
from archiver.database import transaction
from tests.conftest import Cluster
from tests.support import servers
from tests.support.payloads import created
from tests.support.receivers import archiver, serving
from tests.support.upstreams import simulated
from tests.support.waiting import until

# What a user may set for a role; a value that changes what an unprepared program does.
HOSTILE = {
    "client_encoding": ["LATIN1", "SQL_ASCII", "EUC_JP"],
    "DateStyle": ["German", "SQL, DMY", "Postgres, MDY"],
    "IntervalStyle": ["sql_standard", "iso_8601"],
    "TimeZone": ["Pacific/Kiritimati", "America/St_Johns"],
    "bytea_output": ["escape"],
    "standard_conforming_strings": ["off"],
    "search_path": ["evil, public, pg_catalog"],
    "statement_timeout": ["5s"],
    "lock_timeout": ["500ms"],
    "idle_in_transaction_session_timeout": ["300ms"],
    "idle_session_timeout": ["300ms"],
    "default_transaction_isolation": ["serializable", "repeatable read"],
    "default_transaction_deferrable": ["on"],
    "extra_float_digits": ["-15"],
    "row_security": ["off"],
    "synchronous_commit": ["off"],
    "quote_all_identifiers": ["on"],
    "transform_null_equals": ["on"],
    "array_nulls": ["off"],
    "exit_on_error": ["on"],
    "jit": ["on"],
    "jit_above_cost": ["0"],
    "plan_cache_mode": ["force_generic_plan", "force_custom_plan"],
    "enable_indexscan": ["off"],
    "enable_seqscan": ["off"],
    "check_function_bodies": ["off"],
    "client_min_messages": ["debug5", "error"],
    "lc_numeric": ["C"],
    "xmloption": ["document"],
    "gin_fuzzy_search_limit": ["1"],
    "backslash_quote": ["off"],
    "work_mem": ["64kB"],
    "default_statistics_target": ["1"],
}
TEXT = "Grüße 🙂 \\ ' \" 日本 \u0000 NULL"


# Of the test's own connections, which would be ended where the machine stalls between two statements.
UNLIMITED = " ".join(
    f"-c {name}=0"
    for name in (
        *("statement_timeout", "lock_timeout"),
        *("idle_session_timeout", "idle_in_transaction_session_timeout"),
    )
)


@pytest.fixture
def hostile_url(cluster: Cluster, database_url: str) -> Iterator[str]:
    """The database of the tests, with a schema that shadows functions."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA evil")
        connection.execute("GRANT USAGE ON SCHEMA evil TO PUBLIC")
        for name, arguments in (("coalesce_", "text"), ("starts_with", "text, text"), ("sha256", "bytea")):
            connection.execute(
                f"CREATE FUNCTION evil.{name}({arguments}) RETURNS boolean LANGUAGE plpgsql"
                " AS $$ BEGIN RAISE EXCEPTION 'shadowed'; END $$"
            )
    yield database_url
    cluster.execute(f"ALTER ROLE {servers.WRITER} RESET ALL")
    cluster.execute("ALTER ROLE postgres RESET ALL")


def set_defaults(url: str, role: str, defaults: dict[str, str]) -> None:
    name = database.database_url(url).database or ""
    with psycopg.connect(url, autocommit=True, client_encoding="utf8", options=UNLIMITED) as connection:
        for setting, value in defaults.items():
            statement = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = ").format(
                sql.Identifier(role), sql.Identifier(name), sql.SQL(setting)
            )
            values = value.split(", ") if setting == "search_path" else [value]
            connection.execute(statement + sql.SQL(", ").join(map(sql.Literal, values)))


def test_each_transaction_has_the_settings_that_it_needs(hostile_url: str, cluster: Cluster) -> None:
    set_defaults(hostile_url, servers.WRITER, {name: values[0] for name, values in HOSTILE.items()})
    engine = cluster.engine(servers.as_writer(hostile_url))
    expected = dict(sessions.SETTINGS) | {"client_encoding": "UTF8", "transaction_isolation": "read committed"}
    with transaction(engine) as connection:
        for name, value in expected.items():
            result = connection.exec_driver_sql("SELECT current_setting($1, true)", (name,)).scalar()
            assert result in {value, None}, name
    engine.dispose()


LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")


def limits_of(cluster: Cluster) -> dict[str, str]:
    """Every limit that this version of Postgres knows, at its shortest."""
    names = LIMITS if cluster.version == "15" else (*LIMITS, "transaction_timeout")
    return dict.fromkeys(names, "1ms")


def test_no_default_ends_a_session_between_or_before_transactions(hostile_url: str, cluster: Cluster) -> None:
    limits = limits_of(cluster)
    set_defaults(hostile_url, servers.WRITER, limits)
    engine = cluster.engine(servers.as_writer(hostile_url), pool_size=1)
    for _ in range(20):
        with engine.connect() as connection:
            for name in limits:
                assert connection.exec_driver_sql("SELECT current_setting($1)", (name,)).scalar() == "0"
        engine.dispose()


@pytest.mark.anyio
async def test_no_default_ends_a_connection_without_an_engine(hostile_url: str, cluster: Cluster) -> None:
    limits = limits_of(cluster)
    set_defaults(hostile_url, servers.WRITER, limits)
    conninfo = database.conninfo(database.database_url(servers.as_writer(hostile_url)), "x")
    for _ in range(20):
        connection = await sessions.PoolConnection.connect(conninfo)
        for name in limits:
            cursor = await connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(name)))
            assert await cursor.fetchone() == ("0",)
        await connection.close()


def test_the_archive_is_written_in_spite_of_the_shortest_limits(
    hostile_url: str, cluster: Cluster, tmp_path: Path
) -> None:
    for role in (servers.WRITER, "postgres"):
        set_defaults(hostile_url, role, limits_of(cluster))
    with simulated() as callhq, serving(hostile_url, "--worker", **callhq.settings) as receiver:
        for number in range(20):
            assert receiver.post(created(f"c{number}", "s")).json()["status"] == "stored"
        until(lambda: "history duty started" in receiver.stderr(), "the worker runs")
        assert receiver.stop() == 0
        log = receiver.stderr()
    assert "Traceback" not in log
    assert '"level": "error"' not in log, log
    home = {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_WEBHOOK_SECRETS": "x" * 32}
    for command in (["migrate"], ["status"], ["seal"], ["verify"]):
        ended = archiver(*command, database_url=hostile_url, **home)
        assert ended.returncode == 0, (command, ended.stderr)


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in HOSTILE.items()}))
@example({name: values[0] for name, values in HOSTILE.items()})
@example({name: values[-1] for name, values in HOSTILE.items()})
@example({"client_encoding": "LATIN1"})
@hypothesis_settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_no_default_of_a_role_changes_what_is_stored(hostile_url: str, defaults: dict[str, str]) -> None:
    with psycopg.connect(hostile_url, autocommit=True, options=UNLIMITED) as connection:
        for role in (servers.WRITER, "postgres"):
            name = database.database_url(hostile_url).database
            connection.execute(f"ALTER ROLE {role} IN DATABASE {name} RESET ALL")
        connection.execute("DELETE FROM archiver.messages")
    for role in (servers.WRITER, "postgres"):
        set_defaults(hostile_url, role, defaults)
    with serving(hostile_url) as receiver:
        chat_id = uuid4().hex  # the same defaults may be drawn again
        assert receiver.post(created(chat_id, "s", input=TEXT)).json()["status"] == "stored"
        assert receiver.stop() == 0
        assert "Traceback" not in receiver.stderr()
    with psycopg.connect(hostile_url, client_encoding="utf8", options=UNLIMITED) as connection:
        query = "SELECT content FROM archiver.messages WHERE chat_id = %s AND role = 'user'"
        assert connection.execute(query, [chat_id]).fetchall() == [(TEXT.replace("\0", "\ufffd"),)]
        assert connection.execute("SELECT count(*) FROM archiver.quarantine").fetchone() == (0,)


@pytest.mark.usefixtures("durable")
def test_commands_do_not_depend_on_defaults(hostile_url: str, tmp_path: Path) -> None:
    with serving(hostile_url) as receiver:
        assert receiver.post(created("c", "s", input=TEXT)).json()["status"] == "stored"
    set_defaults(hostile_url, "postgres", {name: values[0] for name, values in HOSTILE.items()})
    home = {"ARCHIVER_HOME": str(tmp_path), "PGCLIENTENCODING": "LATIN1", "ARCHIVER_WEBHOOK_SECRETS": "x" * 32}
    for command in (
        *(["migrate"], ["migrate", "--check"], ["status"], ["status", "--json"], ["doctor"], ["seal"], ["verify"]),
        *(["rebuild", "--yes"], ["quarantine", "list"], ["export", "--all", "--output", str(tmp_path / "export")]),
        ["erase", "--session", "s", "--yes", "--reason", "Grüße 🙂"],
    ):
        ended = archiver(*command, database_url=hostile_url, **home)
        assert ended.returncode == 0, (command, ended.stderr)


@pytest.mark.parametrize("query", ["?client_encoding=latin1", ""])
def test_the_environment_and_the_url_do_not_set_the_encoding(
    database_url: str, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    url = database_url + (query.replace("?", "&") if "?" in database_url else query)
    engine = database.connect(database.database_url(url))
    with transaction(engine) as connection:
        assert connection.exec_driver_sql("SHOW client_encoding").scalar() == "UTF8"
        assert connection.exec_driver_sql("SELECT $1::text", (TEXT.replace("\0", ""),)).scalar()
    engine.dispose()
    with psycopg.connect(database.conninfo(database.database_url(url), "x")) as connection:
        assert connection.info.encoding == "utf-8"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_utf8_is_rejected_in_one_line(cluster: Cluster, encoding: str, tmp_path: Path) -> None:
    name = f"in_{encoding.lower()}"
    cluster.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    home = {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_WEBHOOK_SECRETS": "x" * 32}
    try:
        for command in (["migrate"], ["status"], ["serve", "--port", "0"], ["worker"], ["verify"], ["rebuild"]):
            ended = archiver(*command, database_url=cluster.url(name), **home)
            assert ended.returncode == 1, command
            (line,) = [each for each in ended.stderr.splitlines() if not each.startswith("{")][-1:]
            assert encoding in line
            assert "UTF8" in line
            assert "Traceback" not in ended.stderr + ended.stdout
        ended = archiver("doctor", database_url=cluster.url(name), **home)
        assert ended.returncode == 1
        assert encoding in ended.stdout
    finally:
        cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
    ],
)
def test_an_output_that_lacks_a_character_has_it_escaped(
    database_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO archiver.holds (placed_at, author, reason, session_id) VALUES (now(), 'Zoë', '🙂 日本', 's')"
        )
    settings = os.environ | {"DATABASE_URL": database_url, "ARCHIVER_HOME": str(tmp_path)} | environment
    for command in (["hold", "list"], ["hold", "list", "--json"], ["doctor"], ["status"], ["--help"]):
        run = subprocess.run(
            [sys.executable, "-m", "archiver", *command], env=settings, capture_output=True, check=False, timeout=240
        )
        assert b"Traceback" not in run.stderr, run.stderr
        assert run.returncode in {0, 1}
        if command == ["hold", "list"]:
            assert rb"\ud83d\ude42" in run.stdout
