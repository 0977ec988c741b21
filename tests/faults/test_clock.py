"""A receiver whose wall clock is set back by hours while it runs: all is archived once, and read in time (I3, I6).

time-machine, inside its process, moves what `time` and `datetime` tell there, and nothing else.
"""

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from archiver import embedded
from tests.support.load import Load, assert_archived, body_of, rows
from tests.support.outages import post, stopped, until_drained, waiting
from tests.support.receivers import serving
from tests.support.upstreams import hosting, simulated
from tests.support.waiting import until
from tests.support.workers import SOON, make_due, read, running_worker

BACK = timedelta(hours=5)

# Read by every Python that finds it, and so by the receiver and by nothing else.
MOVED = f"""
import os, signal, time
def move(*_):
    import time_machine
    time_machine.travel(time.time() - {BACK.total_seconds()}, tick=True).start()
    with open(os.environ["MOVED_TO"], "w") as told:
        told.write(str(time.time()))
signal.signal(signal.SIGUSR2, move)
"""


# A clock that is ahead from the start, by the hours that the environment names, until a signal puts it right.
AHEAD = """
import os, signal, time
import time_machine
travel = time_machine.travel(time.time() + 3600 * float(os.environ["HOURS_AHEAD"]), tick=True)
travel.start()
def put_right(*_):
    travel.stop()
    with open(os.environ["MOVED_TO"], "w") as told:
        told.write(str(time.time()))
signal.signal(signal.SIGUSR2, put_right)
"""


class RequestLog:
    """Stands before the platform, and knows for which sessions it was asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.sessions: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.sessions.add(scope["path"].rpartition("/")[2])
        await self._app(scope, receive, send)


def test_i3_a_clock_that_is_set_back_by_hours_loses_and_doubles_nothing(
    postgres: embedded.Postgres, url: str, tmp_path: Path
) -> None:
    """Under load, with deliveries on the spool from before and after; a worker whose clock is right reads on."""
    (tmp_path / "sitecustomize.py").write_text(MOVED)
    result = tmp_path / "told"
    moved = {"PYTHONPATH": str(tmp_path), "MOVED_TO": str(result), "ARCHIVER_HOME": str(tmp_path / "home")}
    with serving(url, **moved, **SOON) as receiver:
        load = Load([receiver.port], 8, range(10**6))
        until(lambda: len(load.answers) > 200, "it is under load")
        with stopped(postgres, signal.SIGQUIT):
            until(lambda: waiting(receiver) > 100, "events are spooled")
            receiver.signal(signal.SIGUSR2)
            until(lambda: result.exists() and result.read_text(), "its clock is set back")
            behind = datetime.now(UTC) - datetime.fromtimestamp(float(result.read_text()), UTC)
            assert abs(behind - BACK) < timedelta(minutes=1)
            before = waiting(receiver)
            until(lambda: waiting(receiver) > before + 100, "and go on to be")
            assert receiver.metric("archiver_spool_oldest_age_seconds") >= 0
        until(lambda: load.answers[-1][2] == "stored", "Postgres takes events again")
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 200, "it is under load again")
        load.end()
        until_drained(receiver)
        assert not load.broken
        assert {code for _, code, _ in load.answers} == {200}
        assert set(post(receiver, range(20))) == {"duplicate"}
    assert_archived(url, load.acknowledged)
    ((behind,),) = rows(url, "SELECT now() - min(received_at) FROM archiver.events")
    assert abs(behind - BACK) < timedelta(minutes=2), "it did go by that clock"
    late = "SELECT count(*) FROM archiver.sessions WHERE reconcile_at > now() + interval '1 minute'"
    assert rows(url, late) == [(0,)]
    assert rows(url, "SELECT count(*) FROM archiver.sessions WHERE reconcile_at IS NULL AND session_id <> ''") == [
        (0,)
    ]
    with simulated() as callhq, hosting(asked := RequestLog(callhq.app)) as callhq.url, running_worker(url, callhq):
        sessions = {f"session-{number}" for number in range(20)}
        until(lambda: asked.sessions == sessions, "every session is asked for")


def seals(url: str) -> int:
    ((count,),) = rows(url, "SELECT count(*) FROM archiver.seals")
    return int(count)


def test_i13_a_worker_whose_clock_was_ahead_and_came_back_goes_on_with_every_duty(url: str, tmp_path: Path) -> None:
    """It seals and reads while its clock is an hour ahead, and once that is right; no job is made up for."""
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    result = tmp_path / "told"
    moved: dict[str, Any] = {"PYTHONPATH": str(tmp_path), "MOVED_TO": str(result), "HOURS_AHEAD": "1"}
    with (
        simulated() as callhq,
        hosting(asked := RequestLog(callhq.app)) as callhq.url,
        serving(url, ARCHIVER_HOME=str(tmp_path / "home"), **SOON) as receiver,
        running_worker(url, callhq, ARCHIVER_SEAL_EVERY="1", **moved) as worker,
    ):
        post(receiver, range(3))
        until(lambda: seals(url) and asked.sessions, "it works by a clock that is ahead")
        before = seals(url)
        worker.send_signal(signal.SIGUSR2)
        until(result.exists, "its clock is right")
        receiver.post(body_of(2_000_003))
        until(lambda: seals(url) > before, "it seals")
        until(lambda: len(asked.sessions) > 1, "it reads what is due")
        ((jobs,),) = rows(url, "SELECT count(*) FROM archiver_jobs.procrastinate_jobs")
        assert jobs < 50
        assert rows(url, "SELECT count(*) FROM archiver.seals WHERE sealed_at > now() + interval '1 minute'") == [
            (0,)
        ]
        late = "SELECT count(*) FROM archiver.sessions WHERE leased_until > now() + interval '5 minutes'"
        assert rows(url, late) == [(0,)]


def test_what_a_receiver_a_day_ahead_takes_is_read_in_time(url: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    moved = {"PYTHONPATH": str(tmp_path), "MOVED_TO": str(tmp_path / "told"), "HOURS_AHEAD": "24"}
    with serving(url, ARCHIVER_HOME=str(tmp_path / "home"), **moved, **SOON) as receiver:
        assert set(post(receiver, range(5))) == {"stored"}
        assert receiver.metric("archiver_clock_difference_seconds") > 80_000
    late = "SELECT count(*) FROM archiver.events WHERE last_received_at > now() + interval '2 minutes'"
    assert rows(url, late) == [(0,)]
    late = "SELECT count(*) FROM archiver.sessions WHERE reconcile_at > now() + interval '5 minutes'"
    assert rows(url, late) == [(0,)]


@pytest.mark.parametrize("hours", ["5", "-5"])
def test_i6_a_reading_is_dated_by_postgres_though_the_clock_of_the_worker_is_wrong(
    hours: str, url: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    wrong = {"PYTHONPATH": str(tmp_path), "MOVED_TO": str(tmp_path / "told"), "HOURS_AHEAD": hours}
    with simulated() as callhq, running_worker(url, callhq, log=None, **wrong, ARCHIVER_HOME=str(tmp_path)):
        make_due(url, callhq, 2)
        until(lambda: read(url) == 2, "they are read")
    query = "SELECT count(*), bool_and(abs(extract(epoch FROM received_at - now())) < 300) FROM archiver.events"
    assert rows(url, f"{query} WHERE source = 'history'") == [(2, True)]
    query = "SELECT bool_and(abs(extract(epoch FROM reconciled_at - now())) < 300) FROM archiver.sessions"
    assert rows(url, query) == [(True,)]
