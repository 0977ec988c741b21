"""The sessions that one reader has leased: leased as they are needed, kept while it lives, given back in the end."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import explain, now, run_apart
from archiver.projection import leases
from archiver.projection.leases import Standing

log = structlog.get_logger(__name__)

LEASED_TOGETHER = 50


class Leased:
    """Hands out sessions to one reader; `due_at`: only those that are still due as of then.

    `before` says where those that were leased stood, `busy` are those that somebody else reads.
    """

    def __init__(self, engine: AsyncEngine, session_ids: Sequence[str], due_at: datetime | None) -> None:
        self._engine, self._due_at = engine, due_at
        self._left = deque(dict.fromkeys(session_ids))
        self._waiting: deque[str] = deque()
        self._held: dict[str, datetime] = {}
        self._leasing, self._renewing = asyncio.Lock(), asyncio.Lock()
        self.before: dict[str, Standing] = {}
        self.busy: list[str] = []

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renews leases meanwhile; gives back in the end what is still held."""
        renewing = asyncio.create_task(self._renew_for_ever())
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            if self._held:
                try:
                    await release_apart(self._engine, self._held)
                except SQLAlchemyError as error:
                    log.warning("leases not given back: they end by themselves", error=explain(error))

    async def next_session(self) -> str | None:
        """The next one to read; None: there is no more."""
        async with self._leasing:
            while True:
                if self._waiting:
                    session_id = self._waiting.popleft()
                    if await self._is_ours(session_id):
                        return session_id
                    self.busy.append(session_id)
                elif self._left:
                    await self._lease([self._left.popleft() for _ in range(min(LEASED_TOGETHER, len(self._left)))])
                else:
                    return None

    def lease_of(self, session_id: str) -> datetime:
        """Until when we have it, or had it."""
        return self._held.get(session_id, datetime.min.replace(tzinfo=UTC))

    def let_go(self, session_ids: Sequence[str]) -> dict[str, datetime]:
        """These are given back by the caller, who is told the lease of each."""
        return {each: self._held.pop(each) for each in session_ids if each in self._held}

    async def _lease(self, session_ids: Sequence[str]) -> None:

        def claim(connection: Connection, part: Sequence[str]) -> tuple[datetime, dict[str, Standing]]:
            moment = now()  # by the database's clock, which this transaction has seen
            lease = moment + leases.LEASE
            return lease, leases.claim(connection, part, moment, lease, self._due_at)

        parts, _ = await run_apart(self._engine, session_ids, claim)
        mine = {session_id: standing for _, claimed in parts for session_id, standing in claimed.items()}
        held = {session_id: lease for lease, claimed in parts for session_id in claimed}
        if self._due_at is None:  # else the others may not be due any more
            self.busy += [session_id for session_id in session_ids if session_id not in mine]
        self.before |= mine
        self._held |= held
        self._waiting += [session_id for session_id in session_ids if session_id in mine]

    async def _is_ours(self, session_id: str) -> bool:
        """Whoever slept for too long may find that others have leased what was leased."""
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
                log.warning("leases not renewed", error=explain(error))

    async def _renew(self) -> None:
        async with self._renewing:  # of two at a time the second would take what the first renewed for another's
            await self._renew_all()

    async def _renew_all(self) -> None:
        held = dict(self._held)

        def renew(connection: Connection, items: Sequence[tuple[str, datetime]]) -> dict[str, datetime]:
            lease = now() + leases.LEASE
            return dict.fromkeys(leases.renew(connection, dict(items), lease), lease)

        parts, waiting = await run_apart(self._engine, list(held.items()), renew)
        kept = {session_id: lease for part in parts for session_id, lease in part.items()}
        for session_id in (held.keys() & self._held.keys()) - {session_id for session_id, _ in waiting}:
            if session_id in kept:
                self._held[session_id] = kept[session_id]
            else:
                del self._held[session_id]


async def release_apart(engine: AsyncEngine, leased: Mapping[str, datetime]) -> None:
    """Give leases back; one that another transaction holds ends by itself."""
    await run_apart(engine, list(leased.items()), lambda connection, items: leases.release(connection, dict(items)))
