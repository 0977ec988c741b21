"""Write deliveries that slow down batches: each in a separate transaction with its own time limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.archive import Timing
from archiver.events import Content, Delivery
from archiver.inbound.circuit import Circuit
from archiver.inbound.writing import (
    EventNotStoredError,
    EventTooSlowError,
    Outcome,
    Result,
    UnavailableError,
    quarantine_delivery,
    write_isolated,
)

log = structlog.get_logger(__name__)

SECONDS = 30.0  # per attempt
ATTEMPTS = 2  # failed attempts while Postgres stores other events; then the delivery is quarantined
LOCKED_ATTEMPTS = 3  # consecutive attempts blocked by another transaction
LANES = 2  # concurrent deliveries
PAUSE_SECONDS = 1.0
SLOW_SECONDS = 1.0
REMEMBER_SECONDS = 300.0  # time for which further deliveries of the session are written separately
MAX_REMEMBERED = 10_000


class IsolatedWriter:
    """A writer of single deliveries: in order within a session, in parallel across sessions."""

    def __init__(self, engine: AsyncEngine, timing: Timing, circuit: Circuit) -> None:
        self._engine, self._timing, self._circuit = engine, timing, circuit
        self._lanes = asyncio.Semaphore(LANES)
        self._slow: dict[str, float] = {}  # subjects with the time until which they are remembered
        self._turns: dict[str, list[asyncio.Future[None]]] = {}

    def knows(self, of: str) -> bool:
        """Return whether deliveries of this subject were slow recently, or one of them is being written."""
        return of in self._turns or self._slow.get(of, 0.0) > monotonic()

    async def write(self, delivery: Delivery[Content]) -> Result:
        """Write the delivery and return its outcome: `quarantined` if Postgres stores other events but not this one.

        Returns `UnavailableError` if the database accepts no events, or if another transaction blocks the session.
        """
        of = delivery.subject
        async with self._turn(of):
            result = await self._write(delivery)
        if isinstance(result, Outcome):
            telemetry.slow_events.labels(result.status).inc()
        return result

    async def quarantine(self, delivery: Delivery[Content], attempts: int) -> Result:
        """Quarantine a delivery on which Postgres failed in `attempts` attempts, while it stored another event."""
        return await quarantine_delivery(self._engine, delivery, EventNotStoredError(attempts))

    def _remember(self, of: str) -> None:
        """Write the next deliveries of this subject separately."""
        now = monotonic()
        if len(self._slow) >= MAX_REMEMBERED:
            self._slow = {each: until for each, until in self._slow.items() if until > now}
        if len(self._slow) < MAX_REMEMBERED:
            self._slow[of] = now + REMEMBER_SECONDS

    async def _write(self, delivery: Delivery[Content]) -> Result:
        failed: list[UnavailableError] = []
        locked = 0
        while True:
            async with self._lanes:
                result = await self._attempt(delivery)
            if isinstance(result, Outcome) or self._circuit.is_open:
                return result
            if result.is_locked:
                locked += 1
            else:
                failed.append(result)
                locked = 0
            if locked >= LOCKED_ATTEMPTS:
                return result
            if len(failed) >= ATTEMPTS:
                is_slow = any(fault.is_slow for fault in failed)
                fault = EventTooSlowError(SECONDS, ATTEMPTS) if is_slow else EventNotStoredError(ATTEMPTS)
                return await quarantine_delivery(self._engine, delivery, fault)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _attempt(self, delivery: Delivery[Content]) -> Result:
        if self._circuit.is_open:
            return UnavailableError()
        started = monotonic()
        result = await write_isolated(self._engine, delivery, self._timing, SECONDS)
        seconds, is_stored = monotonic() - started, isinstance(result, Outcome)
        if seconds >= SLOW_SECONDS or not is_stored:
            self._remember(delivery.subject)
            log.warning("slow event attempted separately", seconds=round(seconds, 3), is_stored=is_stored)
        if isinstance(result, UnavailableError):
            await self._circuit.judge([result])
        return result

    @asynccontextmanager
    async def _turn(self, of: str) -> AsyncIterator[None]:
        """Run the block while no other delivery of this subject is written; first come, first served."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._turns.setdefault(of, [])
        waiting.append(done)
        try:
            if waiting[0] is not done:
                await done
            yield
        finally:
            was_first = waiting[0] is done
            waiting.remove(done)
            if not waiting:
                del self._turns[of]
            elif was_first and not waiting[0].done():
                waiting[0].set_result(None)
