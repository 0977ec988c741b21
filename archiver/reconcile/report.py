"""What became of the sessions that were read."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import run_in_transaction
from archiver.projection import leases
from archiver.projection.leases import Standing
from archiver.reconcile.leased import Leased, release_apart

log = structlog.get_logger(__name__)

TOLD_TOGETHER = 20

Outcome = Literal["read", "gone", "unreadable", "unavailable", "failed", "busy", "unknown"]


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What became of one session: the outcome, where it stood before and stands now, and why a failed one failed."""

    session_id: str
    outcome: Outcome
    before: Standing | None = None
    after: Standing | None = None
    error: str = ""

    @property
    def recovered(self) -> int:
        """Messages that this reading supplied."""
        after = self.after.repaired_messages if self.after else 0
        return after - (self.before.repaired_messages if self.before else 0)


class Report:
    """Tells what became of sessions, some together, as each look at where they stand costs a transaction."""

    def __init__(self, engine: AsyncEngine, leased: Leased, told: Callable[[Reading], object]) -> None:
        self._engine, self._leased, self._told = engine, leased, told
        self._finished: dict[str, tuple[Outcome, str]] = {}
        self.outcomes: Counter[Outcome] = Counter()

    async def add(self, session_id: str, outcome: Outcome, error: str) -> None:
        """One more."""
        self._finished[session_id] = (outcome, error)
        if len(self._finished) >= TOLD_TOGETHER:
            await self.tell()

    async def tell(self) -> None:
        """Of all that were not told yet; their leases end."""
        finished, self._finished = self._finished, {}
        if not finished:
            return
        ids = list(finished)
        leased = self._leased.let_go(ids)

        def select(connection: Connection) -> dict[str, Standing]:
            return leases.select_standings(connection, ids)

        after: dict[str, Standing] = {}
        try:
            await release_apart(self._engine, leased)
            after = await run_in_transaction(self._engine, select)
        except SQLAlchemyError as error:
            log.warning("leases not given back: they end by themselves", error=type(error).__name__)
        for session_id, (outcome, error_text) in finished.items():
            self.outcomes[outcome] += 1
            before = self._leased.before.pop(session_id, None)
            self._told(Reading(session_id, outcome, before, after.get(session_id), error_text))

    def tell_busy(self) -> None:
        """Of those that were left to somebody else."""
        for session_id in self._leased.busy:
            self.outcomes["busy"] += 1
            self._told(Reading(session_id, "busy"))
