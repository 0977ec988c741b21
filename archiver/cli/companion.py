"""The worker beside a receiver: a process of its own, so that reading histories does not hold up webhooks.

It is started again when it ends by itself, and ends with its parent, however that ended. Its duties fail and recover
inside it (`worker.supervision`); what ends the whole process is reported from here.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import structlog
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, heartbeats, reloading, settings, telemetry
from archiver.app import end_with_parent
from archiver.cli.worker import work
from archiver.duties import Report, where
from archiver.settings import SettingsError

log = structlog.get_logger(__name__)

STOP_SECONDS = 30
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
STEADY_SECONDS = 60.0  # a worker that ran for so long is started again after the first pause
PROCESS = "worker"  # stands for the whole process among the duties


@contextmanager
def working(environment: Mapping[str, str], url: str) -> Iterator["Companion"]:
    """Run a worker until the end of the block, with this environment over that of this process.

    `url`: of the database, where the settings name none; and where faults of the whole process are reported.
    """
    companion = Companion(environment, url)
    try:
        yield companion
    finally:
        companion.stop()


class Companion:
    """The process of the worker, started again where it ended by itself."""

    def __init__(self, environment: Mapping[str, str], url: str) -> None:
        self._environment, self._url = environment, url
        self._id = f"{socket.gethostname()}:{os.getpid()}:serve"
        self._stopping = threading.Event()
        self._restarts = 0
        self._process, self._said = _start(environment, url)
        self._watcher = threading.Thread(target=self._watch, name="companion", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """End the worker: SIGTERM first."""
        self._stopping.set()
        self._process.terminate()
        # The watcher may just have started another one: once it has ended there is none but this.
        self._watcher.join(STOP_SECONDS)
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        self._process.kill()

    def hang_up(self) -> None:
        """Send SIGHUP, which it keeps back until it is ready: it reads its files again."""
        pid = self._process.pid
        if pid is not None and self._process.exitcode is None:
            os.kill(pid, signal.SIGHUP)

    def _watch(self) -> None:
        pause, is_recorded = FIRST_PAUSE_SECONDS, False
        while True:
            telemetry.worker_up.labels(PROCESS).set(1)
            self._process.join(STEADY_SECONDS)
            if self._process.is_alive():
                pause = FIRST_PAUSE_SECONDS
                is_recorded = is_recorded and not self._record(None)
                continue
            # 0: it was stopped by a signal, as this process is about to be.
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._restarts += 1
            telemetry.worker_up.labels(PROCESS).set(0)
            telemetry.worker_restarts.labels(PROCESS).inc()
            code = self._process.exitcode
            reason = f"the process ended with {_named(code)}: {_received(self._said)}"
            log.error("the worker ended by itself and is started again", code=code, reason=reason)
            is_recorded = self._record(reason) or is_recorded
            self._process, self._said = _start(self._environment, self._url)

    def _record(self, reason: str | None) -> bool:
        """Report the fault where `status` and `doctor` look, or withdraw it; whether the database took that."""
        try:
            engine = database.connect(database.database_url(self._url), pool_size=1)
            with database.transaction(engine, statement_seconds=5, lock_seconds=2) as connection:
                if reason is None:
                    heartbeats.delete_worker(connection, self._id)
                else:
                    report = Report("failed", datetime.now(UTC), reason, self._restarts)
                    heartbeats.upsert_worker(connection, heartbeats.Process(self._id), {PROCESS: report})
            engine.dispose()
        except (SettingsError, SQLAlchemyError):
            return False
        return True


def _named(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"code {code}"


def _received(said: Connection) -> str:
    """Return what the process said about its end."""
    try:
        return str(said.recv()) if said.poll() else _SAID_NOTHING
    except (EOFError, OSError):
        return _SAID_NOTHING
    finally:
        said.close()


_SAID_NOTHING = "it gave no reason; see the log before this line, and the machine's log for a lack of memory"


def _start(environment: Mapping[str, str], url: str) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(dict(environment), url, sending), name="worker")
    process.start()
    sending.close()
    return process, receiving


def _run(environment: Mapping[str, str], url: str, said: Connection) -> None:
    # Ctrl-C reaches the whole group: the parent decides when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in environment.items():
        os.environ[name] = value
        os.environ.pop(f"{name}_FILE", None)
    end_with_parent()
    telemetry.configure_logs("info", "auto")  # until the settings are read
    try:
        used = reloading.look()
        configuration = settings.read()
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        work(configuration, url, used)
    except Exception as error:  # the outermost frame of the process
        reason = str(error) if isinstance(error, SettingsError) else f"{type(error).__name__} at {where(error)}"
        log.exception("the worker cannot work", reason=reason)
        said.send(reason)
        sys.exit(1)
