"""The supervisor of a worker: starts duties, restarts them with backoff, and reports their state.

The reports come from a thread with its own connection, so that neither a duty that blocks the event loop nor one that
uses up its connections can stop them.
"""

import asyncio
import os
import random
import socket
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic

import msgspec
import psycopg
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver import database, telemetry
from archiver.compliance.erasure.clocks import ClockError
from archiver.compliance.seals import BoundsError, SequenceError
from archiver.database.identity import ForeignDatabaseError
from archiver.operations import heartbeats
from archiver.settings import SettingsError
from archiver.telemetry.duty_health import Duty, Report, fault_location

log = structlog.get_logger(__name__)

INITIAL_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
UNAVAILABLE_PAUSE_SECONDS = 2.0  # maximum pause while the database is unavailable
STABLE_SECONDS = 60.0  # a duty that ran at least this long is restarted after the shortest pause
GRACE_SECONDS = 20.0  # for work in progress at shutdown
LOOP_SECONDS = 1.0
BLOCKED_SECONDS = 60.0  # without an iteration of the event loop
LOG_SECONDS = 60.0
CLEAN_SECONDS = 3_600.0
_UNAVAILABLE = (DBAPIError, PoolTimeoutError, TimeoutError, psycopg.OperationalError)


class Runner(msgspec.Struct, frozen=True):
    """A duty and the work that it does until `ending` is set.

    `may_cancel`: whether a hanging duty may be cancelled and restarted; false if a thread would continue to run.
    """

    duty: Duty
    run: Callable[[asyncio.Event], Awaitable[None]]
    may_cancel: bool = True


def reason_of(error: BaseException) -> str:
    """Return a description of a fault for operators; for errors of libraries, only type and location."""
    cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError | psycopg.Error) else error
    if isinstance(error, SettingsError | ForeignDatabaseError | ClockError | BoundsError | SequenceError):
        return str(error)
    if isinstance(cause, SQLAlchemyError | psycopg.Error):
        return f"database: {database.explain(cause)}"
    if isinstance(error, ImportError):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__} at {fault_location(error)}"


class Supervisor:
    """The supervisor of duties; a fault in one does not affect the others. Their state is stored with `engine`."""

    def __init__(self, runners: Sequence[Runner], engine: Engine) -> None:
        self._runners = runners
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._faults = _FaultLog()
        self._watch = _Watch(runners, engine, self._cancel)

    async def run(self, ending: asyncio.Event) -> None:
        """Run all duties until `ending` is set. Duties that have not ended `GRACE_SECONDS` later are cancelled."""
        ticking = asyncio.create_task(self._tick())
        self._watch.start(asyncio.get_running_loop())
        try:
            supervised = [asyncio.create_task(self._supervise(each, ending)) for each in self._runners]
            await ending.wait()
            _, late = await asyncio.wait(supervised, timeout=GRACE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*supervised, return_exceptions=True)
        finally:
            ticking.cancel()
            await asyncio.to_thread(self._watch.stop)

    async def _tick(self) -> None:
        while True:
            self._watch.loop_beat_at = monotonic()
            await asyncio.sleep(LOOP_SECONDS)

    def _cancel(self, name: str) -> None:
        """Cancel a hanging duty. Call it on the event loop."""
        if task := self._tasks.get(name):
            task.cancel()

    async def _supervise(self, runner: Runner, ending: asyncio.Event) -> None:
        duty, pause = runner.duty, INITIAL_PAUSE_SECONDS
        while not ending.is_set():
            duty.beat()
            began = monotonic()
            error = await self._run_once(runner, ending)
            if ending.is_set():
                return
            if error is not None:
                duty.failing(reason := reason_of(error))
                self._faults.add(duty.name, reason, error)
            if monotonic() - began > STABLE_SECONDS:
                pause = INITIAL_PAUSE_SECONDS
            longest = UNAVAILABLE_PAUSE_SECONDS if isinstance(error, _UNAVAILABLE) else MAX_PAUSE_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(_keep_alive(ending, duty), min(pause, longest) * random.uniform(0.8, 1.2))  # noqa: S311  # jitter
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            duty.restarts += 1
            telemetry.worker_restarts.labels(duty.name).inc()

    async def _run_once(self, runner: Runner, ending: asyncio.Event) -> Exception | None:
        """Run the duty until it ends or fails, and return the error; None if a hanging duty was cancelled."""
        task = asyncio.ensure_future(runner.run(ending))
        self._tasks[runner.duty.name] = task
        try:
            await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            return None
        error = task.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error or _EndedError()


class _FaultLog:
    """Log one line per minute and reason: an unavailable database makes all duties fail repeatedly."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[float, int]] = {}  # the last line of each reason, and faults since

    def add(self, duty: str, reason: str, error: Exception) -> None:
        """Count a fault, and log it if a line is due. `faults`: the number of faults since the previous line."""
        now = monotonic()
        logged_at, faults = self._logged.get(reason, (float("-inf"), 0))
        if now - logged_at < LOG_SECONDS:
            self._logged[reason] = logged_at, faults + 1
            return
        self._logged = {each: known for each, known in self._logged.items() if now - known[0] < CLEAN_SECONDS}
        self._logged[reason] = now, 0
        log.error("duty failed", duty=duty, reason=reason, faults=faults + 1, exc_info=error)


class _EndedError(Exception):
    """The duty ended although it should have continued."""


async def _keep_alive(ending: asyncio.Event, duty: Duty) -> None:
    """Wait until `ending` is set, and report progress: a duty that waits for its restart is not hanging."""
    while not ending.is_set():
        duty.beat()
        with suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), LOOP_SECONDS)


class _Watch:
    """A thread that checks the duties every second, reports their state, and cancels hanging ones."""

    def __init__(self, runners: Sequence[Runner], engine: Engine, cancel: Callable[[str], None]) -> None:
        self._runners, self._engine, self._cancel = runners, engine, cancel
        self._process = heartbeats.Process(f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}")
        self.loop_beat_at = monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main = threading.get_ident()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._logged: dict[str, tuple[str, float]] = {}
        self._cut_off: set[str] = set()
        self._recorded_at = self._cleaned_at = float("-inf")
        self._fault = ""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread. Call it on the event loop, whose thread is watched."""
        self._loop, self._main, self.loop_beat_at = loop, threading.get_ident(), monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and delete the row of this worker."""
        self._ending.set()
        self._thread.join(GRACE_SECONDS)
        with suppress(SQLAlchemyError), database.transaction(self._engine, statement_seconds=2) as connection:
            heartbeats.delete_worker(connection, self._process.id)

    def _run(self) -> None:
        while not self._ending.wait(LOOP_SECONDS):
            try:
                self._look()
            except Exception:  # supervisor of the watch itself
                log.exception("duty supervision failed")

    def _look(self) -> None:
        stuck = self._stuck()
        reports = {each.duty.name: each.duty.report(stuck) for each in self._runners}
        for runner in self._runners:
            self._handle(runner, reports[runner.duty.name], stuck)
        if monotonic() - self._recorded_at >= heartbeats.BEAT_SECONDS:
            self._recorded_at = monotonic()
            self._record(reports)

    def _stuck(self) -> str:
        """Describe where the event loop has been blocked for `BLOCKED_SECONDS`; empty if it has not."""
        silent = monotonic() - self.loop_beat_at
        frame = sys._current_frames().get(self._main)
        if silent < BLOCKED_SECONDS or frame is None:
            return ""
        code = frame.f_code
        return f"the event loop has been blocked for {silent:.0f} s in {code.co_filename}:{frame.f_lineno}"

    def _handle(self, runner: Runner, report: Report, stuck: str) -> None:
        name = runner.duty.name
        if report.state != "off":
            telemetry.worker_up.labels(name).set(report.state == "running")
        if report.state != "hanging":
            self._cut_off.discard(name)
        elif runner.may_cancel and not stuck and name not in self._cut_off and self._loop is not None:
            self._cut_off.add(name)
            self._loop.call_soon_threadsafe(self._cancel, name)
        self._log_state(name, report)

    def _log_state(self, name: str, report: Report) -> None:
        """Log one line at the start of a fault, one per minute while it lasts, and one at its end."""
        state, logged_at = self._logged.get(name, ("", float("-inf")))
        fields = {"duty": name, "state": report.state, "restarts": report.restarts}
        if report.is_faulty:
            if state != report.state or monotonic() - logged_at >= LOG_SECONDS:
                log.error("duty not working", reason=report.reason, since=report.since.isoformat(), **fields)
                self._logged[name] = (report.state, monotonic())
        elif name in self._logged and report.state == "running":
            del self._logged[name]
            log.info("duty recovered", **fields)

    def _record(self, reports: dict[str, Report]) -> None:
        try:
            with database.transaction(self._engine, statement_seconds=5, lock_seconds=2) as connection:
                heartbeats.upsert_worker(connection, self._process, reports)
                if monotonic() - self._cleaned_at >= CLEAN_SECONDS:
                    heartbeats.delete_old(connection)
                    self._cleaned_at = monotonic()
        except SQLAlchemyError as error:
            fault = database.explain(error)
            telemetry.heartbeat_failures.labels(database.sqlstate(error) or "none").inc()
            if fault != self._fault:
                log.warning("duty state not recorded", reason=fault)
            self._fault = fault
        else:
            self._fault = ""
