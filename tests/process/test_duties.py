"""Each duty of a worker starts, fails and recovers by itself, and is reported where an operator looks (I13)."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import structlog.testing
from sqlalchemy import Engine

from archiver import database, settings
from archiver.database import transaction
from archiver.operations import heartbeats
from archiver.telemetry import duty_health
from archiver.telemetry.duty_health import Duty, Report
from archiver.worker import Worker, supervision
from tests.support.followups import receiving, subscribe
from tests.support.payloads import created
from tests.support.receivers import Receiver, archiver, serving
from tests.support.rows import rows
from tests.support.searching import keys
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres

DUTIES = (
    "reconcile",
    "seal",
    "publish",
    "followups",
    "erase",
    "retention",
    "feed_retention",
    "compact",
    "search",
    "locks",
    "rollups",
)


def up(receiver: Receiver, duty: str) -> float | None:
    """The series of a duty; None where there is none."""
    start = f'archiver_worker_up{{duty="{duty}"}} '
    lines = [line for line in receiver.get("/metrics").text.splitlines() if line.startswith(start)]
    return float(lines[0].removeprefix(start)) if lines else None


def log_lines(receiver: Receiver, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in receiver.stderr().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("ALL_PROXY", "socks5://user:hidden@127.0.0.1:9", "ALL_PROXY"),
        ("https_proxy", "nonsense://user:hidden@host", "https_proxy"),
        ("HTTP_PROXY", "http://[::1", "HTTP_PROXY"),
        ("SSL_CERT_FILE", "/nowhere/authorities.pem", "SSL_CERT_FILE"),
    ],
)
def test_i13_a_client_that_cannot_be_built_stops_reading_alone(
    variable: str, value: str, named: str, database_url: str, engine: Engine
) -> None:
    settings = {"CALLHQ_API_KEY": "key", "ARCHIVER_SEAL_EVERY": "1", variable: value}
    with serving(database_url, **settings) as receiver:
        assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
        until(lambda: rows(engine, "SELECT 1 FROM archiver.seals"), "it is sealed")
        until(lambda: rows(engine, "SELECT 1 FROM archiver.changes WHERE session_id = 's1'"), "it is published")
        until(lambda: up(receiver, "reconcile") == 0, "the metric names the duty that fails")
        until(lambda: {up(receiver, each) for each in DUTIES[1:]} == {1.0}, "the others work")
        until(lambda: receiver.metric('archiver_worker_restarts_total{duty="reconcile"}') > 0, "it is tried again")
        assert receiver.get("/readyz").status_code == 200
        (line, *_) = until(lambda: log_lines(receiver, "duty not working"), "it is logged")
        assert (line["duty"], line["state"]) == ("reconcile", "failed")
        assert named in str(line["reason"])
        assert "hidden" not in receiver.stderr()

        def reported() -> bool:
            return "reconcile failed" in " ".join(archiver("status", database_url=database_url).stdout.split())

        until(reported, "status names it")
        result = json.loads(archiver("doctor", "--json", database_url=database_url).stdout)
        (finding,) = [each for each in result if each["check"] == "duty reconcile"]
        assert finding["verdict"] == "failure"
        assert named in finding["detail"]
        assert receiver.stop() == 0
    assert rows(engine, "SELECT 1 FROM archiver.workers") == []  # it ended as it should


def test_i13_what_the_database_refuses_to_one_duty_is_reported_and_ends_with_the_refusal(
    database_url: str, engine: Engine
) -> None:
    with serving(database_url, "--worker", ARCHIVER_SEAL_EVERY="1") as receiver:
        until(lambda: {up(receiver, each) for each in DUTIES[1:]} == {1.0}, "all of them work")
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("REVOKE SELECT ON archiver.recounts FROM archiver_writer")
            until(lambda: up(receiver, "seal") == 0, "it does not seal")
            (line, *_) = until(lambda: log_lines(receiver, "duty not working"), "it is logged")
            assert (line["duty"], line["reason"]) == ("seal", "database: SQLSTATE 42501")
            assert {up(receiver, each) for each in ("publish", "followups", "erase")} == {1.0}
            connection.execute("GRANT SELECT ON archiver.recounts TO archiver_writer")
        until(lambda: up(receiver, "seal") == 1, "it seals again")
        until(lambda: log_lines(receiver, "duty recovered"), "and that is logged")
        assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
        until(lambda: rows(engine, "SELECT 1 FROM archiver.seals"), "it is sealed")


def test_i13_a_subscription_that_the_database_refuses_is_reported(database_url: str, engine: Engine) -> None:
    private = {"ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": "true"}
    with receiving() as target, serving(database_url, "--worker", **private) as receiver:
        subscription_id = subscribe(engine, target.url, "chat.created")
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("REVOKE INSERT ON archiver.attempts FROM archiver_writer")
            assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
            until(lambda: up(receiver, "followups") == 0, "its attempts cannot be recorded")
            (line, *_) = until(lambda: log_lines(receiver, "duty not working"), "it is logged")
            assert line["reason"] == f"subscription {subscription_id}: SQLSTATE 42501"
            connection.execute("GRANT INSERT ON archiver.attempts TO archiver_writer")
        until(lambda: up(receiver, "followups") == 1, "it works again")
        assert {each.message_id for each in target.got} == {target.got[0].message_id}  # sent again at most


def test_i13_a_worker_that_was_killed_or_cannot_start_is_reported_with_the_reason(
    database_url: str, tmp_path: Path
) -> None:
    every = tmp_path / "every"
    every.write_text("1")
    with serving(database_url, "--worker", ARCHIVER_SEAL_EVERY_FILE=str(every)) as receiver:
        until(lambda: up(receiver, "seal") == 1, "it works")
        every.write_text("often")
        os.kill(worker_of(receiver), signal.SIGKILL)
        (first, *_) = until(
            lambda: log_lines(receiver, "worker process exited unexpectedly; restarting"), "it is logged"
        )
        assert "SIGKILL" in str(first["reason"])
        until(lambda: log_lines(receiver, "worker process failed"), "its successor says why it cannot work")
        until(lambda: up(receiver, "worker") == 0, "the metric says so")
        tried, readings = len(log_lines(receiver, "worker process failed")), list[float | None]()

        def has_tried_again() -> bool:
            readings.append(up(receiver, "worker"))
            return len(log_lines(receiver, "worker process failed")) >= tried + 2

        until(has_tried_again, "it is started again")
        assert {*readings} == {0.0}  # also while it waits and while it starts

        def finding() -> str:
            result = json.loads(archiver("doctor", "--json", database_url=database_url).stdout)
            return "".join(each["detail"] for each in result if each["check"] == "duty worker")

        assert "ARCHIVER_SEAL_EVERY_FILE: must be a whole number" in until(
            lambda: "ARCHIVER_SEAL_EVERY_FILE" in finding() and finding(), "doctor says why"
        )
        assert receiver.get("/readyz").status_code == 200
        every.write_text("1")
        until(lambda: up(receiver, "worker") == 1 and up(receiver, "seal") == 1, "it works again")
        assert receiver.stop() == 0


def worker_of(receiver: Receiver) -> int:
    """The process beside `serve` that does the background work."""
    pid = receiver.process.pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("there is no worker")


@contextmanager
def running_worker(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker in a thread of this process."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("ARCHIVER_SEAL_EVERY", "1")
    worker = Worker(settings.read(), database.database_url(database_url))
    loop, ending = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(worker.run(ending),))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def reports(engine: Engine) -> dict[str, Report]:
    with transaction(engine) as connection:
        workers = heartbeats.select_workers(connection)
    return workers[0].duties if workers else {}


def test_i13_a_duty_that_hangs_is_reported_and_started_again(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty_health, "HANG_SECONDS", 12.0)
    monkeypatch.setattr(supervision, "LOG_SECONDS", 1.0)
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.5)
    with running_worker(database_url, monkeypatch):

        def states() -> dict[str, str]:
            return {name: report.state for name, report in reports(engine).items()}

        until(lambda: states().get("publish") == "running", "it publishes")
        with psycopg.connect(database_url) as connection:
            connection.execute("LOCK TABLE archiver.outbox IN ACCESS EXCLUSIVE MODE")

            def hanging() -> Report | None:
                report = reports(engine)["publish"]
                return report if report.state == "hanging" else None

            assert "no progress for" in until(hanging, "it hangs").reason
            until(lambda: reports(engine)["publish"].restarts > 0, "it is cut off and started again")
            others = ("seal", "followups", "erase")
            until(lambda: {states()[each] for each in others} == {"running"}, "the others go on")
        until(lambda: states()["publish"] == "running", "it publishes again")
        assert states()["reconcile"] == "off"


def test_a_duty_reports_its_first_fault_until_that_part_works_again() -> None:
    duty = Duty("seal")
    assert duty.report().state == "starting"
    duty.working()
    assert duty.report().state == "running"
    duty.failing("postgresql://me:secret@host refused", "part")
    duty.working()
    assert (duty.report().state, duty.report().reason) == ("failed", "postgresql://***@host refused")
    duty.working("part")
    assert duty.report().state == "running"
    assert duty.report("the event loop has been blocked").state == "hanging"


@pytest.mark.parametrize("fault", [MemoryError(), ImportError("no such library"), RecursionError(), KeyError("x")])
def test_i13_any_fault_of_a_duty_leaves_the_others_alone_and_is_named(
    fault: Exception, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "INITIAL_PAUSE_SECONDS", 0.01)
    ending, failed_often = asyncio.Event(), asyncio.Event()
    faulty, sound = Duty("faulty"), Duty("sound")
    steps: list[str] = []

    async def fail(_: asyncio.Event) -> None:
        steps.append(faulty.report().state)
        if len(steps) == 3:
            failed_often.set()
        raise fault

    async def work(ending: asyncio.Event) -> None:
        sound.working()
        await ending.wait()

    async def run() -> None:
        runners = [supervision.Runner(faulty, fail), supervision.Runner(sound, work)]
        supervisor = supervision.Supervisor(runners, engine)
        running = asyncio.create_task(supervisor.run(ending))
        async with asyncio.timeout(120):
            await failed_often.wait()
        assert (faulty.report().state, sound.report().state) == ("failed", "running")
        assert type(fault).__name__ in faulty.report().reason
        ending.set()
        await running

    asyncio.run(run())
    assert steps[1:3] == ["failed", "failed"]


@pytest.mark.parametrize("seconds", [float("inf"), 0.0])
def test_faults_of_several_duties_are_logged_once_for_each_reason_in_a_period(
    seconds: float, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "INITIAL_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "LOG_SECONDS", seconds)
    names = ("reconcile", "seal", "publish")
    ending = asyncio.Event()
    faults: list[str] = []

    async def fail(_: asyncio.Event) -> None:
        if len(faults) == 12:
            ending.set()
            return
        faults.append("here")
        if len(faults) % 2:
            raise KeyError("x")
        raise ImportError("no such library")

    async def run() -> None:
        runners = [supervision.Runner(Duty(name), fail) for name in names]
        async with asyncio.timeout(120):
            await supervision.Supervisor(runners, engine).run(ending)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(run())
    lines = [line for line in logs if line["event"] == "duty failed"]
    assert len({line["reason"] for line in lines}) == 2
    assert (len(lines) == 2) is (seconds > 0)
    assert {line["faults"] for line in lines} == {1}


def test_a_worker_indexes_messages_for_search(database_url: str, engine: Engine) -> None:
    with serving(database_url, "--worker") as receiver:
        until(lambda: up(receiver, "search") == 1.0, "the index is started")
        receiver.post(created("c1", "s1"))
        until(lambda: keys(engine, "question") == [("s1", "c1", 0)], "the message is found")
        status = json.loads(archiver("status", "--json", database_url=database_url).stdout)
        assert status["search"] == {"language": "pg_catalog.simple", "since": None, "has_backlog": False}
