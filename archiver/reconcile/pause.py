"""The pause that CallHQ asks of one worker and all obey, kept in Postgres."""

import asyncio
from datetime import UTC, datetime, timedelta
from time import monotonic

import structlog
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import tables, telemetry
from archiver.database import now, run_in_transaction

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 0.1
_NAME = "callhq"


class SharedPause:
    """A look costs a query, so a process looks ten times a second at most: so much later it may learn of a pause."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._until = datetime.min.replace(tzinfo=UTC)
        self._looked = -_LOOK_SECONDS
        self._looking = asyncio.Lock()

    async def wait(self) -> None:
        """Until nobody asks for a pause any more."""
        # Another process may prolong it meanwhile, which no event of ours would tell.
        while (seconds := (await self._end() - now()).total_seconds()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(seconds, 1.0))

    async def set(self, seconds: float, reason: str) -> None:
        """Let every worker pause so long; a longer pause under way stays."""
        telemetry.pauses.labels(reason).inc()
        log.warning("pause", seconds=seconds, reason=reason)
        statement = insert(tables.pauses).values(name=_NAME, until=now() + timedelta(seconds=seconds), reason=reason)
        later = statement.on_conflict_do_update(
            index_elements=[tables.pauses.c.name],
            set_={"until": statement.excluded.until, "reason": statement.excluded.reason},
            where=tables.pauses.c.until < statement.excluded.until,
        )
        await run_in_transaction(self._engine, lambda connection: connection.execute(later))
        self._looked = -_LOOK_SECONDS

    async def _end(self) -> datetime:
        async with self._looking:
            if monotonic() - self._looked >= _LOOK_SECONDS:
                statement = select(tables.pauses.c.until).where(tables.pauses.c.name == _NAME)
                until = await run_in_transaction(self._engine, lambda connection: connection.scalar(statement))
                self._until = until or self._until
                self._looked = monotonic()
        return self._until
