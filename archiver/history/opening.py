"""Open the resources for reading histories: connections to Postgres and CallHQ, and the write path."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.archive import Timing
from archiver.database.connections import Connections
from archiver.events import Delivery, Event
from archiver.events.responses import APPLICATION, REGISTERED, SOURCE
from archiver.history import Reconciler, Submit, Submitted
from archiver.history.callhq import Client
from archiver.history.shared_pause import SharedPause
from archiver.inbound import CONNECTIONS, Ingest, QueueFullError, UnavailableError
from archiver.settings import Settings

_BATCH = 50  # histories per transaction
_GATHER_SECONDS = 0.05
_SUBMIT_SECONDS = 20.0  # for which a reader waits for the commit of its response; a slower commit may still succeed
_QUEUE_BYTES = 256 * 1_048_576  # of histories waiting for a commit


@asynccontextmanager
async def reconciling(
    configuration: Settings,
    url: URL,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    mark_unavailable: bool = True,
) -> AsyncIterator[tuple[AsyncEngine, Reconciler, Submit]]:
    """Yield an engine, a reader of histories and the write path, with connections to Postgres and CallHQ."""
    connections = Connections(url, configuration.prepared_statements)
    async with connections.asynchronous(2) as engine, connections.asynchronous(CONNECTIONS) as writing:
        timing = Timing.of(configuration)
        queue = Ingest(
            writing,
            queue_events=10_000,
            queue_bytes=_QUEUE_BYTES,
            batch_events=_BATCH,
            timing=timing,
            gather_seconds=_GATHER_SECONDS,
        )
        client = Client(
            configuration.callhq_api_url,
            configuration.callhq_api_key,
            concurrency=concurrency or configuration.history_concurrency,
            rate=rate or configuration.history_rate or None,
            pause=SharedPause(engine),
        )

        async def submit(event: Event, began: datetime) -> Submitted:
            source = APPLICATION if event.type == REGISTERED else SOURCE
            delivery = Delivery(event, began, None, source=source)
            while True:
                try:
                    async with asyncio.timeout(_SUBMIT_SECONDS):
                        return (await queue.submit(delivery)).status
                except QueueFullError:
                    # there is room once other histories are committed
                    await asyncio.sleep(_GATHER_SECONDS)
                except (UnavailableError, TimeoutError):
                    return "unavailable"

        async with queue.running(), client:
            reconciler = Reconciler(engine, client, submit, timing=timing, mark_unavailable=mark_unavailable)
            yield engine, reconciler, submit
