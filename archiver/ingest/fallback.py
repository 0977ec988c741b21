"""What Postgres does not take goes to the spool, and from there to Postgres once it takes events again."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.ingest.probe import database_fault
from archiver.ingest.writing import Delivery, Outcome, Result, UnavailableError, restore, write
from archiver.projection import Timing
from archiver.spool import Spool, Spooled, SpoolError, open_left_behind

log = structlog.get_logger(__name__)

SPOOL_AFTER_SECONDS = 5.0  # without an answer from Postgres; senders wait no longer than some ten
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 2.0
ADOPT_SECONDS = 30.0  # between two looks for what other processes left behind
TOLD_SECONDS = 60.0
DRAIN_EVENTS = 200  # of one transaction
DRAIN_BYTES = 8 * 1_048_576  # likewise


class Fallback:
    """Makes deliveries durable: in Postgres, or else on the spool. `drain` brings them from there to Postgres.

    `is_open`: Postgres did not take what it was last given, so nobody waits for it until `drain` finds that it takes
    events again.
    """

    def __init__(self, engine: AsyncEngine, spool: Spool, timing: Timing) -> None:
        self._engine, self.spool, self._timing = engine, spool, timing
        self._spooled = asyncio.Event()
        self._told_at = -TOLD_SECONDS
        self.is_open = False
        self._spool_fault = ""  # why it did not take what it was last given
        if spool.events:
            self._spooled.set()
        self._gauge()

    async def write(self, deliveries: Sequence[Delivery]) -> list[Result]:
        """For each delivery what became of it: `spooled` where it is not in Postgres, but on disk."""
        results: list[Result] = [UnavailableError()] * len(deliveries)
        if not self.is_open:
            results = await write(self._engine, deliveries, self._timing, SPOOL_AFTER_SECONDS)
        left = [place for place, result in enumerate(results) if isinstance(result, UnavailableError)]
        if left:
            self._open()
            spooled = await self._append([_spooled(deliveries[place]) for place in left])
            for place in left if spooled else ():
                results[place] = Outcome("spooled")
        return results

    async def drain(self) -> None:
        """For ever: what waits on the spool goes to Postgres, the oldest first; new events go beside it."""
        while True:
            try:
                await self._drain_once()
            except Exception:  # the supervisor: whatever happens, what is on disk is tried again
                log.exception("draining failed")
                self._spooled.set()
                await asyncio.sleep(LONGEST_PAUSE_SECONDS)

    async def _drain_once(self) -> None:
        try:
            async with asyncio.timeout(ADOPT_SECONDS):
                await self._spooled.wait()
        except TimeoutError:
            await self._adopt()
            return
        self._spooled.clear()
        try:
            await self._empty(self.spool)
        except SpoolError as error:
            self._tell_spool_fault(error)
            self._spooled.set()
        if self.is_open and await self._is_back():
            self._close(self.spool)  # the spool took nothing that could have shown it
        elif self.is_open or self._spooled.is_set():
            self._spooled.set()
            await asyncio.sleep(LONGEST_PAUSE_SECONDS)

    async def _append(self, deliveries: Sequence[Spooled]) -> bool:
        try:
            await asyncio.to_thread(self.spool.append, deliveries)
        except SpoolError as error:
            self._tell_spool_fault(error)
            return False
        self._spool_fault = ""
        self._spooled.set()
        self._gauge()
        return True

    async def _adopt(self) -> None:
        """Drain what a process that has ended left behind."""
        try:
            left_behind = open_left_behind(self.spool.path.parent)
            while spool := await asyncio.to_thread(next, left_behind, None):
                log.info("draining what another process spooled", file=spool.path.name, events=spool.events)
                await self._empty(spool)
        except SpoolError as error:
            self._tell_spool_fault(error)

    async def _empty(self, spool: Spool) -> None:
        """Until nothing is left. Raises `SpoolError`.

        A delivery that alone keeps Postgres busy for too long is passed over until all others are through.
        """
        after, most, pause = 0, DRAIN_EVENTS, FIRST_PAUSE_SECONDS
        while waiting := await asyncio.to_thread(spool.select_oldest, after, most, DRAIN_BYTES):
            started = monotonic()
            results = await self._write_again(waiting)
            taken = [each for each, result in zip(waiting, results, strict=True) if isinstance(result, Outcome)]
            await asyncio.to_thread(spool.delete, taken)
            self._gauge()
            if taken:
                self._close(spool)
                most, pause = min(2 * most, DRAIN_EVENTS), FIRST_PAUSE_SECONDS
                await asyncio.sleep(monotonic() - started)  # half of the time is left to new events
            elif not self.is_open and most > 1:
                most //= 2
            else:
                after = 0 if self.is_open else waiting[-1].id
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        if after:
            self._spooled.set()

    async def _write_again(self, waiting: Sequence[Spooled]) -> Sequence[Result]:
        """`UnavailableError` for all if Postgres takes nothing at present."""
        results: Sequence[Result] = [UnavailableError()] * len(waiting)
        if self.is_open and not await self._is_back():
            return results
        results = await write(self._engine, [_delivery(each) for each in waiting], self._timing, SPOOL_AFTER_SECONDS)
        faults = [result for result in results if isinstance(result, UnavailableError)]
        # What takes too long may be the fault of these very events; anything else is Postgres's.
        if faults and not (all(fault.is_slow for fault in faults) and await self._is_back()):
            self._open()
        return results

    async def _is_back(self) -> bool:
        fault = await database_fault(self._engine)
        if fault is not None and monotonic() - self._told_at >= TOLD_SECONDS:
            self._told_at = monotonic()
            log.error("events stay spooled", database=fault.detail)
        return fault is None

    def _open(self) -> None:
        if not self.is_open:
            log.error("the database takes no events: they are spooled", spool=str(self.spool.path))
        self.is_open = True
        self._spooled.set()

    def _close(self, spool: Spool) -> None:
        if self.is_open:
            log.info("the database takes events again", spooled=spool.events)
        self.is_open = False

    def _tell_spool_fault(self, error: SpoolError) -> None:
        if self._spool_fault != str(error):
            log.error("the spool takes no events", reason=str(error))
        self._spool_fault = str(error)

    def _gauge(self) -> None:
        try:
            depth = self.spool.depth()
        except SpoolError as error:
            self._tell_spool_fault(error)
            return
        telemetry.spool_events.set(depth.events)
        telemetry.spool_bytes.set(depth.bytes)
        age = (datetime.now(UTC) - depth.oldest_at).total_seconds() if depth.oldest_at else 0
        telemetry.spool_age.set(max(age, 0))  # the clock may have been set back


def _spooled(delivery: Delivery) -> Spooled:
    ours = delivery.ours
    return Spooled(
        0,
        delivery.received_at,
        delivery.source,
        delivery.key_id,
        delivery.content.body,
        ours.type if ours else None,
        ours.session_id if ours else None,
        ours.dedupe_key if ours else None,
    )


def _delivery(spooled: Spooled) -> Delivery:
    content = restore(spooled.source, spooled.body, spooled.type, spooled.session_id, spooled.dedupe_key)
    return Delivery(content, spooled.received_at, spooled.key_id, spooled.source)
