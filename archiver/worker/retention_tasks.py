"""Periodic erasure: turns deleted upstream, expired content, and remains of earlier erasures."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from time import monotonic
from typing import TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from archiver import database, telemetry
from archiver.archive import Timing
from archiver.compliance.erasure.clocks import ClockError, destruction_time
from archiver.compliance.erasure.deleted import order_deleted
from archiver.compliance.erasure.retention import Rules, expire, preview
from archiver.compliance.erasure.sweeping import PAGE, sweep
from archiver.ledger import audit_log
from archiver.operations import heartbeats
from archiver.settings import Settings

log = structlog.get_logger(__name__)

FULL_SWEEP_SECONDS = 3_600.0

T = TypeVar("T")


class RetentionTasks:
    """The tasks of one worker that erase content, in short transactions in a thread."""

    def __init__(self, configuration: Settings, engine: Engine) -> None:
        self._engine, self._timing = engine, Timing.of(configuration)
        self._grace = timedelta(seconds=configuration.erase_after)
        self._erases_deleted = configuration.on_delete == "erase"
        self._rules = Rules.of(configuration)
        self._home = configuration.home
        self._swept = 0  # all erasures up to this one are complete
        self._swept_all_at = monotonic()

    async def erase(self, beat: Callable[[], None] = lambda: None) -> None:
        """Order the erasure of deleted turns, then erase the ordered content; `beat` is called after each step.

        Raises `ClockError` if a clock is in doubt, after erasing the content ordered earlier.
        """
        now, refused = await asyncio.to_thread(self._now) if self._erases_deleted else (None, None)
        try:
            async for ordered in _steps(order_deleted(self._engine, now - self._grace) if now else iter(())):
                beat()
                if ordered.targets:
                    log.info("erasure of deleted turns ordered", turns=len(ordered.targets))
        except DBAPIError:  # ordered content is erased even if other turns are locked or slow
            await self._sweep(beat)
            raise
        await self._sweep(beat)
        if refused is not None:
            raise refused

    async def _sweep(self, beat: Callable[[], None]) -> None:
        # An erasure may become visible after one with a greater id, so each sweep begins one page earlier. The full
        # sweep finds targets that a hold protected before.
        moment = monotonic()
        if moment - self._swept_all_at >= FULL_SWEEP_SECONDS:
            self._swept, self._swept_all_at = 0, moment
        async for step in _steps(sweep(self._engine, self._timing, max(0, self._swept - PAGE))):
            beat()
            self._swept = max(self._swept, step.through)
            for each in step.repeating:
                log.warning(
                    "erased content repeated by another turn", session_id=each.session_id, chat_id=each.chat_id
                )

    async def expire(self, beat: Callable[[], None] = lambda: None) -> None:
        """Expire old content according to the settings, and erase it; `beat` is called after each step.

        Raises `ClockError` if a clock is in doubt, after erasing the content ordered earlier.
        """
        now, refused = await asyncio.to_thread(self._now)
        if now is not None:
            due = await asyncio.to_thread(preview, self._engine, self._rules, now)
            steps = expire(self._engine, self._rules, now, timing=self._timing, due=due, who=audit_log.ARCHIVER)
            try:
                async for _ in _steps(steps):
                    beat()
            except DBAPIError:
                await self.erase(beat)
                raise
            if not due.is_empty:
                log.info(
                    "retention run completed",
                    content=due.content.total(),
                    metadata=due.metadata.total(),
                    held=due.held,
                )
        await self.erase(beat)
        if refused is not None:
            raise refused

    def claim(self, name: str, seconds: float) -> bool:
        """Start a shared duty; return False if it was started in the last `seconds`."""
        with database.transaction(self._engine) as connection:
            return heartbeats.claim(connection, name, seconds)

    def _now(self) -> tuple[datetime | None, ClockError | None]:
        """Return the time that decides what expires, or the error if a clock is in doubt."""
        try:
            with database.transaction(self._engine) as connection:
                return destruction_time(connection, self._home), None
        except ClockError as error:
            telemetry.destruction_refused.labels(error.reason).inc()
            return None, error


async def _steps(steps: Iterator[T]) -> AsyncIterator[T]:
    while True:
        step = await asyncio.to_thread(next, steps, None)
        if step is None:
            return
        yield step
