"""Background work, as procrastinate jobs on our Postgres: any number of workers, on any number of machines.

A periodic task hands out the sessions that are due, in bulk and in the order in which upstream forgets them; each job
reads some of them. A job that is lost with its worker costs nothing: its sessions become due again.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import procrastinate
import psycopg
import psycopg_pool
import structlog
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database
from archiver.callhq import Client, UnauthorizedError
from archiver.database import run_in_transaction
from archiver.events import Event
from archiver.history import APPLICATION, REGISTERED, SOURCE
from archiver.ingest import Delivery, Ingest, QueueFullError, UnavailableError
from archiver.projection import Timing, leases
from archiver.reconcile import NotRecordedError, Reconciler, Submit
from archiver.reconcile.pause import SharedPause
from archiver.settings import Settings

log = structlog.get_logger(__name__)

JOBS_SCHEMA = "archiver_jobs"
SESSIONS_A_JOB = 50
HANDED_OUT_AT_ONCE = 5_000
# Handed out again after this time, if no job has read them by then.
HANDED_OUT_FOR = 2 * leases.LEASE
POLL_SECONDS = 1.0
_BATCH = 50  # histories in one transaction
_PATIENCE_SECONDS = 0.05
_QUEUE_BYTES = 256 * 1_048_576  # of histories waiting for a commit

QUEUE = "archiver"


class _Pool(psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """Says in each transaction where the jobs are, so that no state of the session is needed (PgBouncer)."""

    @asynccontextmanager
    async def connection(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # the name is the pool's
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with super().connection(timeout) as connection:
            await connection.execute(f"SET LOCAL search_path = {JOBS_SCHEMA}")
            yield connection


class Worker:
    """All background work of one process."""

    def __init__(self, configuration: Settings, url: URL, engine: AsyncEngine, reconciler: Reconciler) -> None:
        self._engine, self._reconciler = engine, reconciler
        conninfo = make_conninfo(
            url.set(drivername="postgresql").render_as_string(hide_password=False),
            application_name="callhq-archiver worker",
        )
        kwargs = {} if configuration.prepared_statements else {"prepare_threshold": None}
        connector = procrastinate.PsycopgConnector(
            pool_factory=_Pool, conninfo=conninfo, kwargs=kwargs, min_size=1, max_size=4
        )
        self.jobs = procrastinate.App(connector=connector)
        self._read_histories = self.jobs.task(name="read_histories", queue=QUEUE)(self.read_histories)
        hand_out = self.jobs.task(name="hand_out_due", queue=QUEUE, queueing_lock="hand_out_due", pass_context=False)
        self.jobs.periodic(cron="* * * * * */5")(hand_out(self.hand_out_due))
        forget = self.jobs.task(name="forget_jobs", queue=QUEUE, queueing_lock="forget_jobs")
        self.jobs.periodic(cron="* * * * *")(forget(self.forget_jobs))

    async def run(self) -> None:
        """Until SIGTERM or Ctrl-C; jobs under way are ended first."""
        async with self.jobs.open_async():
            await self.jobs.run_worker_async(
                queues=[QUEUE],
                concurrency=4,
                listen_notify=False,  # it would hold a connection of its own, and PgBouncer knows no LISTEN
                fetch_job_polling_interval=POLL_SECONDS,
                delete_jobs="always",
                shutdown_graceful_timeout=20,
            )

    async def hand_out_due(self, timestamp: int) -> None:
        """Make jobs of the sessions whose history is to be read; `timestamp` is procrastinate's."""
        del timestamp
        now = datetime.now(UTC)
        due = await run_in_transaction(
            self._engine, lambda c: leases.hand_out_due(c, now, now + HANDED_OUT_FOR, HANDED_OUT_AT_ONCE)
        )
        parts = [due[start : start + SESSIONS_A_JOB] for start in range(0, len(due), SESSIONS_A_JOB)]
        if parts:
            jobs: list[dict[str, Any]] = [{"session_ids": part} for part in parts]
            await self._read_histories.batch_defer_async(*jobs)

    async def read_histories(self, session_ids: Sequence[str]) -> None:
        """Read the histories of these sessions."""
        try:
            await self._reconciler.read_all(session_ids)
        except UnauthorizedError as error:
            # They are handed out again, when the key may be another.
            log.error("histories cannot be read", error=str(error))  # noqa: TRY400  # there is nothing to trace

    async def forget_jobs(self, timestamp: int) -> None:
        """Jobs whose worker died are dropped; their sessions are due as soon as their leases have ended."""
        del timestamp
        for job in await self.jobs.job_manager.get_stalled_jobs():
            session_ids = job.task_kwargs.get("session_ids", [])
            if isinstance(session_ids, list) and session_ids:
                ids = [str(each) for each in session_ids]
                hasten = partial(leases.hasten, session_ids=ids, now=datetime.now(UTC))
                await run_in_transaction(self._engine, hasten)
            await self.jobs.job_manager.finish_job(job, procrastinate.jobs.Status.FAILED, delete_job=True)


def timing_of(configuration: Settings) -> Timing:
    """When histories are read, as the settings say."""
    return Timing(
        quiet=timedelta(seconds=configuration.reconcile_after),
        lifetime=timedelta(seconds=configuration.session_lifetime),
    )


@asynccontextmanager
async def reconciling(
    configuration: Settings,
    url: URL,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    gives_up: bool = True,
) -> AsyncIterator[tuple[AsyncEngine, Reconciler, Submit]]:
    """All that reading histories needs: connections to Postgres and to CallHQ, and the write path."""
    prepared = configuration.prepared_statements
    asking = database.connect_async(url, pool_size=2, prepared_statements=prepared)
    writing = database.connect_async(url, pool_size=1, prepared_statements=prepared)
    at_once = concurrency or configuration.history_concurrency
    timing = timing_of(configuration)
    queue = Ingest(
        writing,
        queue_events=10_000,
        queue_bytes=_QUEUE_BYTES,
        batch_events=_BATCH,
        timing=timing,
        patience=_PATIENCE_SECONDS,
    )
    pause = SharedPause(asking)
    client = Client(
        configuration.callhq_api_url,
        configuration.callhq_api_key,
        concurrency=at_once,
        rate=rate or configuration.history_rate or None,
        pause=pause,
    )

    async def submit(event: Event, began: datetime) -> str:
        source = APPLICATION if event.type == REGISTERED else SOURCE
        try:
            outcome = await queue.submit(Delivery(event, began, None, source=source))
        except (QueueFullError, UnavailableError) as error:
            raise NotRecordedError from error
        return outcome.status

    try:
        async with queue.running(), client:
            reconciler = Reconciler(
                asking, client, submit, pause=pause, timing=timing, concurrency=at_once, gives_up=gives_up
            )
            yield asking, reconciler, submit
    finally:
        await writing.dispose()
        await asking.dispose()
