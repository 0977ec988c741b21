"""Transactions and statements, on connections of both kinds."""

import ast
import asyncio
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

import archiver
from archiver import database
from archiver.database import RawStatement, copy_out, execute, run_async, sqlstate, transaction
from tests.support.rows import rows

Work = Callable[[Connection], Any]
Runner = Callable[[Work], Any]

TAKE = RawStatement("INSERT INTO public.taken (number) VALUES ($1::int) RETURNING number")
PUT = RawStatement("INSERT INTO public.taken (number) VALUES ($1::int)")
COUNT = RawStatement("SELECT count(*)::int AS held, $1::text AS told FROM public.taken")
ONE = RawStatement("SELECT 1 AS one")
MUCH = "x" * 10_000_000  # more than any buffer on the way takes at once


@pytest.fixture(params=["plain", "asyncio"])
def run(request: pytest.FixtureRequest, database_url: str) -> Iterator[Runner]:
    """Runs work in a transaction of its own, of a database with a table `taken`."""
    url = database.database_url(database_url)
    with transaction(engine := database.connect(url)) as connection:
        connection.exec_driver_sql("CREATE TABLE public.taken (number int PRIMARY KEY)")
    if request.param == "plain":
        yield lambda work: database.run(engine, work)
    else:
        running = asyncio.Runner()
        loop = database.connect_async(url)
        yield lambda work: running.run(run_async(loop, work))
        running.run(loop.dispose())
        running.close()
    engine.dispose()


def held(run: Runner) -> int:
    return int(run(lambda connection: execute(connection, COUNT.bind(""))[0][0].held))


def test_each_statement_sees_what_those_before_it_did_and_has_its_own_answer(run: Runner) -> None:
    first, nothing, second = run(
        lambda connection: execute(connection, TAKE.bind(1), PUT.bind(2), COUNT.bind("as text")),
    )
    assert [row.number for row in first] == [1]
    assert nothing == []
    assert [(row.held, row.told) for row in second] == [(2, "as text")]
    assert held(run) == 2


def test_nothing_to_execute_is_no_fault(run: Runner) -> None:
    assert run(execute) == []


@pytest.mark.parametrize("told", ["little", MUCH], ids=["little", "much"])
def test_no_statement_runs_after_the_first_failure_whose_error_is_raised(
    run: Runner, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work(connection: Connection) -> list[Any]:
        execute(connection, PUT.bind(1))
        with pytest.raises(DBAPIError) as raised, connection.begin_nested():
            execute(connection, PUT.bind(2), PUT.bind(1), COUNT.bind(told), PUT.bind(3), COUNT.bind(told))
        assert sqlstate(raised.value) == "23505"
        assert raised.value.statement == PUT.bind(1).text
        assert not raised.value.connection_invalidated
        return execute(connection, TAKE.bind(4), COUNT.bind(""))

    _, ((after, _),) = run(work)
    assert (after, held(run)) == (2, 2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_connection_lost_between_statements_is_reported_as_lost_and_replaced(run: Runner) -> None:
    suicide = RawStatement("SELECT pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(DBAPIError) as raised:
        run(lambda connection: execute(connection, PUT.bind(1), suicide.bind(), PUT.bind(2)))
    assert raised.value.connection_invalidated
    assert held(run) == 0


def test_no_caller_fails_when_all_idle_connections_were_lost(database_url: str) -> None:
    async def lose() -> int:
        engine = database.connect_async(database.database_url(database_url), pool_size=3)
        together = asyncio.Barrier(3)

        async def use() -> None:
            async with engine.connect() as connection:
                await connection.exec_driver_sql("SELECT 1")
                await together.wait()

        await asyncio.gather(*(use() for _ in range(3)))
        others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        end = f"{others} AND datname = current_database()"
        with transaction(plain := database.connect(database.database_url(database_url))) as connection:
            assert connection.exec_driver_sql(end).scalar() == 3
        plain.dispose()
        ((row,),) = await run_async(engine, lambda c: execute(c, ONE.bind()))
        await engine.dispose()
        return int(row.one)

    assert asyncio.run(lose()) == 1


def test_a_cancelled_transaction_leaves_no_connection_in_an_unknown_state(database_url: str) -> None:
    async def cut_off() -> int:
        engine = database.connect_async(database.database_url(database_url), pool_size=1)
        sleep = RawStatement("SELECT pg_sleep(60)")
        with pytest.raises(TimeoutError):
            await run_async(engine, lambda c: execute(c, ONE.bind(), sleep.bind()), seconds=0.2)
        ((row,),) = await run_async(engine, lambda c: execute(c, ONE.bind()))
        await engine.dispose()
        return int(row.one)

    assert asyncio.run(cut_off()) == 1


# Conflicts with other transactions


def failing(*states: str) -> tuple[Work, list[None]]:
    """Work whose first attempts fail with these SQLSTATEs after a write, and the attempts it has had."""
    attempts: list[None] = []

    def work(connection: Connection) -> Any:
        number = len(attempts)
        attempts.append(None)
        execute(connection, PUT.bind(1))
        if number < len(states):
            fail = f"DO $$ BEGIN RAISE EXCEPTION 'in the way' USING ERRCODE = '{states[number]}'; END $$"
            execute(connection, RawStatement(fail).bind())

    return work, attempts


def failed(state: str) -> float:
    return REGISTRY.get_sample_value("archiver_commit_failures_total", {"sqlstate": state}) or 0


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_work_is_retried_after_three_conflicts_and_each_is_counted(run: Runner, state: str) -> None:
    before = failed(state)
    work, attempts = failing(*[state] * 3)
    run(work)
    assert (len(attempts), held(run), failed(state) - before) == (4, 1, 3)


@pytest.mark.parametrize(("states", "tried"), [(["40001"] * 4, 4), (["40001", "22012"], 2), (["55P03"], 1)])
def test_a_fourth_conflict_and_any_other_error_are_raised(run: Runner, states: Sequence[str], tried: int) -> None:
    work, attempts = failing(*states)
    with pytest.raises(DBAPIError) as raised:
        run(work)
    assert (sqlstate(raised.value), len(attempts), held(run)) == (states[-1], tried, 0)


@pytest.mark.parametrize(
    ("states", "tried"),
    [(["55P03", "40001"], 3), (["55P03"] * 3, 3), (["40001", "55P03", "40P01"], 3), (["55P03", "57014"], 2)],
)
def test_a_lock_that_is_not_free_is_tried_again(database_url: str, states: Sequence[str], tried: int) -> None:
    with transaction(engine := database.connect(database.database_url(database_url))) as connection:
        connection.exec_driver_sql("CREATE TABLE public.taken (number int PRIMARY KEY)")
    work, attempts = failing(*states)
    if len(states) < tried:
        database.run_until_locked(engine, work, lock_seconds=1, attempts=3, pause_seconds=0.001)
    else:
        with pytest.raises(DBAPIError) as raised:
            database.run_until_locked(engine, work, lock_seconds=1, attempts=3, pause_seconds=0.001)
        assert sqlstate(raised.value) == states[-1]
    assert len(attempts) == tried
    engine.dispose()


# Rows copied out


@pytest.mark.parametrize("read", [copy_out.rows, copy_out.lines])
@pytest.mark.parametrize(
    ("fault", "state"), [("1 / (100000 - i)", "22012"), ("i, pg_cancel_backend(pg_backend_pid())", "57014")]
)
def test_a_copy_that_fails_half_way_says_why_and_leaves_the_connection_to_others(
    read: Callable[..., Generator[Any]], fault: str, state: str, database_url: str
) -> None:
    engine = database.connect(database.database_url(database_url))
    copied = sql.SQL(f"COPY (SELECT {fault} FROM generate_series(1, 200000) AS i) TO STDOUT (FORMAT BINARY)")
    with transaction(engine) as connection:
        with (
            pytest.raises(DBAPIError) as raised,
            connection.begin_nested(),
            closing(read(connection, copied)) as rows,
        ):
            for _ in rows:
                pass
        assert sqlstate(raised.value) == state
        assert execute(connection, ONE.bind())[0][0].one == 1
    engine.dispose()


@pytest.mark.parametrize("read", [copy_out.rows, copy_out.lines])
def test_a_connection_lost_within_a_copy_is_reported_as_lost(
    read: Callable[..., Generator[Any]], database_url: str
) -> None:
    engine = database.connect(database.database_url(database_url))
    end = "CASE i WHEN 100000 THEN pg_terminate_backend(pg_backend_pid()) END"
    copied = sql.SQL(f"COPY (SELECT i, {end} FROM generate_series(1, 200000) AS i) TO STDOUT (FORMAT BINARY)")
    with (
        pytest.raises(DBAPIError) as raised,
        transaction(engine) as connection,
        closing(read(connection, copied)) as rows,
    ):
        for _ in rows:
            pass
    assert raised.value.connection_invalidated
    with transaction(engine) as connection:
        assert execute(connection, ONE.bind())[0][0].one == 1
    engine.dispose()


def test_engines_are_opened_in_one_place_of_each_process() -> None:
    package = Path(archiver.__file__).parent
    opening = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"(database\.)?connect(_async)?", ast.unparse(node.func)):
                opening.add(str(file.relative_to(package)))
    assert opening == {
        "database/connections.py",
        "database/schema.py",  # of a migration that creates indexes concurrently
        "http/__init__.py",  # its engines can be directed to another database
        "http/console_service.py",  # likewise
        "database/lock_waits.py",  # of a thread that watches another engine
        "compliance/seals/parallel.py",  # of a process that helps with a verification
    }


def test_i5_isolation_is_read_committed_regardless_of_the_database_default(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(f"ALTER DATABASE {engine.url.database} SET default_transaction_isolation = 'serializable'")
        )
    engine.dispose()
    assert rows(engine, "SHOW transaction_isolation") == [("read committed",)]


def test_the_worker_reaches_a_database_whose_folder_or_password_holds_a_space() -> None:
    url = database.database_url(
        "postgresql://anna:a%20b%2Bc@/archive?host=/tmp/my%20archive,/tmp/other&port=5432,5433"
    )
    result = conninfo_to_dict(database.conninfo(url, "a worker"))
    assert (result["host"], result["port"], result["password"]) == (
        "/tmp/my archive,/tmp/other",
        "5432,5433",
        "a b+c",
    )
    assert (result["user"], result["dbname"]) == ("anna", "archive")


@pytest.mark.parametrize(("query", "seconds"), [("", 5), ("?host=/tmp/one,/tmp/other", 2), ("?connect_timeout=9", 9)])
def test_the_worker_limits_the_time_to_connect_itself(query: str, seconds: int) -> None:
    url = database.database_url(f"postgresql://anna@/archive{query}")
    assert str(conninfo_to_dict(database.conninfo(url, "a worker"))["connect_timeout"]) == str(seconds)
