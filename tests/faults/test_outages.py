"""`archiver serve` while Postgres is down, hanging, read-only or full, and while the spool also fails (I1)."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from archiver import embedded
from archiver.database import database_url as parse_url
from tests.conftest import Cluster
from tests.support.load import Load, assert_archived, body_of, rows
from tests.support.outages import frozen, post, stopped, until_drained, waiting
from tests.support.payloads import created
from tests.support.proxies import proxied
from tests.support.receivers import AS_IN_PRODUCTION, archiver, serving, serving_with
from tests.support.registration import TOKEN, register
from tests.support.servers import let_writer_in
from tests.support.waiting import until


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGKILL, signal.SIGINT])
def test_i1_what_comes_while_postgres_is_stopped_is_spooled_and_archived_later(
    postgres: embedded.Postgres, url: str, how: signal.Signals
) -> None:
    with serving(url) as receiver:
        assert set(post(receiver, range(10))) == {"stored"}
        with stopped(postgres, how):
            # The connection that was lost while idle may be found out before anything is asked of it, or after.
            assert set(post(receiver, range(10, 60))) == {"spooled"}
            assert set(post(receiver, range(10))) == {"spooled"}
            ready = receiver.get("/readyz")
            assert (ready.status_code, ready.json()["spool"]) == (200, "ready")
            assert "unavailable" in ready.json()["database"]
            assert waiting(receiver) == 60
            assert receiver.metric("archiver_spool_bytes") > 0
            assert receiver.metric("archiver_spool_oldest_age_seconds") > 0
        until_drained(receiver)
        assert set(post(receiver, range(60, 70))) == {"stored"}
        assert receiver.get("/readyz").json() == {"status": "ready", "database": "ready", "spool": "ready"}
    assert_archived(url, set(range(70)))
    assert rows(url, "SELECT count(*) FROM archiver.events WHERE delivery_count = 2") == [(10,)]


def test_i1_what_comes_while_postgres_hangs_is_spooled(postgres: embedded.Postgres, url: str) -> None:
    with serving_with(AS_IN_PRODUCTION, url) as receiver:
        assert set(post(receiver, range(5))) == {"stored"}
        with frozen(postgres):
            assert set(post(receiver, range(5, 40))) == {"spooled"}
            assert "silent" in receiver.get("/readyz").json()["database"]
        until_drained(receiver)
    assert_archived(url, set(range(40)))


def test_i1_under_load_everything_acknowledged_survives_an_immediate_stop(
    postgres: embedded.Postgres, url: str
) -> None:
    with serving(url) as receiver:
        load = Load([receiver.port], 8, range(10**6))
        until(lambda: len(load.answers) > 300, "it is under load")
        with stopped(postgres, signal.SIGQUIT):
            result = len(load.answers)
            until(lambda: len(load.answers) > result + 300, "it takes events all the same")
        result = len(load.answers)
        until(lambda: len(load.answers) > result + 300, "and goes on to")
        load.end()
        until_drained(receiver)
    assert not load.broken
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(url, load.acknowledged)


def test_i3_a_commit_whose_answer_is_lost_is_stored_once(url: str) -> None:
    with proxied(url) as (proxy, through), serving(through) as receiver:
        assert set(post(receiver, range(3))) == {"stored"}
        proxy.set("swallow")
        assert set(post(receiver, range(3, 6))) == {"spooled"}
        assert proxy.swallowed > 0
        proxy.set("pass")
        until_drained(receiver)
        proxy.set("cut")
        assert set(post(receiver, range(6, 9))) == {"spooled"}
        proxy.set("pass")
        until_drained(receiver)
    assert_archived(url, set(range(9)))


def test_i1_backends_that_are_terminated_within_commits_lose_nothing(own: Cluster, url: str) -> None:
    name = parse_url(url).database
    terminate = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        f" WHERE datname = '{name}' AND application_name = 'callhq-archiver' AND state <> 'idle'"
    )
    with serving(url) as receiver:
        load = Load([receiver.port], 8, range(10**6))
        ended = 0
        with psycopg.connect(own.url("postgres"), autocommit=True) as other:
            while ended < 20:
                (count,) = other.execute(terminate).fetchone() or (0,)
                ended += count
        load.end()
        until_drained(receiver)
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(url, load.acknowledged)


def test_i1_a_killed_receiver_leaves_its_spool_to_the_next(
    postgres: embedded.Postgres, url: str, tmp_path: Path
) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as receiver, stopped(postgres, signal.SIGQUIT):
        assert set(post(receiver, range(20))) == {"spooled"}
        receiver.kill()
        # With Postgres still away.
        with serving(url, **home) as second:
            assert waiting(second) == 20
            assert set(post(second, range(20, 30))) == {"spooled"}
            assert second.stop() == 0
    with serving(url, **home) as third:
        until_drained(third)
    assert_archived(url, set(range(30)))


def test_i1_sigterm_while_postgres_is_away_spools_and_answers_what_was_accepted(
    postgres: embedded.Postgres, url: str, tmp_path: Path
) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as receiver, stopped(postgres, signal.SIGQUIT):
        load = Load([receiver.port], 8, range(10**6))
        until(lambda: len(load.acknowledged) > 100, "it is under load")
        assert receiver.stop() == 0
        load.join()
    with serving(url, **home) as second:
        until_drained(second)
    assert_archived(url, load.acknowledged)


def test_several_receivers_spool_beside_each_other(postgres: embedded.Postgres, url: str, tmp_path: Path) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as one, serving(url, "--workers", "2", **home) as several:
        with stopped(postgres, signal.SIGQUIT):
            load = Load([one.port, several.port], 8, range(400))
            load.join()
        until_drained(one)
        until_drained(several)
    assert {(code, status) for _, code, status in load.answers} == {(200, "spooled")}
    assert_archived(url, set(range(400)))


def test_i1_a_database_that_only_reads_is_waited_for(own: Cluster, url: str) -> None:
    name = parse_url(url).database
    lose = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with serving(url) as receiver:
        own.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        own.execute(lose)
        until(lambda: receiver.get("/readyz").json()["database"] == "read-only", "it sees that it may only read")
        assert set(post(receiver, range(10))) == {"spooled"}
        assert receiver.get("/readyz").status_code == 200
        own.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        own.execute(lose)
        until_drained(receiver)
    assert_archived(url, set(range(10)))


def test_i1_a_full_disk_of_postgres_is_waited_for(url: str) -> None:
    with serving(url) as receiver, psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION public.fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;"
            "CREATE TRIGGER fill BEFORE INSERT ON archiver.messages EXECUTE FUNCTION public.fill()"
        )
        assert set(post(receiver, range(10))) == {"spooled"}
        assert "could not be committed" in receiver.get("/readyz").json()["database"]
        connection.execute("DROP TRIGGER fill ON archiver.messages")
        until_drained(receiver)
    assert_archived(url, set(range(10)))


def test_i12_a_full_spool_asks_to_come_again_and_loses_nothing(postgres: embedded.Postgres, url: str) -> None:
    with serving(url, ARCHIVER_SPOOL_BYTES="1048576", ARCHIVER_MAX_BODY="200000") as receiver:
        with stopped(postgres, signal.SIGQUIT):
            taken = 0
            while (reply := receiver.post(created(f"chat-{taken}", "s", input="x" * 100_000))).status_code == 200:
                taken += 1
            assert 5 < taken < 15
            assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
            assert int(reply.headers["retry-after"]) > 0
            ready = receiver.get("/readyz")
            assert (ready.status_code, ready.json()["spool"]) == (503, "full")
        until_drained(receiver)
        assert set(post(receiver, range(10_000, 10_010))) == {"stored"}
    assert rows(url, "SELECT count(*) FROM archiver.events WHERE chat_id IS NOT NULL") == [(taken + 10,)]


def test_without_a_spool_it_works_and_says_so(postgres: embedded.Postgres, url: str, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"")
    with serving(url, ARCHIVER_HOME=str(tmp_path)) as receiver:
        assert "ARCHIVER_SPOOL=off" in receiver.stderr()
        assert receiver.get("/readyz").json() == {"status": "ready", "database": "ready", "spool": "none"}
        assert set(post(receiver, range(3))) == {"stored"}
        with stopped(postgres, signal.SIGQUIT):
            assert receiver.post(body_of(4)).status_code == 503
            assert receiver.get("/readyz").status_code == 503


def test_i4_what_cannot_be_archived_is_quarantined_when_it_leaves_the_spool(
    postgres: embedded.Postgres, url: str
) -> None:
    with serving(url, ARCHIVER_API_TOKEN=TOKEN) as receiver:
        with stopped(postgres, signal.SIGQUIT):
            assert receiver.post(b"{").json() == {"status": "spooled"}
            assert set(post(receiver, range(3))) == {"spooled"}
            result = register(receiver, {"ids": ["session-1", "never-mentioned"]})
            assert (result.status_code, result.json()["status"]) == (200, "spooled")
        until_drained(receiver)
    assert rows(url, "SELECT body, reason FROM archiver.quarantine") == [(b"{", "not_json")]
    assert rows(url, "SELECT session_id FROM archiver.events WHERE type = 'session.registered' ORDER BY 1") == [
        ("never-mentioned",),
        ("session-1",),
    ]


def test_it_starts_without_its_database_and_waits_for_the_right_schema(
    postgres: embedded.Postgres, own: Cluster, tmp_path: Path
) -> None:
    own.execute("CREATE DATABASE late TEMPLATE template0")
    url = own.url("late")
    with ExitStack() as away:
        away.enter_context(stopped(postgres, signal.SIGQUIT))
        early = away.enter_context(serving(url, ARCHIVER_HOME=str(tmp_path)))
        assert "database unavailable; spooling" in early.stderr()
        assert set(post(early, range(5))) == {"spooled"}
        until(postgres.restart_if_ended, "Postgres starts again")
        until(lambda: "archiver migrate" in early.get("/readyz").json()["database"], "it misses its schema")
        assert set(post(early, range(5, 10))) == {"spooled"}
        assert archiver("migrate", database_url=url).returncode == 0
        let_writer_in(url)
        until_drained(early)
        assert_archived(url, set(range(10)))


def test_status_reports_spooled_events(postgres: embedded.Postgres, url: str, tmp_path: Path) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as receiver:
        with stopped(postgres, signal.SIGQUIT):
            assert set(post(receiver, range(7))) == {"spooled"}
            receiver.kill()
        data = json.loads(archiver("status", "--json", database_url=url, **home).stdout)
        assert (data["spool"]["events"], data["spool"]["bytes"] > 0) == (7, True)
        assert "7" in archiver("status", database_url=url, **home).stdout
