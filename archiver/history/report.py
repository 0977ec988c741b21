"""Report the results of readings."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import run_async
from archiver.history import leases
from archiver.history.leased_sessions import LeasedSessions, release_each
from archiver.history.leases import SessionStatus

log = structlog.get_logger(__name__)

RESULTS_PER_FLUSH = 20

Outcome = Literal["read", "gone", "unreadable", "unavailable", "failed", "busy", "unknown"]


class ReconcileResult(msgspec.Struct, frozen=True, gc=False):
    """The result of reading one session: outcome, status before and after, and error."""

    session_id: str
    outcome: Outcome
    before: SessionStatus | None = None
    after: SessionStatus | None = None
    error: str = ""

    @property
    def recovered(self) -> int:
        """Return the number of messages that this reading supplied."""
        after = self.after.repaired_messages if self.after else 0
        return after - (self.before.repaired_messages if self.before else 0)


class ResultReporter:
    """A reporter that groups results, because each status query costs a transaction."""

    def __init__(
        self, engine: AsyncEngine, leased: LeasedSessions, on_result: Callable[[ReconcileResult], object]
    ) -> None:
        self._engine, self._leased, self._on_result = engine, leased, on_result
        self._finished: dict[str, tuple[Outcome, str]] = {}
        self.outcomes: Counter[Outcome] = Counter()

    async def add(self, session_id: str, outcome: Outcome, error: str) -> None:
        """Add the result of one session."""
        self._finished[session_id] = (outcome, error)
        if len(self._finished) >= RESULTS_PER_FLUSH:
            await self.flush()

    async def flush(self) -> None:
        """Report all pending results and release their leases."""
        finished, self._finished = self._finished, {}
        if not finished:
            return
        ids = list(finished)
        leased = self._leased.take_leases(ids)

        def select(connection: Connection) -> dict[str, SessionStatus]:
            return leases.select_statuses(connection, ids)

        after: dict[str, SessionStatus] = {}
        try:
            await release_each(self._engine, leased)
            after = await run_async(self._engine, select)
        except SQLAlchemyError as error:
            log.warning("lease release failed; leases expire", error=type(error).__name__)
        for session_id, (outcome, error_text) in finished.items():
            self.outcomes[outcome] += 1
            before = self._leased.before.pop(session_id, None)
            self._on_result(ReconcileResult(session_id, outcome, before, after.get(session_id), error_text))

    def report_busy(self) -> None:
        """Report the sessions that another reader has leased."""
        for session_id in self._leased.busy:
            self.outcomes["busy"] += 1
            self._on_result(ReconcileResult(session_id, "busy"))
