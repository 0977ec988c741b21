"""Share the pause that CallHQ requested among all workers, through Postgres.

A requested pause applies to the session of the call. If several recent sessions must wait, it applies to the account
or the platform, and therefore to all calls.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from time import monotonic

import structlog
from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.database import now, run_async, tables

log = structlog.get_logger(__name__)

_POLL_SECONDS = 0.1
_NAME = "callhq"
# The pause applies to all calls if this many of the latest sessions within this time must wait.
MIN_SESSIONS, LATEST, RECENT_SECONDS = 3, 5, 60.0


def end_pauses_beyond(connection: Connection, now: datetime, beyond: datetime) -> int:
    """End pauses now that would end after `beyond`, which no pause can; return their number."""
    return connection.execute(update(tables.pauses).where(tables.pauses.c.until > beyond).values(until=now)).rowcount


class SharedPause:
    """The pause of all workers, checked at most ten times per second, because each check costs a query."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._until = datetime.min.replace(tzinfo=UTC)
        self._checked = -_POLL_SECONDS
        self._looking = asyncio.Lock()
        self._latest: dict[
            str, tuple[float, bool]
        ] = {}  # by session, oldest first: time, and whether CallHQ responded

    async def wait(self) -> None:
        """Wait until no pause is in force."""
        # Another process may extend it, which no local event would signal.
        while (seconds := (await self._end() - now()).total_seconds()) > 0:  # noqa: ASYNC110  # other processes extend the pause
            await asyncio.sleep(min(seconds, 1.0))

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        """Pause every worker for `seconds`, unless the pause applies to a single session; return whether it was set.

        A longer existing pause stays in force.
        """
        telemetry.pauses.labels(reason).inc()
        self._note(session_id, is_answered=False)
        if not self._is_about_all():
            log.info("CallHQ throttled one session", session_id=session_id, seconds=seconds, reason=reason)
            return False
        log.warning("CallHQ requested a pause", seconds=seconds, reason=reason)
        statement = insert(tables.pauses).values(name=_NAME, until=now() + timedelta(seconds=seconds), reason=reason)
        later = statement.on_conflict_do_update(
            index_elements=[tables.pauses.c.name],
            set_={"until": statement.excluded.until, "reason": statement.excluded.reason},
            where=tables.pauses.c.until < statement.excluded.until,
        )
        await run_async(self._engine, lambda connection: connection.execute(later))
        self._checked = -_POLL_SECONDS
        return True

    def session_answered(self, session_id: str) -> None:
        """Record that CallHQ responded for this session."""
        self._note(session_id, is_answered=True)

    def _note(self, session_id: str, *, is_answered: bool) -> None:
        self._latest.pop(session_id, None)
        self._latest[session_id] = monotonic(), is_answered
        while len(self._latest) > LATEST:
            del self._latest[next(iter(self._latest))]

    def _is_about_all(self) -> bool:
        since = monotonic() - RECENT_SECONDS
        return sum(at >= since and not is_answered for at, is_answered in self._latest.values()) >= MIN_SESSIONS

    async def _end(self) -> datetime:
        async with self._looking:
            if monotonic() - self._checked >= _POLL_SECONDS:
                statement = select(tables.pauses.c.until).where(tables.pauses.c.name == _NAME)
                until = await run_async(self._engine, lambda connection: connection.scalar(statement))
                self._until = until or self._until
                self._checked = monotonic()
        return self._until
