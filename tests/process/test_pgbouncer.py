"""Debian's PgBouncer in transaction mode, as installed: it is detected, and nothing is lost or repeated."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from archiver import database
from archiver.database import transaction
from tests.conftest import Cluster
from tests.support import servers
from tests.support.payloads import created, deleted
from tests.support.pgbouncers import PROGRAMS, pooling
from tests.support.receivers import Receiver, archiver, serving
from tests.support.rows import rows
from tests.support.upstreams import simulated
from tests.support.waiting import until

UNTRACED = True

# One version of Postgres is enough: it is PgBouncer that is tested here.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


@pytest.fixture(params=PROGRAMS)
def pooled(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    with pooling(request.param, database_url) as url:
        yield url


def test_the_receiver_stores_each_delivery_once_and_says_once_what_it_found(pooled: str, engine: Engine) -> None:
    with serving(pooled, "--worker") as receiver:
        with ThreadPoolExecutor(8) as pool:
            bodies = [created(f"c{number}", f"s{number % 20}") for number in range(400)]
            answers = [answer.json()["status"] for answer in pool.map(receiver.post, bodies)]
        assert answers == ["stored"] * 400
        assert receiver.post(bodies[0]).json()["status"] == "duplicate"
        assert receiver.post(deleted("c1", "s1")).json()["status"] == "stored"
        until(lambda: rows(engine, "SELECT count(*) FROM archiver.changes") >= [(401,)], "all changes are published")
        until(lambda: sealed(engine) == 401, "the worker seals")
        assert receiver.stop() == 0
        log = receiver.stderr()
    assert "Traceback" not in log
    assert "Duplicate" not in log
    assert "spool" not in reasons(log)
    result = [line for line in log.splitlines() if "connection pooler detected" in line]
    assert 1 <= len(result) <= 3  # one for each process
    assert all("ARCHIVER_PREPARED_STATEMENTS" in line for line in result)
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(401,)]
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


def sealed(engine: Engine) -> int:
    return int(rows(engine, "SELECT coalesce(max(events_through), 0) FROM archiver.seals")[0][0] > 0) and int(
        rows(
            engine,
            "SELECT count(*) FROM archiver.events WHERE id <= (SELECT max(events_through) FROM archiver.seals)",
        )[0][0]
    )


def reasons(log: str) -> str:
    lines = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    return " ".join(str(line.get("event", "")) for line in lines if line.get("level") in {"warning", "error"})


@pytest.mark.parametrize(
    "commands",
    [
        [["migrate"], ["migrate", "--check"], ["doctor"], ["status"], ["quarantine", "list"], ["rebuild", "--yes"]],
        [["seal"], ["verify"], ["verify", "--jobs", "2"], ["seals", "list"], ["audit"], ["hold", "list"]],
        [
            ["followups", "list"],
            ["erase", "--session", "s1", "--yes", "--reason", "x"],
            ["verify"],
            ["retention", "--yes"],
        ],
    ],
)
@pytest.mark.usefixtures("durable")
def test_the_commands_work(pooled: str, commands: list[list[str]], tmp_path: Path) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_WEBHOOK_SECRETS": "a" * 32, "ARCHIVER_RETENTION_DAYS": "365"}
    with serving(pooled) as receiver:
        fill(receiver)
    for command in commands:
        for _ in range(2):  # the same server connection may come back
            ended = archiver(*command, database_url=pooled, **home)
            assert "Traceback" not in ended.stderr
            assert ended.returncode == 0 or command[0] == "erase", ended.stderr


def fill(receiver: Receiver) -> None:
    for number in range(10):
        assert receiver.post(created(f"c{number}", f"s{number % 3}")).json()["status"] == "stored"


def test_histories_are_read_and_exports_made(pooled: str, tmp_path: Path) -> None:
    with simulated() as callhq:
        environment = {**callhq.settings, "ARCHIVER_HOME": str(tmp_path / "home")}
        with serving(pooled) as receiver:
            fill(receiver)
        ended = archiver("backfill", "--all", database_url=pooled, **environment)
        assert "Traceback" not in ended.stderr
    for command in (["seal"], ["export", "--all", "--output", str(tmp_path / "export")]):
        ended = archiver(*command, database_url=pooled, ARCHIVER_HOME=str(tmp_path / "home"))
        assert ended.returncode == 0, ended.stderr


def test_doctor_reports_it(pooled: str, database_url: str, tmp_path: Path) -> None:
    def verdicts(url: str, **settings: str) -> list[tuple[str, str]]:
        home = {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_WEBHOOK_SECRETS": "a" * 32}
        ended = archiver("doctor", "--json", database_url=url, **home, **settings)
        return [(each["check"], each["verdict"]) for each in json.loads(ended.stdout) if each["check"] == "pooler"]

    assert verdicts(pooled) == [("pooler", "ok")]
    assert verdicts(pooled, ARCHIVER_PREPARED_STATEMENTS="true") == [("pooler", "warning")]
    assert verdicts(database_url) == []


def test_doctor_names_limits_that_only_a_session_without_pooler_can_change(
    pooled: str, database_url: str, cluster: Cluster, tmp_path: Path
) -> None:
    name = database.database_url(database_url).database
    home = {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_WEBHOOK_SECRETS": "a" * 32}
    for url, expected in ((pooled, ["lock_timeout = 999ms, statement_timeout = 500ms"]), (database_url, [])):
        cluster.execute(f"ALTER DATABASE {name} SET statement_timeout = '500ms'")
        cluster.execute(f"ALTER DATABASE {name} SET lock_timeout = '999ms'")
        ended = archiver("doctor", "--json", database_url=url, **home)
        found = [each["detail"] for each in json.loads(ended.stdout) if each["check"] == "limits"]
        assert found == [f"Behind a pooler these limits end sessions: {each}." for each in expected]


@pytest.mark.parametrize("program", PROGRAMS)
def test_statement_pooling_is_refused_with_the_setting_that_helps(program: str, database_url: str) -> None:
    with pooling(program, database_url, "pool_mode = statement") as url:
        for command in ("status", "migrate", "serve"):
            ended = archiver(command, database_url=url, ARCHIVER_WEBHOOK_SECRETS="a" * 32)
            assert ended.returncode == 1
            assert "Set pool_mode = transaction" in ended.stderr


def test_prepared_statements_are_kept_without_a_pooler_and_not_with_one(pooled: str, database_url: str) -> None:
    def prepared(url: str) -> int:
        engine = database.connect(database.database_url(url), pool_size=1)
        for _ in range(8):
            with transaction(engine) as connection:
                names = connection.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
        engine.dispose()
        return int(names or 0)

    assert prepared(database_url) > 0
    assert prepared(pooled) == 0
