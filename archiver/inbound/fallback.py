"""Spool deliveries that Postgres does not accept in time, and drain the spool afterwards."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.archive import Timing
from archiver.events import Content, Delivery
from archiver.inbound.circuit import Circuit
from archiver.inbound.draining import MAX_PAUSE_SECONDS, Drain
from archiver.inbound.isolated import IsolatedWriter
from archiver.inbound.spool import Spool, SpoolError, open_left_behind
from archiver.inbound.writing import Outcome, Result, UnavailableError, write

log = structlog.get_logger(__name__)

SPOOL_AFTER_SECONDS = 3.0  # without a response from Postgres; senders wait about ten seconds at most
ADOPT_SECONDS = 30.0  # between two checks for files of exited processes
ADOPT_AT_ONCE = 8  # files


class Fallback:
    """A writer that stores deliveries durably in Postgres or in the spool; `drain` moves spooled ones to Postgres.

    While the circuit is open, no caller waits for Postgres; neither does a caller with a delivery of a slow session.
    """

    def __init__(
        self, engine: AsyncEngine, spool: Spool, timing: Timing, circuit: Circuit, isolated: IsolatedWriter
    ) -> None:
        self._engine, self.spool, self._timing = engine, spool, timing
        self._circuit, self._isolated = circuit, isolated
        self._gate = asyncio.Semaphore(1)
        self._drain = self._draining(spool)
        self._spool_fault = ""  # why the last append failed
        if spool.events:
            self._drain.arrived.set()
        self._gauge()

    @property
    def is_open(self) -> bool:
        """Return whether the circuit is open."""
        return self._circuit.is_open

    async def write(self, deliveries: Sequence[Delivery[Content]]) -> list[Result]:
        """Write the deliveries and return their outcomes; `spooled` means on disk instead of in Postgres."""
        results: list[Result] = [UnavailableError()] * len(deliveries)
        faults: list[UnavailableError] = []
        if not self._circuit.is_open:
            quick = [place for place, each in enumerate(deliveries) if not self._isolated.knows(each.subject)]
            due_deliveries = [deliveries[place] for place in quick]
            written = await write(self._engine, due_deliveries, self._timing, SPOOL_AFTER_SECONDS) if quick else []
            for place, result in zip(quick, written, strict=True):
                results[place] = result
            faults = [result for result in written if isinstance(result, UnavailableError)]
        left = [place for place, result in enumerate(results) if isinstance(result, UnavailableError)]
        if left:
            appending = asyncio.create_task(self._append([deliveries[place] for place in left]))
            if faults:
                await self._circuit.judge(faults)
            if self._circuit.is_open:
                self._drain.arrived.set()  # the drain tests whether the circuit can be closed
            for place in left if await appending else ():
                results[place] = Outcome("spooled")
        return results

    async def drain(self) -> None:
        """Drain the spool until cancelled, oldest events first, concurrently with new events."""
        adopting = asyncio.create_task(self._adopt_periodically())
        try:
            while True:
                try:
                    await self._drain_once()
                except Exception:  # supervisor: on any error the spool is drained again
                    log.exception("drain failed")
                    self._drain.arrived.set()
                    await asyncio.sleep(MAX_PAUSE_SECONDS)
        finally:
            adopting.cancel()
            await asyncio.wait({adopting})

    async def _drain_once(self) -> None:
        if not self._circuit.is_open:
            await self._drain.arrived.wait()
        try:
            await self._drain.empty()
        except SpoolError as error:
            self._log_spool_fault(error)
            self._drain.arrived.set()
        if self._circuit.is_open and await self._circuit.allows_trial():
            self._circuit.close()  # the spool is empty, so no drained delivery can close it
        elif self._circuit.is_open or self._drain.arrived.is_set():
            await asyncio.sleep(MAX_PAUSE_SECONDS)

    async def _append(self, deliveries: Sequence[Delivery[Content]]) -> bool:
        try:
            await asyncio.to_thread(self.spool.append, deliveries)
        except SpoolError as error:
            self._log_spool_fault(error)
            return False
        self._spool_fault = ""
        self._drain.arrived.set()
        self._gauge()
        return True

    def _draining(self, spool: Spool) -> Drain:
        return Drain(spool, self._write_spooled, self._circuit, self._isolated, self._gauge)

    async def _write_spooled(self, deliveries: Sequence[Delivery[Content]], seconds: float) -> list[Result]:
        async with self._gate:  # for all files together one transaction at a time, in addition to those of new events
            return await write(self._engine, deliveries, self._timing, seconds)

    async def _adopt_periodically(self) -> None:
        """Drain the files of exited processes, each separately."""
        adopted: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(ADOPT_SECONDS)
                left_behind = open_left_behind(self.spool.path.parent)
                while len(adopted) < ADOPT_AT_ONCE and (spool := await asyncio.to_thread(next, left_behind, None)):
                    log.info("draining spool file of an exited process", file=spool.path.name, events=spool.events)
                    adopted.add(task := asyncio.create_task(self._adopt(spool)))
                    task.add_done_callback(adopted.discard)
        finally:
            for task in adopted:
                task.cancel()
            if adopted:
                await asyncio.wait(adopted)

    async def _adopt(self, spool: Spool) -> None:
        try:
            await self._draining(spool).empty()
        except SpoolError as error:
            self._log_spool_fault(error)
        except Exception:  # supervisor: the file is opened again later
            log.exception("drain failed", file=spool.path.name)
        finally:
            spool.close()

    def _log_spool_fault(self, error: SpoolError) -> None:
        if self._spool_fault != str(error):
            log.error("spool unavailable", reason=str(error))
        self._spool_fault = str(error)

    def _gauge(self) -> None:
        try:
            depth = self.spool.depth()
        except SpoolError as error:
            self._log_spool_fault(error)
            return
        telemetry.spool_events.set(depth.events)
        telemetry.spool_bytes.set(depth.bytes)
        age = (datetime.now(UTC) - depth.oldest_at).total_seconds() if depth.oldest_at else 0
        telemetry.spool_age.set(max(age, 0))  # never negative, even if the clock was set back
