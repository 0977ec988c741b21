"""`archiver followups tail`: what a shell pipe receives, and where the command continues."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from archiver.archive import outbox
from tests.conftest import Cluster
from tests.support.feeds import publish
from tests.support.observations import record
from tests.support.payloads import created, deleted
from tests.support.proxies import proxied
from tests.support.receivers import archiver, serving
from tests.support.rows import execute, rows
from tests.support.servers import as_writer
from tests.support.versions import on_one_version
from tests.support.waiting import until

READER = "test_reader"


@pytest.fixture
def reader_url(cluster: Cluster, database_url: str) -> str:
    """The database for a user who may read the views, and nothing else."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [READER]).fetchone():
            connection.execute(f"CREATE ROLE {READER} LOGIN IN ROLE archiver_reader")
    return database_url.replace("postgresql://postgres@", f"postgresql://{READER}@")


def lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_it_prints_changes_and_goes_on_after_a_cursor_as_a_reader(engine: Engine, reader_url: str) -> None:
    record(engine, created("a", "s"), created("b", "s"))
    record(engine, deleted("a", "s"))
    publish(engine)
    ended = archiver("followups", "tail", "--from", "0", "--no-follow", database_url=reader_url)
    assert (ended.returncode, ended.stderr) == (0, "")
    first, second, third = lines(ended.stdout)
    assert first.pop("changed_at").endswith("Z")
    expected = {"cursor": 1, "type": "chat.created", "session_id": "s", "chat_id": "a", "seal_id": None}
    assert first == expected | {"epoch": None}  # no process has served this database yet
    assert (second["chat_id"], third["type"]) == ("b", "chat.deleted")
    ended = archiver("followups", "tail", "--from", "2", "--no-follow", database_url=reader_url)
    assert [line["cursor"] for line in lines(ended.stdout)] == [3]
    only = archiver(
        *("followups", "tail", "--from", "0", "--no-follow", "--event", "chat.deleted", "--event", "seal.created"),
        database_url=as_writer(reader_url.replace(READER, "postgres")),
    )
    assert [line["cursor"] for line in lines(only.stdout)] == [3]


@on_one_version
def test_unusable_cursors_are_reported(engine: Engine, reader_url: str, database_url: str) -> None:
    for number in range(5):
        record(engine, created(f"c{number}"))
    publish(engine)
    execute(engine, "DELETE FROM archiver.changes WHERE cursor < 4")
    ended = archiver("followups", "tail", "--from", "1", "--no-follow", database_url=reader_url)
    assert "changes 2 to 3 were deleted" in ended.stderr
    assert [line["cursor"] for line in lines(ended.stdout)] == [4, 5]
    for cursor in ("0", "3"):
        ended = archiver("followups", "tail", "--from", cursor, "--no-follow", database_url=reader_url)
        assert (ended.stderr, len(lines(ended.stdout))) == ("", 2)
    ended = archiver("followups", "tail", "--from", "6", database_url=reader_url)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "the feed ends at 5" in ended.stderr
    ended = archiver("followups", "tail", "--no-follow", database_url=reader_url)
    assert (ended.returncode, "--from" in ended.stderr) == (2, True)
    execute(engine, "DROP VIEW analytics.changes")
    ended = archiver("followups", "tail", database_url=reader_url)
    assert (ended.returncode, "archiver migrate" in ended.stderr) == (1, True)


class Tail:
    """A running `archiver followups tail`."""

    def __init__(self, url: str, folder: Path, *options: str) -> None:
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "archiver", "followups", "tail", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | {"DATABASE_URL": url},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # as in a terminal
            )

    def next(self) -> dict[str, Any]:
        assert self.process.stdout
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
        return line

    def stderr(self) -> str:
        return self._stderr.read_text()


@contextmanager
def tailing(url: str, folder: Path, *options: str) -> Iterator[Tail]:
    tail = Tail(url, folder, *options)
    try:
        yield tail
    finally:
        tail.process.kill()
        tail.process.wait()
        assert tail.process.stdout
        tail.process.stdout.close()


@on_one_version
def test_it_waits_for_more_and_ends_quietly(engine: Engine, reader_url: str, tmp_path: Path) -> None:
    record(engine, created("a"))
    publish(engine)
    with tailing(reader_url, tmp_path, "--from", "0") as tail:
        assert tail.next()["cursor"] == 1
        record(engine, created("b"))
        publish(engine)
        assert tail.next()["chat_id"] == "b"
        tail.process.send_signal(signal.SIGINT)
        assert (tail.process.wait(120), tail.stderr()) == (0, "")
    with tailing(reader_url, tmp_path, "--from", "1") as tail:
        assert tail.next()["cursor"] == 2
        assert tail.process.stdout
        tail.process.stdout.close()  # as `head -1` does; nothing more is to come
        assert (tail.process.wait(120), tail.stderr()) == (0, "")


@on_one_version
def test_it_waits_for_a_database_that_is_away_and_misses_nothing(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    with proxied(database_url) as (proxy, url), tailing(url, tmp_path, "--from", "0") as tail:
        record(engine, created("a"))
        publish(engine)
        assert tail.next()["chat_id"] == "a"
        proxy.set("cut")
        until(lambda: "unavailable" in tail.stderr(), "it says that the database is away")
        record(engine, created("b"))
        publish(engine)
        proxy.set("pass")
        assert tail.next()["chat_id"] == "b"
        until(lambda: "available again" in tail.stderr(), "it says that the database is back")
        assert len(tail.stderr().splitlines()) == 2


@on_one_version
def test_received_events_reach_the_pipe_and_status_reports_a_missing_publisher(
    engine: Engine, database_url: str, reader_url: str, tmp_path: Path
) -> None:
    with serving(database_url) as receiver:
        receiver.post(created("early"))
    overdue = "UPDATE archiver.outbox SET changed_at = changed_at - interval '2 minutes'"
    execute(engine, overdue)
    status = archiver("status", database_url=database_url).stdout
    assert "No worker publishes changes: start `archiver worker`" in status
    data = json.loads(archiver("status", "--json", database_url=database_url).stdout)["feed"]
    assert (data["newest"], data["waiting"]["transactions"]) == (0, 1)
    findings = json.loads(archiver("doctor", "--json", database_url=database_url).stdout)
    assert [each["verdict"] for each in findings if each["check"] == "changes"] == ["warning"]
    only = ("--from", "0", "--event", "chat.created")  # and no seal
    with tailing(reader_url, tmp_path, *only) as tail, serving(database_url, "--worker") as receiver:
        assert tail.next()["chat_id"] == "early"
        for number in range(3):
            receiver.post(created(f"late-{number}"))
            assert tail.next()["chat_id"] == f"late-{number}"
        until(lambda: receiver.metric("archiver_changes_published_total") >= 4, "it is counted")
        assert receiver.metric("archiver_notify_failures_total") == 0
    findings = json.loads(archiver("doctor", "--json", database_url=database_url).stdout)
    assert [each["verdict"] for each in findings if each["check"] == "changes"] == ["ok"]


@on_one_version
def test_a_closed_stdout_is_no_defect(engine: Engine, database_url: str) -> None:
    record(engine, created("a"))
    publish(engine)
    command = [sys.executable, "-m", "archiver", "followups", "tail", "--from", "0", "--no-follow"]
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        env=os.environ | {"DATABASE_URL": database_url},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_types_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "changes.md").read_text()
    for name in outbox.TYPES:
        assert f"| `{name}` |" in page


@on_one_version
def test_the_examples_of_the_documentation_work_as_pasted(engine: Engine, reader_url: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "changes.md").read_text()
    examples = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    record(engine, created("a", "s"))
    publish(engine)
    polling, listening = (
        subprocess.Popen(
            [sys.executable, "-c", example],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DATABASE_URL": reader_url},
        )
        for example in examples
    )
    with polling, listening:
        try:
            assert polling.stdout
            assert listening.stdout
            assert polling.stdout.readline() == "1 chat.created s a\n"
            listens = "SELECT 1 FROM pg_stat_activity WHERE query = 'LISTEN archiver_events' AND state = 'idle'"
            until(lambda: rows(engine, listens), "it listens")
            record(engine, deleted("a", "s"))
            publish(engine)
            assert listening.stdout.readline() == "2 chat.deleted\n"
            assert polling.stdout.readline() == "2 chat.deleted s a\n"
        finally:
            polling.kill()
            listening.kill()
