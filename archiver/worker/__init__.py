"""Background work, as procrastinate jobs on our Postgres: any number of workers, on any number of machines.

A periodic task hands out the sessions that are due, in bulk and in the order in which upstream forgets them; each job
reads some of them. A job that is lost with its worker costs nothing: its sessions become due again.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import procrastinate
import psycopg
import psycopg_pool
import structlog
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, waits
from archiver.callhq import UnauthorizedError
from archiver.database import LOCK_SECONDS, run_in_transaction
from archiver.erasure.periodic import Upkeep
from archiver.feed import Publisher
from archiver.followups import Followups, select_consumed
from archiver.projection import leases
from archiver.reconcile import Reconciler
from archiver.settings import Settings
from archiver.worker.reading import reconciling, timing_of
from archiver.worker.sealing import Sealing, signing_key

__all__ = ["Worker", "reconciling", "signing_key", "timing_of"]

log = structlog.get_logger(__name__)

JOBS_SCHEMA = "archiver_jobs"
SESSIONS_A_JOB = 20
MAX_JOBS = 100  # that wait: what is forgotten sooner is put before them, but what is in none waits for none
# Handed out again after this time, if no job has read them by then; a job that comes later finds them not due.
HANDED_OUT_FOR = timedelta(minutes=10)
POLL_SECONDS = AWAY_SECONDS = 1.0

# Queues: neither readings that hang nor long upkeep must keep sessions from being handed out.
READINGS, TIMERS, UPKEEP = "readings", "timers", "upkeep"
_LAST = -(2**31)  # the least priority there is


_COUNT_WAITING = text(
    "SELECT count(*) FROM archiver_jobs.procrastinate_jobs WHERE status = 'todo' AND queue_name = 'readings'"
)


_OPEN = (
    f"SELECT set_config('search_path', '{JOBS_SCHEMA}', true), set_config('DateStyle', 'ISO, YMD', true),"
    f" set_config('lock_timeout', '{LOCK_SECONDS * 1000}', true)"
)


class _Pool(psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """Says in each transaction where the jobs are, so that no state of the session is needed (PgBouncer); and that
    times are to be written in the one style that the driver reads.
    """

    @asynccontextmanager
    async def connection(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # the name is the pool's
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with super().connection(timeout) as connection:
            await connection.execute(_OPEN)
            yield connection


class Worker:
    """All background work of one process; `reconciler`: None where histories cannot be read."""

    def __init__(self, configuration: Settings, url: URL, engine: AsyncEngine, reconciler: Reconciler | None) -> None:
        self._engine, self._reconciler = engine, reconciler
        self._sealing = Sealing(configuration, url)
        conninfo = database.conninfo(url, "callhq-archiver worker")
        kwargs = {} if configuration.prepared_statements else {"prepare_threshold": None}
        connector = procrastinate.PsycopgConnector(
            pool_factory=_Pool, conninfo=conninfo, kwargs=kwargs, min_size=1, max_size=4
        )
        self.jobs = procrastinate.App(connector=connector)
        self._read_histories = self.jobs.task(name="read_histories", queue=READINGS)(self.read_histories)
        if reconciler is not None:
            hand_out = self.jobs.task(name="hand_out_due", queue=TIMERS, queueing_lock="hand_out_due")
            self.jobs.periodic(cron="* * * * * */5")(hand_out(self.hand_out_due))
        seal = self.jobs.task(name="seal", queue=UPKEEP, queueing_lock="seal")
        self.jobs.periodic(cron="* * * * * */5")(seal(self.seal))
        forget = self.jobs.task(name="forget_jobs", queue=TIMERS, queueing_lock="forget_jobs")
        self.jobs.periodic(cron="* * * * *")(forget(self.forget_jobs))
        self._upkeep = Upkeep(configuration, url, timing_of(configuration))
        # One at a time, on whichever machine.
        erase = self.jobs.task(name="erase", queue=UPKEEP, queueing_lock="erase", lock="erase")
        self.jobs.periodic(cron="* * * * * */20")(erase(self._upkeep.erase))
        expire = self.jobs.task(name="expire", queue=UPKEEP, queueing_lock="expire", lock="erase")
        self.jobs.periodic(cron="17 3 * * *")(expire(self._upkeep.expire))
        prepared = configuration.prepared_statements
        self._feeding = database.connect_async(url, pool_size=2, prepared_statements=prepared)
        self._publisher = Publisher(self._feeding)
        self._followups = Followups(configuration, url)
        self._changes_days = configuration.changes_days
        if self._changes_days:
            shorten = self.jobs.task(name="shorten_feed", queue=UPKEEP, queueing_lock="shorten_feed")
            self.jobs.periodic(cron="43 * * * *")(shorten(self.shorten_feed))

    async def run(self) -> None:
        """Until SIGTERM or Ctrl-C; jobs under way are ended first."""
        told = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told.set)
        async with self.jobs.open_async():
            queues = {TIMERS: 1, UPKEEP: 2} | ({READINGS: 4} if self._reconciler else {})
            working = [asyncio.create_task(self._work(queue, jobs, told)) for queue, jobs in queues.items()]
            working.append(asyncio.create_task(self._publisher.run()))
            working.append(asyncio.create_task(waits.report_waits(self._feeding)))
            following = asyncio.create_task(self._followups.run(told))
            ending = asyncio.create_task(told.wait())
            await asyncio.wait([*working, following, ending], return_when=asyncio.FIRST_COMPLETED)
            told.set()  # whatever it was that ended
            for task in (*working, ending):
                task.cancel()  # which lets jobs under way end
            for result in await asyncio.gather(*working, following, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        self._upkeep.close()
        await self._feeding.dispose()

    async def _work(self, queue: str, concurrency: int, told: asyncio.Event) -> None:
        """Until told; whatever the database does meanwhile."""
        while not told.is_set():
            try:
                await self._work_off(queue, concurrency)
            except procrastinate.exceptions.ConnectorException as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.OperationalError):
                    raise
                log.warning("jobs wait for the database", queue=queue, reason=database.explain(cause))
            await asyncio.sleep(0 if told.is_set() else AWAY_SECONDS)

    async def _work_off(self, queue: str, concurrency: int) -> None:
        await self.jobs.run_worker_async(
            queues=[queue],
            concurrency=concurrency,
            listen_notify=False,  # it would hold a connection of its own, and PgBouncer knows no LISTEN
            fetch_job_polling_interval=POLL_SECONDS,
            delete_jobs="always",
            shutdown_graceful_timeout=20,
            install_signal_handlers=False,
        )

    async def hand_out_due(self, timestamp: int) -> None:
        """Make jobs of the sessions whose history is to be read; `timestamp` is procrastinate's."""
        del timestamp
        now = datetime.now(UTC)
        until = now + HANDED_OUT_FOR

        def hand_out(connection: Connection) -> list[tuple[str, datetime | None]]:
            most = (MAX_JOBS - int(connection.scalar(_COUNT_WAITING) or 0)) * SESSIONS_A_JOB
            return leases.hand_out_due(connection, now, until, most) if most > 0 else []

        due = await run_in_transaction(self._engine, hand_out)
        for start in range(0, len(due), SESSIONS_A_JOB):
            part = due[start : start + SESSIONS_A_JOB]
            read_by = part[0][1]
            priority = _LAST if read_by is None else -int(read_by.timestamp() // 60)
            reading = self._read_histories.configure(priority=priority)
            await reading.defer_async(session_ids=[each for each, _ in part], due_at=until.isoformat())

    async def read_histories(self, session_ids: Sequence[str], due_at: str) -> None:
        """Read the histories of these sessions, those that are still due as they were handed out."""
        if self._reconciler is None:
            return
        try:
            await self._reconciler.read_all(session_ids, due_at=datetime.fromisoformat(due_at))
        except UnauthorizedError as error:
            # They are handed out again, when the key may be another.
            log.error("histories cannot be read", error=str(error))  # noqa: TRY400  # there is nothing to trace

    async def seal(self, timestamp: int) -> None:
        """Seal what is settled, if it is time again."""
        del timestamp
        await asyncio.to_thread(self._sealing.seal)

    async def shorten_feed(self, timestamp: int) -> None:
        """Let go of changes that are old enough, as the settings say."""
        del timestamp
        await self._publisher.delete_old(self._changes_days, select_consumed)

    async def forget_jobs(self, timestamp: int) -> None:
        """Jobs whose worker died are dropped; what they had not read is due as soon as its lease has ended."""
        del timestamp
        for job in await self.jobs.job_manager.get_stalled_jobs():
            session_ids, due_at = job.task_kwargs.get("session_ids"), job.task_kwargs.get("due_at")
            if isinstance(session_ids, list) and isinstance(due_at, str):
                ids, handed = [str(each) for each in session_ids], datetime.fromisoformat(due_at)
                hasten = partial(leases.hasten, session_ids=ids, handed=handed, now=datetime.now(UTC))
                await run_in_transaction(self._engine, hasten)
            await self.jobs.job_manager.finish_job(job, procrastinate.jobs.Status.FAILED, delete_job=True)
