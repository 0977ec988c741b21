"""Postgres stopped or frozen, what a receiver says meanwhile, and the wait until nothing is left of it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archiver import embedded
from tests.support.load import body_of
from tests.support.receivers import Receiver
from tests.support.waiting import until


def post(receiver: Receiver, numbers: range) -> list[str]:
    """What each of these events is told."""
    return [str(receiver.post(body_of(number)).json()["status"]) for number in numbers]


def waiting(receiver: Receiver) -> float:
    return receiver.metric("archiver_spool_events")


def until_drained(receiver: Receiver) -> None:
    until(lambda: waiting(receiver) == 0, "what was spooled is archived")


@contextmanager
def stopped(postgres: embedded.Postgres, how: signal.Signals) -> Iterator[None]:
    """Its postmaster is sent this; started again in the end."""
    pid = postgres.pid
    os.kill(pid, how)
    until(lambda: not Path(f"/proc/{pid}").exists(), "Postgres ends")
    try:
        yield
    finally:
        until(lambda: postgres.restart_if_ended() or postgres.pid != pid, "Postgres starts again")


@contextmanager
def frozen(postgres: embedded.Postgres) -> Iterator[None]:
    """Every process of it stands still: connections stay, answers do not come."""
    os.kill(postgres.pid, signal.SIGSTOP)  # from now on it starts no others
    children = map(int, Path(f"/proc/{postgres.pid}/task/{postgres.pid}/children").read_text().split())
    pids = [postgres.pid, *children]
    try:
        _signal(pids, signal.SIGSTOP)
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended in between
            os.kill(pid, number)
