"""Verify with several processes: this one begins with the first range, the others with the last.

All use the snapshot of this process. The findings and their order do not depend on where the processes meet.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import SQLAlchemyError

from archiver import database
from archiver.compliance.seals.comparing import Checked
from archiver.compliance.seals.findings import Finding
from archiver.compliance.seals.ranges import Range, Signing, VerificationContext, verify_range
from archiver.errors import ArchiverError

MAX_JOBS = 8  # unless more are requested
PARTS = 16  # ranges for each process, so that all finish at about the same time
MAX_WINDOWS_PER_RANGE = 10  # a limit, so that progress is visible
STATEMENT_SECONDS = 24 * 3600


class HelperLostError(ArchiverError):
    """A verification process was killed."""

    message = "a verification process was killed. Retry, or use --jobs 1."


class _WorkerInput(msgspec.Struct, frozen=True):
    """The input of a process, sent through a pipe instead of the command line because it contains a password."""

    url: URL
    snapshot: str
    keys: Mapping[str, bytes]  # raw
    signed_since: int
    heads: Mapping[int, bytes]
    through: int
    unbounded: frozenset[int]


class _Part(msgspec.Struct, frozen=True):
    """The findings in a range, and the number of seals and events examined."""

    findings: list[Finding]
    seals: int
    events: int


def usual_jobs() -> int:
    """Return the number of processors that this process may use, at most `MAX_JOBS`."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors, MAX_JOBS)


def is_possible(connection: Connection) -> bool:
    """Return whether the server certainly exports snapshots, which a standby may not."""
    return not connection.scalar(text("SELECT pg_is_in_recovery()"))


def verify(
    connection: Connection,
    seal_range: Range,
    context: VerificationContext,
    jobs: int,
    on_progress: Callable[[Checked], None],
) -> Generator[Finding, None, Checked]:
    """Yield the findings in a range, which several processes including this one verify. Raises `HelperLostError`."""
    work = _Work(_cut(seal_range, jobs))
    with _helpers(_worker_input(connection, context), work, min(jobs, len(work.ranges)) - 1):
        first = 0  # of the ranges that this process has not verified
        while (number := _next(work.left.popleft)) is not None:
            yield from work.verify_locally(number, connection, context)
            first = number + 1
            on_progress(work.checked())
    for number in range(first, len(work.ranges)):
        if number in work.parts:
            yield from work.parts[number].findings
        else:  # a database error stopped the process that had this range
            yield from work.verify_locally(number, connection, context)
            on_progress(work.checked())
    return work.checked()


class _Work:
    """The ranges, the numbers of those not yet assigned, and the results of those finished."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = ranges
        self.left = deque(range(len(ranges)))
        self.parts: dict[int, _Part] = {}

    def verify_locally(self, number: int, connection: Connection, context: VerificationContext) -> Iterator[Finding]:
        """Verify a range in this process, and yield each finding immediately."""
        own = Checked()
        yield from verify_range(connection, self.ranges[number], context, own)
        self.parts[number] = _Part([], own.seals, own.events)

    def hand_out(self, number: int | None, pipe: Pipe) -> None:
        """Send this range to a process, then others, last first. Raises `OSError` or `EOFError` if it has exited."""
        while number is not None:
            pipe.send(self.ranges[number])
            part: _Part | None = pipe.recv()
            if part is None:  # a database error stopped it
                return
            self.parts[number] = part
            number = _next(self.left.pop)

    def checked(self) -> Checked:
        done = list(self.parts.values())
        return Checked(seals=sum(part.seals for part in done), events=sum(part.events for part in done))


def _cut(seal_range: Range, jobs: int) -> list[Range]:
    each = max(1, min(MAX_WINDOWS_PER_RANGE, len(seal_range.windows) // (jobs * PARTS)))
    parts = [seal_range.windows[start : start + each] for start in range(0, len(seal_range.windows), each)]
    before = [seal_range.after, *(part[-1] for part in parts)]
    return [Range(after, part) for after, part in zip(before, parts, strict=False)]


def _next(take: Callable[[], int]) -> int | None:
    try:
        return take()
    except IndexError:
        return None


def _worker_input(connection: Connection, context: VerificationContext) -> _WorkerInput:
    return _WorkerInput(
        url=connection.engine.url,
        snapshot=str(connection.scalar(text("SELECT pg_export_snapshot()"))),
        keys={name: key.public_bytes_raw() for name, key in context.signing.keys.items()},
        signed_since=context.signing.since,
        heads=context.heads,
        through=context.through,
        unbounded=context.unbounded,
    )


@contextmanager
def _helpers(orders: _WorkerInput, work: _Work, count: int) -> Iterator[None]:
    """Run `count` helper processes during the block, until no range is left."""
    lost = []

    def feed(first: int, pipe: Pipe) -> None:
        try:
            work.hand_out(first, pipe)
        except (EOFError, OSError) as error:
            lost.append(error)

    helpers: list[BaseProcess] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            process, pipe = _start(orders)
            helpers.append(process)
            threads.append(threading.Thread(target=feed, args=(work.left.pop(), pipe), name="helper", daemon=True))
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()
        if lost:
            raise HelperLostError
    finally:
        work.left.clear()
        for process in helpers:
            process.kill()  # it has nothing to clean up
        for process in helpers:
            process.join()


def _start(orders: _WorkerInput) -> tuple[BaseProcess, Pipe]:
    # A spawned process needs a second for imports, half of the time that it could save. A forked process does not use
    # the connection and threads of this process. On systems other than Linux, forking is less reliable.
    context = get_context("fork") if sys.platform == "linux" else get_context("spawn")
    parent_end, its = context.Pipe()
    process = context.Process(target=_helper_main, args=(orders, its), name="verify", daemon=True)
    # Ctrl-C reaches the whole process group, even a process that is starting: this process decides when it exits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
    return process, parent_end


def _helper_main(orders: _WorkerInput, pipe: Pipe) -> None:
    """Run a helper process, which verifies one range after another until it is killed."""
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()
    keys = {name: Ed25519PublicKey.from_public_bytes(raw) for name, raw in orders.keys.items()}
    context = VerificationContext(Signing(keys, orders.signed_since), orders.heads, orders.through, orders.unbounded)
    engine = database.connect(orders.url, pool_size=1, prepared_statements=False)
    try:
        with database.snapshot(engine, statement_seconds=STATEMENT_SECONDS, exported=orders.snapshot) as connection:
            while True:
                checked = Checked()
                findings = list(verify_range(connection, pipe.recv(), context, checked))
                pipe.send(_Part(findings, checked.seals, checked.events))
    except SQLAlchemyError:
        pipe.send(None)
        threading.Event().wait()  # until it is killed, so that its last result is not lost


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
