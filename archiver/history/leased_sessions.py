"""Manage the leases of one reader: acquired on demand, renewed, and released at the end."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import explain, now, run_split_async
from archiver.history import leases
from archiver.history.leases import SessionStatus

log = structlog.get_logger(__name__)

LEASES_PER_BATCH = 50


class LeasedSessions:
    """The sessions of one reader, leased on demand. `due_at`: lease only sessions that still have this due time.

    `before`: status of each session when it was leased; `busy`: sessions leased by another reader.
    """

    def __init__(self, engine: AsyncEngine, session_ids: Sequence[str], due_at: datetime | None) -> None:
        self._engine, self._due_at = engine, due_at
        self._left = deque(dict.fromkeys(session_ids))
        self._waiting: deque[str] = deque()
        self._held: dict[str, datetime] = {}
        self._leasing, self._renewing = asyncio.Lock(), asyncio.Lock()
        self.before: dict[str, SessionStatus] = {}
        self.busy: list[str] = []

    @asynccontextmanager
    async def renewing_leases(self) -> AsyncIterator[None]:
        """Renew leases during the block, and release the remaining ones at its end."""
        renewing = asyncio.create_task(self._renew_for_ever())
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            if self._held:
                try:
                    await release_each(self._engine, self._held)
                except SQLAlchemyError as error:
                    log.warning("lease release failed; leases expire", error=explain(error))

    async def next_session(self) -> str | None:
        """Lease and return the next session to read; None if none is left."""
        async with self._leasing:
            while True:
                if self._waiting:
                    session_id = self._waiting.popleft()
                    if await self._is_still_leased(session_id):
                        return session_id
                    self.busy.append(session_id)
                elif self._left:
                    await self._lease([self._left.popleft() for _ in range(min(LEASES_PER_BATCH, len(self._left)))])
                else:
                    return None

    def lease_of(self, session_id: str) -> datetime:
        """Return the end of the lease of a session; a time in the distant past if it is no longer leased."""
        return self._held.get(session_id, datetime.min.replace(tzinfo=UTC))

    def take_leases(self, session_ids: Sequence[str]) -> dict[str, datetime]:
        """Remove and return the leases of these sessions; the caller must release them."""
        return {each: self._held.pop(each) for each in session_ids if each in self._held}

    async def _lease(self, session_ids: Sequence[str]) -> None:

        def claim(connection: Connection, part: Sequence[str]) -> tuple[datetime, dict[str, SessionStatus]]:
            moment = now()  # on the database clock, as of this transaction
            lease = moment + leases.LEASE
            return lease, leases.claim(connection, part, moment, lease, self._due_at)

        parts, _ = await run_split_async(self._engine, session_ids, claim)
        claimed_statuses = {session_id: status for _, claimed in parts for session_id, status in claimed.items()}
        held = {session_id: lease for lease, claimed in parts for session_id in claimed}
        if self._due_at is None:  # otherwise the others may no longer be due
            self.busy += [session_id for session_id in session_ids if session_id not in claimed_statuses]
        self.before |= claimed_statuses
        self._held |= held
        self._waiting += [session_id for session_id in session_ids if session_id in claimed_statuses]

    async def _is_still_leased(self, session_id: str) -> bool:
        """Return whether the lease is still held; it may have expired during a pause of the process."""
        lease = self._held.get(session_id)
        if lease is not None and lease <= now():
            await self._renew()
        return session_id in self._held

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(leases.LEASE.total_seconds() / 3)
            try:
                await self._renew()
            except SQLAlchemyError as error:
                log.warning("lease renewal failed", error=explain(error))

    async def _renew(self) -> None:
        # one renewal at a time: a second one would mistake leases that the first has renewed for another reader's
        async with self._renewing:
            await self._renew_all()

    async def _renew_all(self) -> None:
        held = dict(self._held)

        def renew(connection: Connection, items: Sequence[tuple[str, datetime]]) -> dict[str, datetime]:
            lease = now() + leases.LEASE
            return dict.fromkeys(leases.renew(connection, dict(items), lease), lease)

        parts, waiting = await run_split_async(self._engine, list(held.items()), renew)
        renewing_leases = {session_id: lease for part in parts for session_id, lease in part.items()}
        for session_id in (held.keys() & self._held.keys()) - {session_id for session_id, _ in waiting}:
            if session_id in renewing_leases:
                self._held[session_id] = renewing_leases[session_id]
            else:
                del self._held[session_id]


async def release_each(engine: AsyncEngine, leased: Mapping[str, datetime]) -> None:
    """Release leases; the lease of a locked session expires on its own."""
    await run_split_async(
        engine, list(leased.items()), lambda connection, items: leases.release(connection, dict(items))
    )
