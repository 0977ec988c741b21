"""A primary fails and its standby is promoted: acknowledged events are kept."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest

from archiver import embedded
from tests.support.clusters import Server, placed, programs_of
from tests.support.load import Load, assert_archived, rows
from tests.support.outages import until_drained
from tests.support.receivers import archiver, serving
from tests.support.servers import let_writer_in
from tests.support.waiting import until


@pytest.fixture
def pair(postgres: embedded.Postgres) -> Iterator[tuple[Server, Server]]:
    """A primary with a database `archive`, which commits nothing that its standby has not."""
    programs, user = programs_of(postgres), postgres.data.stat().st_uid if os.getuid() == 0 else None
    with ExitStack() as stack:
        primary, standby = (stack.enter_context(placed(programs, user)) for _ in range(2))
        primary.run("initdb", "-D", primary.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        primary.start(synchronous_standby_names="*")
        with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
            connection.execute("SET synchronous_commit = local")  # there is no standby yet
            connection.execute("CREATE DATABASE archive")
        standby.run(
            "pg_basebackup", "-d", primary.url("postgres"), "-D", standby.data, "-R", "-X", "stream", "-c", "fast"
        )
        standby.start()
        query = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: rows(primary.url("postgres"), query), "the standby follows")
        yield primary, standby


def test_i1_everything_acknowledged_survives_the_death_of_the_primary(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    url = (
        f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/archive"
        "?target_session_attrs=read-write"
    )
    process = archiver("migrate", database_url=url)
    assert process.returncode == 0, process.stderr
    let_writer_in(primary.url("archive"))
    with serving(url) as receiver:
        load = Load([receiver.port], 8, range(10**6))
        until(lambda: len(load.answers) > 300, "it is under load")
        assert {status for _, _, status in list(load.answers)} == {"stored"}
        primary.kill()
        until(lambda: "spooled" in {status for *_, status in load.answers[-50:]}, "it takes events all the same")
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 100, "and goes on to")
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        until(lambda: "stored" in {status for *_, status in load.answers[-20:]}, "the standby takes events")
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 300, "it is under load again")
        load.end()
        until_drained(receiver)
    assert not load.broken
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(standby.url("archive"), load.acknowledged)


def test_a_host_that_fell_silent_leaves_time_for_the_next(
    pair: tuple[Server, Server],
) -> None:
    """As after a failover from a machine that has lost its power: nobody refuses a connection to it."""
    primary, _ = pair
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        hosts = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{primary.port}"
        url = f"postgresql://postgres@{hosts}/archive?target_session_attrs=read-write"
        assert archiver("migrate", database_url=primary.url("archive")).returncode == 0
        let_writer_in(primary.url("archive"))
        with serving(url) as receiver:
            load = Load([receiver.port], 4, range(200))
            load.join()
            until_drained(receiver)
            assert receiver.get("/readyz").json()["database"] == "ready"
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(primary.url("archive"), set(range(200)))
