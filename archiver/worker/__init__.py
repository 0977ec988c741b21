"""Background duties that start, fail and recover independently, on any number of machines.

Histories are read by procrastinate jobs, which Postgres stores: a timer distributes the due sessions, in bulk and in
the order in which they expire upstream, and each job reads some of them. A job that is lost with its worker costs
nothing: its sessions become due again. All other duties are loops on monotonic time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from time import monotonic

import structlog
from sqlalchemy.engine import URL

from archiver import database
from archiver.compliance import seals
from archiver.database import lock_waits, run_async
from archiver.database.connections import Connections
from archiver.database.identity import ForeignDatabaseError, Guard
from archiver.operations import heartbeats
from archiver.operations.reloading import Reloading
from archiver.outbound.feed import Publisher
from archiver.outbound.followups import CONNECTIONS as FOLLOWUP_CONNECTIONS
from archiver.outbound.followups import Followups, select_consumed
from archiver.settings import Settings
from archiver.telemetry.duty_health import Duty
from archiver.worker.compacting import Compacting
from archiver.worker.histories import Histories
from archiver.worker.indexing import Indexing
from archiver.worker.retention_tasks import RetentionTasks
from archiver.worker.sealing import Sealing
from archiver.worker.summing import Summing
from archiver.worker.supervision import Runner, Supervisor

log = structlog.get_logger(__name__)

SEAL_SECONDS = 5.0
IDENTITY_SECONDS = 1.0
ERASE_SECONDS = 20.0
RETENTION_AT = timedelta(hours=3, minutes=17)  # of each day, UTC
RETENTION_WITHIN = timedelta(minutes=10)
RETENTION_CHECK_SECONDS = 20.0
FEED_RETENTION_SECONDS = 3_600.0
COMPACT_SECONDS = 20.0
SEARCH_SECONDS = 1.0  # between two checks for changes
UNUSED_CHECK_SECONDS = 5.0  # between two checks whether the search index may be deleted
ROLLUP_SECONDS = 5.0
BEAT_SECONDS = 1.0  # between two reports of an idle duty
_UNREADABLE = "unreadable"  # the part of the report of the duty `identity` that names rows that could not be compared
CLAIM_SHARE = 0.9  # share of a period, so that workers do not claim in lockstep


class Worker:
    """All duties of one process with these settings. `reloading` reloads changed files."""

    def __init__(self, configuration: Settings, url: URL, reloading: Reloading | None = None) -> None:
        self._configuration, self._url = configuration, url
        self._connections = Connections(url, configuration.prepared_statements)
        self._guard = Guard(configuration.home.resolve(), url)
        self._runners = [
            self._runner("reconcile", self._reconcile),
            self._runner("seal", self._seal, may_cancel=False),
            self._runner("publish", self._publish),
            self._runner("followups", self._followups),
            self._runner("erase", self._erase, may_cancel=False),
            self._runner("retention", self._retention, may_cancel=False),
            self._runner("feed_retention", self._feed_retention),
            self._runner("compact", self._compact, may_cancel=False),
            self._runner("search", self._search),
            self._runner("rollups", self._rollups, may_cancel=False),
            self._runner("locks", self._locks),
            self._runner("identity", self._identity),
            *([self._runner("settings", partial(self._settings, reloading))] if reloading else []),
        ]

    async def run(self, ending: asyncio.Event) -> None:
        """Run until `ending` is set; work in progress is completed first."""
        with self._connections.synchronous() as engine:
            await Supervisor(self._runners, engine).run(ending)

    def _runner(
        self, name: str, run: Callable[[Duty, asyncio.Event], Awaitable[None]], *, may_cancel: bool = True
    ) -> Runner:
        duty = Duty(name)
        return Runner(duty, partial(run, duty), may_cancel)

    async def _reconcile(self, duty: Duty, ending: asyncio.Event) -> None:
        if not self._configuration.callhq_api_key.get_secret_value():
            duty.switch_off("CALLHQ_API_KEY is not set: histories are not read and gaps stay open")
            await ending.wait()
            return
        await Histories(self._configuration, self._url, duty).run(ending)

    async def _seal(self, duty: Duty, ending: asyncio.Event) -> None:
        with self._connections.synchronous() as engine:
            sealing = Sealing(self._configuration, engine, self._guard)
            await _every(SEAL_SECONDS, partial(asyncio.to_thread, sealing.seal, duty.beat), duty, ending)

    async def _publish(self, duty: Duty, ending: asyncio.Event) -> None:
        async with self._connections.asynchronous() as engine:
            await until(ending, Publisher(engine, duty, self._guard).run())

    async def _followups(self, duty: Duty, ending: asyncio.Event) -> None:
        async with self._connections.asynchronous(FOLLOWUP_CONNECTIONS) as engine:
            await Followups(self._configuration, engine, seals.select_seal, duty, self._guard).run(ending)

    async def _erase(self, duty: Duty, ending: asyncio.Event) -> None:
        with self._connections.synchronous() as engine:
            tasks = RetentionTasks(self._configuration, engine)

            async def erase() -> None:
                if await asyncio.to_thread(tasks.claim, "erase", CLAIM_SHARE * ERASE_SECONDS):
                    await tasks.erase(duty.beat)

            await _every(ERASE_SECONDS, erase, duty, ending)

    async def _retention(self, duty: Duty, ending: asyncio.Event) -> None:
        is_claimed = False
        with self._connections.synchronous() as engine:
            tasks = RetentionTasks(self._configuration, engine)

            async def expire() -> None:
                nonlocal is_claimed
                now = database.now()
                since_then = (now - now.replace(hour=0, minute=0, second=0, microsecond=0)) - RETENTION_AT
                if timedelta() <= since_then < RETENTION_WITHIN:
                    seconds = 2 * RETENTION_WITHIN.total_seconds()
                    is_claimed |= await asyncio.to_thread(tasks.claim, "retention", seconds)
                if is_claimed:
                    await tasks.expire(duty.beat)
                    is_claimed = False

            await _every(RETENTION_CHECK_SECONDS, expire, duty, ending)

    async def _feed_retention(self, duty: Duty, ending: asyncio.Event) -> None:
        days = self._configuration.changes_days
        if not days:
            duty.switch_off("ARCHIVER_CHANGES_DAYS is 0: the feed keeps every change")
            await ending.wait()
            return
        claim = partial(heartbeats.claim, name="feed_retention", seconds=CLAIM_SHARE * FEED_RETENTION_SECONDS)
        async with self._connections.asynchronous() as engine:

            async def delete_old_changes() -> None:
                if await run_async(engine, claim):
                    await Publisher(engine, duty).delete_old(days, select_consumed)

            await _every(FEED_RETENTION_SECONDS, delete_old_changes, duty, ending)

    async def _compact(self, duty: Duty, ending: asyncio.Event) -> None:
        with self._connections.synchronous() as engine:
            compact = Compacting(engine).compact
            await _every(COMPACT_SECONDS, partial(asyncio.to_thread, compact, duty.beat), duty, ending)

    async def _search(self, duty: Duty, ending: asyncio.Event) -> None:
        async with self._connections.asynchronous() as engine:
            indexing = Indexing(engine, duty)
            if self._configuration.search == "off":
                duty.switch_off("ARCHIVER_SEARCH is off: this worker indexes no messages")
                while not ending.is_set() and not await indexing.switch_off_unused(monotonic()):
                    await _pause(UNUSED_CHECK_SECONDS, duty, ending)
                await ending.wait()
                return
            await indexing.switch_on(self._configuration.search_language)

            async def index() -> None:
                await indexing.restart_if_deleted(self._configuration.search_language)
                while await indexing.step() and not ending.is_set():
                    duty.working()
                    # Erased words must not wait for the end of a backlog.
                    await until(ending, indexing.rebuild())
                    await _pause(indexing.pause_seconds, duty, ending)
                await until(ending, indexing.rebuild())

            await _every(SEARCH_SECONDS, index, duty, ending)

    async def _rollups(self, duty: Duty, ending: asyncio.Event) -> None:
        with self._connections.synchronous() as engine:
            summing = Summing(engine)

            async def sum_stale() -> None:
                # Until all rows exist, queries compute the figures of the sessions that have none.
                while await asyncio.to_thread(summing.sum, duty.beat) and not ending.is_set():
                    duty.working()

            await _every(ROLLUP_SECONDS, sum_stale, duty, ending)

    async def _locks(self, duty: Duty, ending: asyncio.Event) -> None:
        async with self._connections.asynchronous() as engine:
            await until(ending, lock_waits.report_waits(engine, duty))

    async def _identity(self, duty: Duty, ending: asyncio.Event) -> None:
        async with self._connections.asynchronous() as engine:

            async def watch() -> None:
                if reason := await run_async(engine, self._guard.watch):
                    raise ForeignDatabaseError(reason)
                if self._guard.unreadable:
                    duty.failing(f"not everything can be checked: {self._guard.unreadable}", _UNREADABLE)
                else:
                    duty.working(_UNREADABLE)

            await _every(IDENTITY_SECONDS, watch, duty, ending)

    async def _settings(self, reloading: Reloading, duty: Duty, ending: asyncio.Event) -> None:
        await until(ending, reloading.run(duty))


async def until(ending: asyncio.Event, work: Awaitable[None]) -> None:
    """Run `work` until `ending` is set, then cancel it. Raises its errors."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ending.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
    if not working.cancelled():
        working.result()


async def _every(seconds: float, step: Callable[[], Awaitable[None]], duty: Duty, ending: asyncio.Event) -> None:
    """Repeat a step until `ending` is set, with a pause of `seconds` after each."""
    while not ending.is_set():
        await step()
        duty.working()
        await _pause(seconds, duty, ending)


async def _pause(seconds: float, duty: Duty, ending: asyncio.Event) -> None:
    """Pause for `seconds`, or until `ending` is set, with a heartbeat every `BEAT_SECONDS`."""
    waited = 0.0
    while waited < seconds and not ending.is_set():
        pause = min(BEAT_SECONDS, seconds - waited)
        with suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), pause)
        waited += pause
        duty.beat()
