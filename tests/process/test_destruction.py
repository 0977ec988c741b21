"""Nothing expires while a clock is in doubt; the next run completes what a killed run ordered."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from archiver import settings
from archiver.compliance import erasure
from archiver.compliance.erasure import Target, clocks
from archiver.compliance.erasure.clocks import ClockError, ClockReading, destruction_time, read_clocks
from archiver.database import transaction
from archiver.worker.retention_tasks import RetentionTasks
from tests.support import processes, servers
from tests.support.erasures import ACT, hold, holds_text, is_rebuilt_the_same, record, texts
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver
from tests.support.rows import execute, rows
from tests.support.waiting import until

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
YEAR = {"ARCHIVER_RETENTION_DAYS": "365"}
MONTH = {"ARCHIVER_RETENTION_DAYS": "30"}

MOVED = """
import time
import time_machine
time_machine.travel(time.time() + {seconds}, tick=True).start()
"""


def moved(folder: Path, by: timedelta) -> dict[str, str]:
    """The environment of a process whose wall clock shows another time."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(MOVED.format(seconds=by.total_seconds()))
    return {"PYTHONPATH": str(folder)}


def destroys_by(engine: Engine, home: Path) -> datetime:
    with transaction(engine) as connection:
        return destruction_time(connection, home)


@on_one_version
@pytest.mark.parametrize("by", [timedelta(days=400), timedelta(minutes=5), timedelta(days=-2)])
def test_i8_a_machine_whose_clock_is_wrong_lets_nothing_expire(
    database_url: str, engine: Engine, tmp_path: Path, by: timedelta
) -> None:
    record(engine, created("c1", "s1"))
    environment = YEAR if by.days > 1 else MONTH
    environment = os.environ | environment | moved(tmp_path / "moved", by) | {"DATABASE_URL": database_url}
    command = [sys.executable, "-m", "archiver", "retention", "--yes"]
    process = subprocess.run(
        command, env=environment | {"ARCHIVER_HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stdout
    assert "this machine's clock" in process.stderr
    assert "Synchronise" in process.stderr
    assert texts(engine, "s1") == ["question of c1", "answer to c1"]
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(0,)]


def test_the_earlier_of_two_clocks_counts(engine: Engine, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    assert abs(destroys_by(engine, tmp_path) - before) < timedelta(minutes=10)
    assert destroys_by(engine, tmp_path) <= datetime.now(UTC)


def remember(home: Path, change: Callable[[ClockReading], ClockReading]) -> None:
    """As if the clocks had shown this when content was last destroyed."""
    (home / clocks.FILE).write_bytes(msgspec.json.encode(change(read_clocks())))


JUMPS: dict[str, Callable[[ClockReading], ClockReading]] = {
    "400 days in a minute": lambda now: ClockReading(now.at - timedelta(days=400), now.boot_id, now.seconds - 60),
    "5 minutes in a second": lambda now: ClockReading(now.at - timedelta(minutes=5), now.boot_id, now.seconds - 1),
    "back by an hour": lambda now: ClockReading(now.at + timedelta(hours=1), now.boot_id, now.seconds - 60),
    "standing still for a day": lambda now: ClockReading(now.at, now.boot_id, now.seconds - 86_400),
    "400 days with a restart": lambda now: ClockReading(now.at - timedelta(days=400), "another", 9.0),
    "back with a restart": lambda now: ClockReading(now.at + timedelta(hours=1), "another", 9.0),
}
PASSES: dict[str, Callable[[ClockReading], ClockReading]] = {
    "a day": lambda now: ClockReading(now.at - timedelta(days=1), now.boot_id, now.seconds - 86_400),
    "400 days": lambda now: ClockReading(now.at - timedelta(days=400), now.boot_id, now.seconds - 400 * 86_400),
    "a correction of some seconds": lambda now: ClockReading(
        now.at - timedelta(seconds=20), now.boot_id, now.seconds
    ),
    "a day with a restart": lambda now: ClockReading(now.at - timedelta(days=1), "another", 9.0),
}


@pytest.mark.parametrize("jump", JUMPS)
def test_i8_time_that_jumped_since_the_last_run_lets_nothing_expire_until_a_person_has_looked(
    engine: Engine, tmp_path: Path, jump: str
) -> None:
    remember(tmp_path, JUMPS[jump])
    for _ in range(2):
        with pytest.raises(ClockError, match=r"time (jumped|went back) by") as refused:
            destroys_by(engine, tmp_path)
        assert str(tmp_path / clocks.FILE) in str(refused.value)
    (tmp_path / clocks.FILE).unlink()
    destroys_by(engine, tmp_path)


@pytest.mark.parametrize("passes", PASSES)
def test_time_that_passed_is_no_jump(engine: Engine, tmp_path: Path, passes: str) -> None:
    remember(tmp_path, PASSES[passes])
    for _ in range(2):
        destroys_by(engine, tmp_path)


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_clock_file_is_recreated(engine: Engine, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / clocks.FILE).write_bytes(kept)
    destroys_by(engine, tmp_path)
    assert msgspec.json.decode((tmp_path / clocks.FILE).read_bytes(), type=ClockReading).at <= datetime.now(UTC)


def test_a_home_that_takes_no_file_does_not_stop_it(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    destroys_by(engine, tmp_path / "file" / "home")


@pytest.mark.parametrize("sealed_at", ["now() + interval '1 hour'", "now() + interval '400 days'", "'infinity'"])
def test_i8_a_seal_in_the_future_lets_nothing_expire(engine: Engine, tmp_path: Path, sealed_at: str) -> None:
    execute(
        engine,
        f"INSERT INTO archiver.seals VALUES (1, {sealed_at}, 0, 0, 0, 0, 0, '', '', '', '')",
        unguarded=True,
    )
    with pytest.raises(ClockError, match="the newest seal, 1,") as refused:
        destroys_by(engine, tmp_path)
    assert refused.value.reason == "seal_in_future"


def test_i8_the_duties_destroy_nothing_after_a_jump_and_go_on_with_what_was_ordered(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = MONTH | {"ARCHIVER_HOME": str(tmp_path), "ARCHIVER_ON_DELETE": "erase", "ARCHIVER_ERASE_AFTER": "0"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    record(engine, created("c1", "s1"), created("c2", "s2"), deleted("c2", "s2"), created("c3", "s3"))
    erasure.order(engine, [Target("s3")], "request", ACT)
    duties = RetentionTasks(settings.read(), engine)
    remember(tmp_path, JUMPS["400 days in a minute"])
    for duty in (duties.expire, duties.erase):
        with pytest.raises(ClockError, match=r"time (jumped|went back) by"):
            asyncio.run(duty())
    assert rows(engine, "SELECT count(*) FROM archiver.erasures WHERE rule <> 'request'") == [(0,)]
    assert texts(engine, "s3") == []
    (tmp_path / clocks.FILE).unlink()
    asyncio.run(duties.expire())
    assert texts(engine, "s1") == texts(engine, "s2") == []


SESSIONS = 30


@on_one_version
@pytest.mark.parametrize("seed", range(4))
def test_i8_a_killed_run_is_finished_by_the_next(
    database_url: str, engine: Engine, tmp_path: Path, seed: int
) -> None:
    """Killed after a random number of its steps: between order and sweep, in the sweep, or in the removal."""
    record(engine, *(created(f"c{number}", f"s{number}") for number in range(SESSIONS)), b'{"s1" broken')
    held = hold(engine, session_id="s0")
    environment = os.environ | MONTH | {"DATABASE_URL": database_url, "ARCHIVER_HOME": str(tmp_path)}
    environment["ARCHIVER_RETENTION_METADATA_DAYS"] = "60"
    chance = random.Random(seed)
    steps = "SELECT FROM archiver.erasures UNION ALL SELECT FROM archiver.events WHERE body IS NULL"
    for _ in range(2):
        already = len(rows(engine, steps))
        output = tmp_path / "output"
        process = processes.start(["retention", "--yes"], environment, stdout=output, stderr=output)
        expected = already + chance.randrange(1, SESSIONS)
        until(lambda: process.poll() is not None or len(rows(engine, steps)) >= expected, "it is at work")  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
    completed = archiver(
        "retention",
        "--yes",
        database_url=database_url,
        **MONTH,
        ARCHIVER_HOME=str(tmp_path),
        ARCHIVER_RETENTION_METADATA_DAYS="60",
    )
    assert completed.returncode == 0, completed.stderr
    assert holds_text(engine, *(f"question of c{number}" for number in range(SESSIONS))) == ["question of c0"]
    assert rows(engine, "SELECT id FROM archiver.holds WHERE released_at IS NULL") == [(held,)]
    assert is_rebuilt_the_same(engine)


@on_one_version
def test_i8_what_was_ordered_and_left_is_swept_though_nothing_more_is_old_enough(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    record(engine, created("c1", "s1"))
    environment, output = os.environ | MONTH | {"DATABASE_URL": database_url}, tmp_path / "output"
    with engine.connect() as locking:
        locking.exec_driver_sql("SELECT FROM archiver.events WHERE session_id = 's1' FOR UPDATE")
        process = processes.start(["retention", "--yes"], environment, stdout=output, stderr=output)
        until(lambda: rows(engine, "SELECT FROM archiver.erasures"), "it is ordered")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert holds_text(engine, "question of c1") == ["question of c1"]
    again: Any = archiver("retention", "--yes", "--json", database_url=database_url, **MONTH)
    assert again.returncode == 0, again.stderr
    assert msgspec.json.decode(again.stdout)["events"] == 1
    assert holds_text(engine, "question of c1") == []
