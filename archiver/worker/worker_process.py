"""Run a worker: as a command, or as a child of a receiver, so that fetching histories does not delay webhooks.

The worker of a receiver is restarted if it exits unexpectedly, and always exits with its parent.
`worker.supervision` restarts failed duties inside it; this module reports failures of the whole process.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import structlog
import uvloop
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, settings, telemetry
from archiver.compliance.seals import signing_key
from archiver.database.connections import Connections
from archiver.operations import heartbeats, reloading
from archiver.operations.audit_settings import record_settings
from archiver.operations.child_processes import exit_with_parent
from archiver.operations.reloading import Reloading
from archiver.settings import Settings, SettingsError
from archiver.telemetry.duty_health import Report, fault_location
from archiver.worker import Worker

log = structlog.get_logger(__name__)

STOP_SECONDS = 30
INITIAL_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
STABLE_SECONDS = 60.0  # a worker that ran at least this long is restarted after the shortest pause
PROCESS = "worker"  # reported as a duty: the process as a whole


def work(
    configuration: Settings, url: str, used: Mapping[str, str], started: Callable[[], None] = lambda: None
) -> None:
    """Run the duties until SIGTERM or Ctrl-C. `used`: digests of the settings files, taken before they were read.

    Calls `started` once, when the duties begin to run.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(configuration, url, used, started))


async def _work(configuration: Settings, url: str, used: Mapping[str, str], started: Callable[[], None]) -> None:
    """Run the duties; new settings take effect after the duties with the previous settings have ended."""
    stopped, given, is_started = asyncio.Event(), configuration, False
    ending = asyncio.Event()

    def stop() -> None:
        stopped.set()
        ending.set()

    async def reload(new: Settings) -> None:
        nonlocal given
        signing_key(new)
        database.database_url(_url(new, url))
        given = new
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    files = Reloading(reload, used)
    while not stopped.is_set():
        ending.clear()
        at = _url(given, url)
        await asyncio.to_thread(_record_settings, given, at)
        worker = Worker(given, database.database_url(at), files)
        if not is_started:
            is_started = True
            started()
        await worker.run(ending)
    log.info("worker stopped")


def _url(configuration: Settings, embedded: str) -> str:
    return configuration.database_url.get_secret_value() if configuration.database_url else embedded


def _record_settings(configuration: Settings, url: str) -> None:
    with Connections(database.database_url(url), configuration.prepared_statements).synchronous() as engine:
        record_settings(engine, configuration, "worker")


@contextmanager
def running_worker(environment: Mapping[str, str], url: str) -> Iterator["WorkerProcess"]:
    """Run a worker process during the block, with this environment in addition to the process's own.

    `url`: the database where faults of the whole process are reported; also used if the settings name no database.
    """
    worker_process = WorkerProcess(environment, url)
    try:
        yield worker_process
    finally:
        worker_process.stop()


class WorkerProcess:
    """The worker process, restarted if it exits unexpectedly."""

    def __init__(self, environment: Mapping[str, str], url: str) -> None:
        self._environment, self._url = environment, url
        self._id = f"{socket.gethostname()}:{os.getpid()}:serve"
        self._stopping = threading.Event()
        self._restarts = 0
        self._process, self._reports = _start(environment, url)
        self._reason = _NO_REASON
        self._watcher = threading.Thread(target=self._watch, name="companion", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop the worker with SIGTERM, or with SIGKILL if it does not exit in time."""
        self._stopping.set()
        self._process.terminate()
        # The watcher may just have started another process; once the watcher has ended, this is the only one.
        self._watcher.join(STOP_SECONDS)
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        self._process.kill()

    def hang_up(self) -> None:
        """Send SIGHUP, so that the worker reloads its settings files. A starting worker receives it when ready."""
        pid = self._process.pid
        if pid is not None and self._process.exitcode is None:
            os.kill(pid, signal.SIGHUP)

    def _watch(self) -> None:
        pause, is_recorded = INITIAL_PAUSE_SECONDS, False
        while True:
            self._wait_for_start()
            while self._is_alive_after(STABLE_SECONDS):
                pause = INITIAL_PAUSE_SECONDS
                is_recorded = is_recorded and not self._record(None)
            # The signal that stopped the worker may be about to stop this process.
            if self._stopping.wait(INITIAL_PAUSE_SECONDS):
                return
            is_recorded = self._report_end() or is_recorded
            if self._stopping.wait(pause - INITIAL_PAUSE_SECONDS):
                return
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            self._restarts += 1
            telemetry.worker_restarts.labels(PROCESS).inc()
            self._process, self._reports = _start(self._environment, self._url)

    def _wait_for_start(self) -> None:
        """Wait until the duties run or the process has exited."""
        self._reason = _NO_REASON
        wait([self._process.sentinel, self._reports])
        self._receive()

    def _is_alive_after(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.is_alive()

    def _receive(self) -> None:
        """Receive the reports of the process: None when its duties begin to run, otherwise why it failed."""
        with suppress(EOFError, OSError):
            while self._reports.poll():
                reason = self._reports.recv()
                if reason is None:
                    telemetry.worker_up.labels(PROCESS).set(1)
                else:
                    self._reason = str(reason)

    def _report_end(self) -> bool:
        """Report that the process has exited; return whether the database stored the fault."""
        self._receive()
        self._reports.close()
        telemetry.worker_up.labels(PROCESS).set(0)
        code = self._process.exitcode
        reason = f"the process {_exit_text(code)}: {self._reason}"
        log.error("worker process exited unexpectedly; restarting", code=code, reason=reason)
        return self._record(reason)

    def _record(self, reason: str | None) -> bool:
        """Record a fault for `status` and `doctor`, or delete it if None; return whether the database did so."""
        try:
            with (
                Connections(database.database_url(self._url)).synchronous() as engine,
                database.transaction(engine, statement_seconds=5, lock_seconds=2) as connection,
            ):
                if reason is None:
                    heartbeats.delete_worker(connection, self._id)
                else:
                    report = Report("failed", datetime.now(UTC), reason, self._restarts)
                    heartbeats.upsert_worker(connection, heartbeats.Process(self._id), {PROCESS: report})
        except (SettingsError, SQLAlchemyError):
            return False
        return True


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"was terminated by {name}"
    return f"exited with code {code}"


_NO_REASON = "no reason reported; see the worker's log, and the system log for an out-of-memory kill"


def _start(environment: Mapping[str, str], url: str) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(dict(environment), url, sending), name="worker")
    process.start()
    sending.close()
    return process, receiving


def _run(environment: Mapping[str, str], url: str, reports: Connection) -> None:
    # Ctrl-C signals the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in environment.items():
        os.environ[name] = value
        os.environ.pop(f"{name}_FILE", None)
    exit_with_parent()
    telemetry.configure_logs("info", "auto")  # until the settings are read
    try:
        used = reloading.look()
        configuration = settings.read()
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        work(configuration, url, used, lambda: reports.send(None))
    except Exception as error:  # the outermost frame of the process
        reason = (
            str(error) if isinstance(error, SettingsError) else f"{type(error).__name__} at {fault_location(error)}"
        )
        log.exception("worker process failed", reason=reason)
        reports.send(reason)
        sys.exit(1)
