"""Rebuild the archive from the ledger by session (I10): readers never see it empty; memory is bounded.

The receiver keeps running: a page of sessions is locked while it is rebuilt, and later events
projects itself.
"""

from collections.abc import Callable, Iterator

from sqlalchemy import Connection, Engine, func, select

from archiver.archive import Timing
from archiver.archive.replay import Page, replay_sessions, replay_unassigned
from archiver.database import Lock, run, tables

CONFLICT_RETRIES = 10


def count_events(connection: Connection) -> int:
    """How many ledger rows there are to read."""
    return connection.scalar(select(func.count()).select_from(tables.events)) or 0


def rebuild(engine: Engine, timing: Timing) -> Iterator[int]:
    """Rebuild every session, then unassigned turns; yields the number of ledger rows read in each step.

    If stopped half-way, rebuilt sessions stay rebuilt and the others unchanged.
    """
    yield from _pages(engine, lambda connection, after: replay_sessions(connection, after, timing), exclusive=False)
    yield from _pages(engine, replay_unassigned, exclusive=True)


def _pages(engine: Engine, replay: Callable[[Connection, str], Page], *, exclusive: bool) -> Iterator[int]:
    after: str | None = ""
    while after is not None:
        page = _page(engine, replay, after, exclusive=exclusive)
        yield page.events
        after = page.last


def _page(engine: Engine, replay: Callable[[Connection, str], Page], after: str, *, exclusive: bool) -> Page:
    def work(connection: Connection) -> Page:
        Lock.RECORDING.take(connection, exclusive=exclusive)
        return replay(connection, after)

    return run(engine, work, statement_seconds=600, lock_seconds=120, retries=CONFLICT_RETRIES)
