"""The history duty: claims due sessions and runs the jobs that read them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any

import procrastinate
import psycopg
import psycopg_pool
import structlog
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.archive import Timing
from archiver.database import LOCK_SECONDS, STATEMENT_SECONDS, run_async, run_split_async
from archiver.history import Reconciler, leases
from archiver.history.callhq import Limits, UnauthorizedError
from archiver.history.opening import reconciling
from archiver.operations import heartbeats
from archiver.operations.overview import select_silence
from archiver.settings import Settings
from archiver.telemetry.duty_health import Duty, fault_location
from archiver.worker.clock_recovery import make_impossible_times_due

log = structlog.get_logger(__name__)

JOBS_SCHEMA = "archiver_jobs"
# The queues. Sessions whose previous reading failed have their own: while their calls hang, others proceed.
READINGS, RETRIES = "readings", "retries"
SESSIONS_PER_JOB = 20
MAX_JOBS = 100  # waiting jobs of a queue; few, so that sessions that expire sooner take precedence
MAX_CONCURRENT_JOBS = 4  # of a queue
# Seconds for a call. A history that takes longer is requested again after a pause, with more time.
FIRST_SECONDS, RETRY_SECONDS = 10.0, 30.0
# If no job has read claimed sessions within this time, they become due again; the job that is late skips them.
CLAIM_TIME = timedelta(minutes=10)
HANDED_BACK = timedelta(minutes=1)  # after a job failed as a whole
CLAIM_SECONDS, CLEANUP_SECONDS = 5.0, 60.0
POLL_SECONDS = UNAVAILABLE_SECONDS = 1.0
SILENT_SECONDS = 1_800.0  # without a completed job while some run; long, because CallHQ may request long pauses
_LAST = -(2**31)  # the lowest priority
_JOBS = "readings"  # the part of the duty's report that is about jobs

_COUNT_WAITING = text(
    "SELECT count(*) FROM archiver_jobs.procrastinate_jobs WHERE status = 'todo' AND queue_name = :queue"
)
# Earlier versions ran every duty as periodic jobs of these queues; no worker runs them now.
_DELETE_EARLIER = text(
    "DELETE FROM archiver_jobs.procrastinate_jobs WHERE status = 'todo' AND queue_name IN ('timers', 'upkeep')"
)
_SETTINGS = database.session.settings_sql(
    search_path=f"'{JOBS_SCHEMA}'",
    statement_timeout=f"'{STATEMENT_SECONDS * 1000}'",
    lock_timeout=f"'{LOCK_SECONDS * 1000}'",
)
_OPEN = f"SELECT {_SETTINGS}"


class _Pool(psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """A pool that sets, in each transaction, the schema of the jobs and the limits of the archiver's transactions."""

    @asynccontextmanager
    async def connection(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # the name is the pool's
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with super().connection(timeout) as connection:
            await connection.execute(_OPEN)
            yield connection


class Histories:
    """The history duty, with its own connections and HTTP client."""

    def __init__(self, configuration: Settings, url: URL, duty: Duty) -> None:
        self._configuration, self._url, self._duty = configuration, url, duty
        conninfo = database.conninfo(url, "callhq-archiver worker")
        prepared = configuration.prepared_statements
        kwargs = {"prepare_threshold": None} if prepared is False else {}
        configure = partial(database.session.configure, prepared_statements=prepared)
        connector = procrastinate.PsycopgConnector(
            pool_factory=_Pool,
            connection_class=database.session.PoolConnection,
            conninfo=conninfo,
            kwargs=kwargs,
            configure=configure,
            min_size=1,
            max_size=4,
        )
        self._jobs = procrastinate.App(connector=connector)
        self._tasks = {
            READINGS: self._jobs.task(name="read_histories", queue=READINGS)(self.read_histories),
            RETRIES: self._jobs.task(name="retry_histories", queue=RETRIES)(self.retry_histories),
        }
        self._opened: tuple[AsyncEngine, Reconciler] | None = None
        self._under_way, self._ended_at = 0, monotonic()

    async def run(self, ending: asyncio.Event) -> None:
        """Work until `ending` is set. Raises `SettingsError` if no HTTP client can be built."""
        async with reconciling(self._configuration, self._url) as (engine, reconciler, _), self._jobs.open_async():
            log.info("history duty started", api=self._configuration.callhq_api_url)
            self._opened = engine, reconciler
            parts = [
                self._claim_periodically(engine),
                self._drop_dead_jobs_periodically(engine),
                self._run_jobs(READINGS),
                self._run_jobs(RETRIES),
                ending.wait(),
            ]
            tasks = [asyncio.ensure_future(each) for each in parts]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()  # lets running jobs complete
                results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    async def _claim_periodically(self, engine: AsyncEngine) -> None:
        while True:
            for queue in self._tasks:
                await self._enqueue_due(engine, queue)
            if not self._under_way or monotonic() - self._ended_at < SILENT_SECONDS:
                self._duty.working()
            await asyncio.sleep(CLAIM_SECONDS)

    async def _drop_dead_jobs_periodically(self, engine: AsyncEngine) -> None:
        claim = partial(heartbeats.claim, name="forget_jobs", seconds=CLEANUP_SECONDS / 2)
        while True:
            if await run_async(engine, claim):
                await self._drop_dead_jobs(engine)
            await asyncio.sleep(CLEANUP_SECONDS)

    async def _run_jobs(self, queue: str) -> None:
        """Run the jobs of a queue until cancelled; retry while the database is unavailable."""
        while True:
            try:
                await self._jobs.run_worker_async(
                    queues=[queue],
                    concurrency=MAX_CONCURRENT_JOBS,
                    listen_notify=False,  # LISTEN would need a separate connection, and PgBouncer does not support it
                    fetch_job_polling_interval=POLL_SECONDS,
                    delete_jobs="always",
                    shutdown_graceful_timeout=20,
                    install_signal_handlers=False,
                )
            except procrastinate.exceptions.ConnectorException as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.OperationalError):
                    raise
                self._duty.failing(f"database: {database.explain(cause)}")
                log.warning("database unavailable; history jobs waiting", queue=queue, reason=database.explain(cause))
            await asyncio.sleep(UNAVAILABLE_SECONDS)

    async def _enqueue_due(self, engine: AsyncEngine, queue: str) -> None:
        """Claim due sessions, and create the jobs of a queue that read them."""

        def select(connection: Connection) -> tuple[datetime, list[leases.Due]]:
            now = database.now()
            waiting = int(connection.scalar(_COUNT_WAITING, {"queue": queue}) or 0)
            limit = (MAX_JOBS - waiting) * SESSIONS_PER_JOB
            due = leases.select_due(connection, now, limit, is_retry=queue == RETRIES) if limit > 0 else []
            return now, due

        now, item = await run_async(engine, select)
        until = now + CLAIM_TIME
        # A locked session is due again next time; nothing waits for it.
        parts, _ = await run_split_async(engine, item, partial(leases.claim_listed, now=now, until=until))
        due = [each for part in parts for each in part]
        for start in range(0, len(due), SESSIONS_PER_JOB):
            part = due[start : start + SESSIONS_PER_JOB]
            read_by = part[0][1]
            priority = _LAST if read_by is None else -int(read_by.timestamp() // 60)
            reading = self._tasks[queue].configure(priority=priority)
            await reading.defer_async(session_ids=[each for each, _ in part], due_at=until.isoformat())

    async def read_histories(self, session_ids: Sequence[str], due_at: str) -> None:
        """Read the histories of those sessions that still have the due time with which they were claimed."""
        await self._run_job(session_ids, due_at, Limits(FIRST_SECONDS))

    async def retry_histories(self, session_ids: Sequence[str], due_at: str) -> None:
        """Read, as `read_histories` does, the histories of sessions whose previous reading failed."""
        await self._run_job(session_ids, due_at, Limits(RETRY_SECONDS, is_retry=True))

    async def _run_job(self, session_ids: Sequence[str], due_at: str, limits: Limits) -> None:
        if self._opened is None:
            return
        engine, reconciler = self._opened
        self._begin_job()
        until, defects = datetime.fromisoformat(due_at), list[Exception]()
        try:
            await reconciler.read_all(session_ids, due_at=until, limits=limits, on_defect=defects.append)
        except UnauthorizedError as error:
            # The sessions become due again, possibly with another key.
            self._duty.failing(str(error), _JOBS)
            log.error("history calls rejected by CallHQ", error=str(error))  # noqa: TRY400  # a traceback would add nothing
        except Exception as error:
            self._duty.failing(_located(error), _JOBS)
            await _hand_back(engine, session_ids, until)
            raise
        else:
            if defects:
                self._duty.failing(_located(defects[0]), _JOBS)
            else:
                self._duty.working(_JOBS)
        finally:
            self._under_way -= 1
            self._ended_at = monotonic()

    def _begin_job(self) -> None:
        if not self._under_way:
            self._ended_at = monotonic()
        self._under_way += 1

    async def _drop_dead_jobs(self, engine: AsyncEngine) -> None:
        """Delete jobs of dead workers and make their sessions due; correct impossible due times; set metrics."""
        corrected = await run_async(engine, partial(make_impossible_times_due, timing=Timing.of(self._configuration)))
        telemetry.times_ahead.set(corrected)
        silence = await run_async(engine, select_silence)
        telemetry.missed_turns.set(silence.turns)
        if corrected:
            log.warning("impossible due times corrected; a clock was ahead", rows=corrected)
        for job in await self._jobs.job_manager.get_stalled_jobs():
            session_ids, due_at = job.task_kwargs.get("session_ids"), job.task_kwargs.get("due_at")
            if isinstance(session_ids, list) and isinstance(due_at, str):
                ids, claimed = [str(each) for each in session_ids], datetime.fromisoformat(due_at)
                await run_split_async(
                    engine, ids, partial(leases.make_due, claimed_until=claimed, now=database.now())
                )
            await self._jobs.job_manager.finish_job(job, procrastinate.jobs.Status.FAILED, delete_job=True)
        await run_async(engine, lambda connection: connection.execute(_DELETE_EARLIER))


def _located(error: Exception) -> str:
    return f"{type(error).__name__} at {fault_location(error)}"


async def _hand_back(engine: AsyncEngine, session_ids: Sequence[str], claimed_until: datetime) -> None:
    """Make the sessions that a failed job has not read due soon, rather than at the end of their claim."""
    make_due = partial(leases.make_due, claimed_until=claimed_until, now=database.now() + HANDED_BACK)
    try:
        await run_split_async(engine, session_ids, make_due)
    except SQLAlchemyError as error:
        log.warning(
            "release of the sessions of a failed job failed; their claim expires", error=database.explain(error)
        )
