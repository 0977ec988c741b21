"""The worker beside a receiver: a process of its own, so that reading histories does not hold up webhooks.

It is started again when it ends by itself, and ends with its parent, however that ended.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import structlog

from archiver import settings, telemetry
from archiver.app import end_with_parent
from archiver.cli.worker import work

log = structlog.get_logger(__name__)

STOP_SECONDS = 30
RESTART_SECONDS = 5


@contextmanager
def working(environment: Mapping[str, str]) -> Iterator[None]:
    """A worker meanwhile, with this environment over that of this process."""
    stopping = threading.Event()
    started = [_start(environment)]

    def watch() -> None:
        while True:
            started[0].join()
            # 0: it was told to end, as we are about to be.
            if stopping.wait(RESTART_SECONDS):
                return
            log.error("the worker ended by itself and is started again", code=started[0].exitcode)
            started[0] = _start(environment)

    watcher = threading.Thread(target=watch, name="companion", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        started[0].terminate()
        # The watcher may just have started another one: once it has ended there is none but this.
        watcher.join(STOP_SECONDS)
        started[0].terminate()
        started[0].join(STOP_SECONDS)
        started[0].kill()


def _start(environment: Mapping[str, str]) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(dict(environment),), name="worker")
    process.start()
    return process


def _run(environment: Mapping[str, str]) -> None:
    # Ctrl-C reaches the whole group: the parent decides when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in environment.items():
        os.environ[name] = value
        os.environ.pop(f"{name}_FILE", None)
    end_with_parent()
    configuration = settings.read()
    telemetry.configure_logs(configuration.log_level, configuration.log_format)
    work(configuration, environment["DATABASE_URL"])
