"""Move deliveries from one spool file to Postgres, oldest first; a failing or slow one delays no other.

A drain reads the file in passes. Deliveries that fail while Postgres stores others are left for the next pass, which
has smaller transactions. A delivery that fails in its own transaction is written separately from the passes, with its
own time limit. A delivery on which Postgres crashes is found in the same way, and is quarantined.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

import msgspec
import structlog

from archiver.events import Content, Delivery
from archiver.inbound.circuit import Circuit
from archiver.inbound.isolated import IsolatedWriter
from archiver.inbound.spool import Spool, Spooled, SpoolError
from archiver.inbound.writing import Outcome, Result, UnavailableError

log = structlog.get_logger(__name__)

INITIAL_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 2.0
DRAIN_EVENTS = 200  # per transaction
DRAIN_BYTES = 8 * 1_048_576  # per transaction
SPLIT = 8  # divisor of the events per transaction for the next pass
# Limits of a transaction of the first pass, and of the smaller ones of later passes.
FULL_SECONDS, SMALL_SECONDS = 3.0, 1.0
CRASHES = 3  # connections lost while one event was written, each after a trial event; then it is quarantined
MAX_ISOLATED, MAX_ISOLATED_BYTES = 50, 32 * 1_048_576  # in memory at a time; the rest stays on disk

Waiting = tuple[Spooled, Delivery[Content]]
Write = Callable[[Sequence[Delivery[Content]], float], Awaitable[Sequence[Result]]]


class DrainPass(msgspec.Struct):
    """The result of a pass: numbers of events to retry in smaller transactions, and of events left on disk for later.

    `is_broken_off`: the circuit opened during the pass, or is still open. `has_crashed`: the connection was lost
    although Postgres had just stored a trial event.
    """

    failed: int = 0
    parked: int = 0
    is_broken_off: bool = False
    has_crashed: bool = False


class Drain:
    """A drain that empties one file.

    `write` writes deliveries together within a number of seconds and returns their outcomes. `on_change` is called
    after each change of the file. Set `arrived` whenever a delivery is spooled.
    """

    def __init__(
        self, spool: Spool, write: Write, circuit: Circuit, isolated: IsolatedWriter, on_change: Callable[[], None]
    ) -> None:
        self._spool, self._write_together = spool, write
        self._circuit, self._isolated, self._on_change = circuit, isolated, on_change
        self._singles: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._single_bytes = 0
        self._crashes = Counter[tuple[int, int]]()  # of Postgres, by the event that was written
        self.arrived = asyncio.Event()

    async def empty(self) -> None:
        """Drain until the file is empty. Raises `SpoolError`."""
        try:
            await self._empty()
        finally:
            singles = list(self._singles.values())
            for task in singles:
                task.cancel()  # its delivery stays on disk
            if singles:
                await asyncio.wait(singles)

    async def _empty(self) -> None:
        size, pause = DRAIN_EVENTS, INITIAL_PAUSE_SECONDS
        while True:
            self.arrived.clear()
            passed = await self._drain_page(size)
            if passed.is_broken_off:
                size = max(1, size // SPLIT) if passed.has_crashed else size
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            elif passed.failed:
                size, pause = max(1, size // SPLIT), INITIAL_PAUSE_SECONDS
            elif self._singles or passed.parked:
                size, pause = DRAIN_EVENTS, INITIAL_PAUSE_SECONDS
                await self._wait_for_work()
            elif not self.arrived.is_set():
                self._crashes.clear()
                return

    async def _wait_for_work(self) -> None:
        """Wait until a delivery is spooled, or a separate write is done, but at most `MAX_PAUSE_SECONDS`."""
        arriving = asyncio.create_task(self.arrived.wait())
        await asyncio.wait(
            {arriving, *self._singles.values()},
            timeout=MAX_PAUSE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        arriving.cancel()

    async def _drain_page(self, size: int) -> DrainPass:
        passed, after = DrainPass(), 0
        while page := await asyncio.to_thread(self._spool.select_oldest, after, size, DRAIN_BYTES):
            after = page[-1].id
            waiting = [each for spooled in page if (each := self._batchable(spooled, passed)) is not None]
            if not waiting:
                continue
            began, is_trial = monotonic(), self._circuit.is_open
            if is_trial and not await self._circuit.allows_trial():
                passed.is_broken_off = True
                return passed
            faults = await self._write(waiting, FULL_SECONDS if size == DRAIN_EVENTS else SMALL_SECONDS)
            if faults and self._circuit.is_open:
                passed.is_broken_off = True
                passed.has_crashed = is_trial and all(fault.is_disconnected for fault in faults)
                if passed.has_crashed and len(waiting) == 1:
                    self._crashes[_key(waiting[0][0])] += 1
                return passed
            if faults and len(waiting) == 1:
                self._write_alone(*waiting[0], passed)
            else:
                passed.failed += len(faults)
            if not faults:
                await asyncio.sleep(monotonic() - began)  # leaves half of the time for new events
        return passed

    async def _write(self, waiting: Sequence[Waiting], seconds: float) -> list[UnavailableError]:
        """Write deliveries; return a fault for each one that Postgres did not store, after the circuit judged it."""
        if len(waiting) == 1 and self._crashes[_key(waiting[0][0])] >= CRASHES:
            results: Sequence[Result] = [await self._isolated.quarantine(waiting[0][1], CRASHES)]
        else:
            results = await self._write_together([delivery for _, delivery in waiting], seconds)
        taken = [each for (each, _), result in zip(waiting, results, strict=True) if isinstance(result, Outcome)]
        if taken:
            self._circuit.close()
            await asyncio.to_thread(self._spool.delete, taken)
            self._on_change()
        faults = [result for result in results if isinstance(result, UnavailableError)]
        if faults:
            await self._circuit.judge(faults)
        return faults

    def _batchable(self, spooled: Spooled, passed: DrainPass) -> Waiting | None:
        """Return the row and its delivery; None if it is written separately, which this call starts if needed."""
        if _key(spooled) in self._singles:
            return None
        delivery = spooled.restore()
        if not self._isolated.knows(delivery.subject):
            return spooled, delivery
        self._write_alone(spooled, delivery, passed)
        return None

    def _write_alone(self, spooled: Spooled, delivery: Delivery[Content], passed: DrainPass) -> None:
        is_full = len(self._singles) >= MAX_ISOLATED or self._single_bytes > MAX_ISOLATED_BYTES
        if is_full and self._singles:
            passed.parked += 1
            return
        self._single_bytes += spooled.size
        task = asyncio.create_task(self._until_stored(spooled, delivery))
        self._singles[_key(spooled)] = task
        task.add_done_callback(lambda done: self._done(spooled, done))

    async def _until_stored(self, spooled: Spooled, delivery: Delivery[Content]) -> None:
        while isinstance(await self._isolated.write(delivery), UnavailableError):  # noqa: ASYNC110  # no event ends it
            await asyncio.sleep(MAX_PAUSE_SECONDS)
        await asyncio.to_thread(self._spool.delete, [spooled])
        self._on_change()

    def _done(self, spooled: Spooled, task: asyncio.Task[None]) -> None:
        del self._singles[_key(spooled)]
        self._single_bytes -= spooled.size
        error = None if task.cancelled() else task.exception()
        if error is not None:  # the delivery is still on disk, and the next pass finds it
            trace = None if isinstance(error, SpoolError) else (type(error), error, error.__traceback__)
            log.error("spooled event not committed", reason=str(error) if trace is None else "", exc_info=trace)


def _key(spooled: Spooled) -> tuple[int, int]:
    return spooled.file, spooled.id
