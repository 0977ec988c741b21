"""Store the summaries of sessions that have none: those archived before the table existed."""

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.archive import summaries
from archiver.database import Lock, explain, is_cancelled, is_data_error, run_async
from archiver.outbound.feed import select_extent

log = structlog.get_logger(__name__)

SECONDS_PER_JOB = 10.0  # short, so that it does not delay the shutdown of a worker
SESSIONS_PER_STEP = 100  # short, because the publisher of the feed waits
STATEMENT_SECONDS = 2.0


class Summarizing:
    """The duty that adds missing summaries. A worker looks at each session once after its start."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._after: str | None = ""  # the last session that was looked at; None after the last one
        self._added = 0

    async def add_missing(self, beat: Callable[[], None]) -> None:
        """Continue where the last call ended, for about `SECONDS_PER_JOB`; call `beat` after each step."""
        started, added = monotonic(), self._added
        while self._after is not None:
            page = await run_async(self._engine, partial(summaries.select_missing, after=self._after))
            for start in range(0, len(page.session_ids), SESSIONS_PER_STEP):
                await self._add(page.session_ids[start : start + SESSIONS_PER_STEP])
                beat()
            self._after = page.last
            if monotonic() - started > SECONDS_PER_JOB:
                break
        if self._added > added:
            log.info("session summaries added", sessions=self._added, complete=self._after is None)

    async def _add(self, session_ids: Sequence[str]) -> None:
        """Add these summaries, in halves if one session is slow; skip a session that is slow by itself."""
        try:
            await run_async(self._engine, partial(_add, session_ids=session_ids), statement_seconds=STATEMENT_SECONDS)
        except DBAPIError as error:
            if not is_cancelled(error) and not is_data_error(error):
                raise
            if len(session_ids) == 1:
                # Its next change, or the next worker, tries again.
                log.warning("session summary not added", session_id=session_ids[0], reason=explain(error))
                return
        else:
            self._added += len(session_ids)
            return
        middle = len(session_ids) // 2
        await self._add(session_ids[:middle])
        await self._add(session_ids[middle:])


def _add(connection: Connection, session_ids: Sequence[str]) -> None:
    Lock.PUBLISHING.take(connection, exclusive=True)
    summaries.refresh(connection, dict.fromkeys(session_ids, select_extent(connection).newest))
