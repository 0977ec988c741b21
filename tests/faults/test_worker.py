"""`archiver worker` processes against a simulated CallHQ that records each call and its time."""

import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, text
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from archiver.database import transaction
from archiver.history import leases
from tests.support import servers
from tests.support.files import whole_lines
from tests.support.ports import free_port
from tests.support.receivers import serving
from tests.support.upstreams import CallHQ, answering, hosting, simulated
from tests.support.waiting import until
from tests.support.workers import SOON, execute, make_due, read, running_worker, running_worker_with

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

RETRY_AFTER = 20  # seconds


class Watch:
    """Stands before the platform: which sessions are asked for at the same time, and when calls begin."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self.together = 0  # calls for a session that was being read already
        self.began: list[float] = []
        self.is_refusing = False  # each call is answered 429
        self.hanging: set[str] = set()  # the paths of sessions that are never answered
        self.hung: Counter[str] = Counter()  # calls for these
        self.busy = ""  # the path of a session that is always answered 503, with a long Retry-After

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._lock:
            self.began.append(time.time())
            self.together += self._open[scope["path"]] > 0
            self._open[scope["path"]] += 1
        try:
            if scope["path"] in self.hanging:
                self.hung[scope["path"]] += 1
                while (await receive())["type"] != "http.disconnect":
                    pass
            elif scope["path"] == self.busy:
                await JSONResponse({"message": "busy"}, 503, {"retry-after": "300"})(scope, receive, send)
            elif self.is_refusing:
                await JSONResponse({"message": "busy"}, 429, {"retry-after": str(RETRY_AFTER)})(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            with self._lock:
                self._open[scope["path"]] -= 1


def test_while_callhq_is_away_one_line_a_minute_says_so(database_url: str) -> None:
    """Not three a session and round."""
    with simulated() as callhq, tempfile.NamedTemporaryFile() as log:
        make_due(database_url, callhq, 12)
        settings = {"CALLHQ_API_URL": f"http://127.0.0.1:{free_port()}/api", "CALLHQ_API_KEY": "key"}
        with running_worker(database_url, callhq, log=log, **settings):
            failing = "SELECT count(*) FROM archiver.sessions WHERE failing_since IS NOT NULL"
            until(lambda: execute(database_url, failing) == [(12,)], "each has failed")
        lines = whole_lines(Path(log.name)).splitlines()
    about = [json.loads(line) for line in lines if "retry" in line or "not read" in line]
    assert {(each["event"], "cannot connect" in each["error"]) for each in about} == {("histories not read", True)}
    moments = [datetime.fromisoformat(each["timestamp"]) for each in about]
    assert all(later - earlier > timedelta(seconds=59) for earlier, later in pairwise(moments))


@contextmanager
def enforcing(callhq: CallHQ) -> Iterator[Watch]:
    watch = Watch(callhq.app)
    with hosting(watch) as callhq.url:
        yield watch


def test_i6_due_sessions_are_read_and_the_worker_ends_on_sigterm(database_url: str) -> None:
    with simulated() as callhq, running_worker(database_url, callhq) as worker:
        make_due(database_url, callhq, 3)
        until(lambda: read(database_url) == 3, "all are read")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    assert execute(database_url, "SELECT DISTINCT state FROM analytics.coverage") == [("repaired",)]
    assert execute(
        database_url, "SELECT DISTINCT reconcile_at > read_at FROM archiver.sessions WHERE session_id <> ''"
    ) == [(True,)]


def test_two_workers_never_read_one_session_at_the_same_time(database_url: str) -> None:
    with simulated(history_latency=0.02) as callhq, enforcing(callhq) as watch:
        make_due(database_url, callhq, 200)
        with running_worker(database_url, callhq), running_worker(database_url, callhq):
            # What each of them is told to read, over and over: all that was read is due again.
            for _ in range(3):
                until(lambda: read(database_url) == 200, "all are read")
                execute(
                    database_url,
                    "UPDATE archiver.sessions SET reconciled_at = NULL, reconcile_at = now() WHERE session_id <> ''",
                )
            until(lambda: read(database_url) == 200, "all are read")
    assert watch.together == 0
    assert len(watch.began) >= 200


def test_a_worker_that_is_killed_loses_nothing(database_url: str) -> None:
    with simulated() as callhq, answering(callhq, 20) as platform:
        make_due(database_url, callhq, 100)
        with running_worker(database_url, callhq) as worker:
            until(lambda: read(database_url) > 0, "some are read")
            worker.kill()
            worker.wait()
        assert read(database_url) < 100
        platform.most = None
        # The time that leases last goes by.
        execute(
            database_url,
            "UPDATE archiver.sessions SET leased_until = now() WHERE leased_until IS NOT NULL;"
            " UPDATE archiver.sessions SET reconcile_at = now() WHERE reconciled_at IS NULL AND session_id <> ''",
        )
        with running_worker(database_url, callhq, ARCHIVER_HISTORY_CONCURRENCY="32"):
            until(lambda: read(database_url) == 100, "all are read")


def test_a_429_pauses_all_workers(database_url: str) -> None:
    with simulated(history_latency=0.05) as callhq, enforcing(callhq) as watch:
        make_due(database_url, callhq, 400)
        with running_worker(database_url, callhq), running_worker(database_url, callhq):
            until(lambda: read(database_url) > 50, "both are at work")
            watch.is_refusing = True  # until one of the two workers has met several in a row
            until(lambda: execute(database_url, "SELECT count(*) FROM archiver.pauses") == [(1,)], "they pause")
            watch.is_refusing = False
            until(lambda: read(database_url) == 400, "all are read")
        ((ended_at,),) = execute(database_url, "SELECT extract(epoch FROM until)::float FROM archiver.pauses")
    # Calls under way when the pause began, and those of a worker that had just looked, are not held back: only the
    # second half of the pause is silent for certain.
    late = [began for began in watch.began if ended_at - RETRY_AFTER / 2 < began < ended_at]
    assert late == []


def test_a_session_that_is_always_answered_503_delays_no_other(database_url: str) -> None:
    with simulated() as callhq, enforcing(callhq) as watch:
        make_due(database_url, callhq, 40)
        ((session_id,),) = execute(database_url, "SELECT min(session_id) FROM archiver.events")
        watch.busy = f"/api/chats/session/{session_id}"
        with running_worker(database_url, callhq, ARCHIVER_HISTORY_CONCURRENCY="2"):
            until(lambda: read(database_url) == 39, "all others are read")
            query = "SELECT round(extract(epoch FROM reconcile_at - failing_since)) FROM archiver.sessions"
            failing = f"{query} WHERE failing_since IS NOT NULL"
            until(lambda: execute(database_url, failing) == [(300,)], "and this one is asked for when it is to be")
    assert execute(database_url, "SELECT count(*) FROM archiver.pauses") == [(0,)]


def test_i13_sessions_whose_histories_hang_leave_turns_for_others(database_url: str) -> None:
    with simulated() as callhq, enforcing(callhq) as watch:
        make_due(database_url, callhq, 40)
        ids = execute(database_url, "SELECT session_id FROM archiver.events")
        watch.hanging = {f"/api/chats/session/{session_id}" for (session_id,) in ids}
        limits = {"archiver.worker.histories.FIRST_SECONDS": 2.0, "archiver.worker.histories.RETRY_SECONDS": 6.0}
        with running_worker_with(limits, database_url, callhq, ARCHIVER_HISTORY_CONCURRENCY="4"):
            until(lambda: watch.hung, "they hang")
            make_due(database_url, callhq, 20)
            until(lambda: read(database_url) == 20, "all others are read")
            # From now on, each call for one of the 40 takes three times as long.
            until(lambda: len(watch.hung) == 40 and max(watch.hung.values()) > 1, "retries hang, too")
            make_due(database_url, callhq, 20)
            until(lambda: read(database_url) == 40, "all others are read again")
            failing = "SELECT count(*) FROM archiver.sessions WHERE failing_since IS NOT NULL"
            until(lambda: execute(database_url, failing) == [(40,)], "and these 40 are tried again later")


def test_i13_a_session_that_another_program_holds_keeps_no_other_from_being_read(database_url: str) -> None:
    with simulated() as callhq:
        make_due(database_url, callhq, 60)
        first = "(SELECT min(session_id) FROM archiver.events)"
        with psycopg.connect(database_url) as beside:
            beside.execute(f"SELECT FROM archiver.sessions WHERE session_id = {first} FOR UPDATE")
            with running_worker(database_url, callhq):
                until(lambda: read(database_url) == 59, "all others are read")
                beside.rollback()
                until(lambda: read(database_url) == 60, "and then this one")


def test_serve_has_a_worker_that_is_started_again_and_ends_with_it(database_url: str) -> None:
    with simulated() as callhq:
        make_due(database_url, callhq, 1)
        with serving(database_url, **callhq.settings, **SOON) as receiver:
            until(lambda: read(database_url) == 1, "it is read")
            until(lambda: receiver.metric("archiver_repaired_messages_total") > 0, "and counted")
            (worker,) = children(receiver.process.pid)
            os.kill(worker, signal.SIGKILL)
            (again,) = until(lambda: children(receiver.process.pid) - {worker}, "another worker")
            receiver.kill()
            until(lambda: not Path(f"/proc/{again}").exists(), "the worker ends with its parent")


def children(pid: int) -> set[int]:
    """Its worker processes: not the helper that multiprocessing keeps."""
    result = set()
    for line in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in line.read_text().split():
            with suppress(FileNotFoundError):  # ended in between
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    result.add(int(child))
    return result


def test_a_great_backlog_is_handed_out_oldest_expiry_first(engine: Engine) -> None:
    with transaction(engine, statement_seconds=120) as connection:
        connection.execute(
            text(
                "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, read_by, reconcile_at)"
                " SELECT 's' || n, now(), now(), now() + (n * 7919 % 100000) * interval '1 second', now()"
                " FROM generate_series(1, 100000) n"
            )
        )
    handed: list[str] = []
    now = datetime.now(UTC) + timedelta(seconds=5)
    while True:
        with transaction(engine) as connection:
            due = leases.select_due(connection, now, 5_000)
            part = leases.claim_listed(connection, due, now, now + timedelta(minutes=10))
        if not part:
            break
        handed += [session_id for session_id, _ in part]
    assert len(handed) == len(set(handed)) == 100_000
    with transaction(engine) as connection:
        query = "SELECT session_id FROM archiver.sessions WHERE session_id <> '' ORDER BY read_by, session_id"
        assert handed == list(connection.scalars(text(query)))


def test_a_worker_whose_connections_are_lost_at_its_start_goes_on(database_url: str) -> None:
    with simulated() as callhq, running_worker(database_url, callhq) as worker:
        # As soon as it holds one, and again.
        for _ in range(4):
            until(lambda: execute(database_url, TERMINATE), "it is connected")
        make_due(database_url, callhq, 1)
        until(lambda: read(database_url) == 1, "it is read")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0


# Of its jobs: what it does before them ends it, as it ends any command.
TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'callhq-archiver worker'"
    " AND datname = current_database()"
)


@pytest.mark.parametrize("is_unstorable", [False, True], ids=["", "not_even_its_failure_can_be_stored"])
def test_i13_a_session_on_which_the_archiver_fails_keeps_no_other_from_being_read(
    database_url: str, *, is_unstorable: bool
) -> None:
    with simulated() as callhq, tempfile.NamedTemporaryFile() as log:
        make_due(database_url, callhq, 60)
        # No history has the session of unassigned turns: the client raises `ValueError`.
        execute(
            database_url,
            "UPDATE archiver.sessions SET first_event_at = now(), last_event_at = now(),"
            " read_by = now() + interval '1 hour', reconcile_at = now() - interval '1 hour' WHERE session_id = ''",
        )
        if is_unstorable:
            execute(
                database_url,
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " RAISE EXCEPTION 'disk' USING ERRCODE = 'io_error'; END $$;"
                " CREATE TRIGGER refuse BEFORE UPDATE ON archiver.sessions FOR EACH ROW"
                " WHEN (new.failing_since IS NOT NULL) EXECUTE FUNCTION refuse()",
            )
        with running_worker(database_url, callhq, log=log):
            until(lambda: read(database_url) == 60, "all others are read", 180)
            failing = "SELECT failing_since IS NOT NULL FROM archiver.sessions WHERE session_id = ''"
            until(lambda: execute(database_url, failing) == [(not is_unstorable,)], "and this one is asked for later")
        lines = Path(log.name).read_text(encoding="utf-8")
    assert "history not read" in lines
    assert "ValueError" in lines
