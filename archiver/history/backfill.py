"""Read many sessions now, page by page; a backfill resumes after an interruption."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec
from sqlalchemy import case, delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import events
from archiver.archive import Timing
from archiver.database import run_async, tables
from archiver.history import leases

RESUMABLE = timedelta(days=1)  # an older unfinished backfill starts again
PAGE = 5_000  # session ids


class Selection(msgspec.Struct, frozen=True):
    """The sessions to read: these ids, those with events `since`, or `every` session.

    Without these fields, those that a reading could complete: sessions with open coverage, and unexpired sessions
    that CallHQ did not return.
    """

    session_ids: tuple[str, ...] = ()
    since: datetime | None = None
    every: bool = False

    @property
    def key(self) -> str:
        """Return a key that identifies the selection."""
        return events.digest([sorted(set(self.session_ids)), str(self.since), self.every]).hex()


async def begin(engine: AsyncEngine, selection: Selection) -> datetime:
    """Return the start time of the backfill of this selection: now, or the start of an unfinished one."""
    now, started = datetime.now(UTC), tables.backfills.c.started_at
    statement = insert(tables.backfills).values(selection=selection.key, started_at=now)
    begun = statement.on_conflict_do_update(
        index_elements=[tables.backfills.c.selection],
        set_={"started_at": case((started < now - RESUMABLE, statement.excluded.started_at), else_=started)},
    ).returning(started)
    started_at: datetime = await run_async(engine, lambda connection: connection.execute(begun).scalar_one())
    return started_at


async def end(engine: AsyncEngine, selection: Selection) -> None:
    """Mark the backfill as finished, so that the next one of this selection starts again."""
    ended = delete(tables.backfills).where(tables.backfills.c.selection == selection.key)
    await run_async(engine, lambda connection: connection.execute(ended))


async def count(engine: AsyncEngine, selection: Selection, begun: datetime, timing: Timing) -> int:
    """Return the number of unread sessions in the selection."""
    if not selection.session_ids:
        session_filter = leases.SessionFilter(begun, selection.since, selection.every, timing)
        return await run_async(engine, partial(leases.count_unread, session_filter=session_filter))
    return sum([len(page) async for page in _listed(engine, selection.session_ids, begun)])


async def pages(
    engine: AsyncEngine, selection: Selection, begun: datetime, timing: Timing
) -> AsyncIterator[list[str]]:
    """Yield the unread sessions in the selection, page by page."""
    if selection.session_ids:
        async for page in _listed(engine, selection.session_ids, begun):
            yield page
        return
    session_filter, after = leases.SessionFilter(begun, selection.since, selection.every, timing), ""
    while True:
        select_page = partial(leases.select_unread, session_filter=session_filter, after=after, limit=PAGE)
        page = await run_async(engine, select_page)
        if not page:
            return
        yield page
        after = page[-1]


async def _listed(engine: AsyncEngine, session_ids: Sequence[str], begun: datetime) -> AsyncIterator[list[str]]:
    ids = list(dict.fromkeys(session_ids))
    for start in range(0, len(ids), PAGE):
        page = ids[start : start + PAGE]
        read = await run_async(engine, partial(leases.select_read, session_ids=page, since=begun))
        if left := [session_id for session_id in page if session_id not in read]:
            yield left


async def unknown_sessions(engine: AsyncEngine, session_ids: Sequence[str]) -> list[str]:
    """Return the sessions, of these, that are unknown to the archive."""
    known = await run_async(engine, lambda c: leases.select_statuses(c, session_ids))
    return [session_id for session_id in session_ids if session_id not in known]
