"""Sum the rollups in the background, and add missing derived rows of sessions and values of promoted variables."""

from collections.abc import Callable
from time import monotonic

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archiver.archive import derived_rows, rollups, variable_values
from archiver.database import Lock, run, run_split
from archiver.outbound.feed import select_extent

log = structlog.get_logger(__name__)

SECONDS_PER_JOB = 10.0  # short, so that it does not delay the shutdown of a worker
STATEMENT_SECONDS = 5.0  # for the derived rows of a few sessions; short, because the publisher of the feed waits


class Summing:
    """The duty that keeps the sums of the rollups up to date."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sum(self, beat: Callable[[], None]) -> bool:
        """Sum stale buckets for about `SECONDS_PER_JOB`; call `beat` after each page.

        Returns whether rows of sessions are still missing.

        First adds missing derived rows and values, because each of them makes buckets stale. Skips a bucket that is
        locked or too slow; raises the first such error at the end.
        """
        ends_at = monotonic() + SECONDS_PER_JOB
        is_complete = self._add_missing(beat, ends_at) and self._collect(beat, ends_at)
        slow = list[DBAPIError]()
        # Does not repeat until no bucket is stale: the publisher makes the latest bucket stale again and again.
        while self._sum_page(slow) == rollups.BUCKETS_PER_PAGE:
            beat()
            if monotonic() > ends_at:
                break
        if slow:
            raise slow[0]
        return not is_complete

    def _sum_page(self, slow: list[DBAPIError]) -> int:
        stale = run(self._engine, rollups.select_stale)
        return sum(run_split(self._engine, stale, rollups.sum_stale, slow))

    def _add_missing(self, beat: Callable[[], None], ends_at: float) -> bool:
        """Add missing derived rows; return whether all exist now."""
        added = 0
        while done := run(self._engine, _add_missing, statement_seconds=STATEMENT_SECONDS):
            beat()
            added += done
            if monotonic() > ends_at:
                break
        if added:
            log.info("derived rows of sessions added", sessions=added, complete=not done)
        return not done

    def _collect(self, beat: Callable[[], None], ends_at: float) -> bool:
        """Store the values of promoted variables, and delete those of removed ones; return whether all is done."""
        pages = 0
        while is_unfinished := run(self._engine, _collect, statement_seconds=STATEMENT_SECONDS):
            beat()
            pages += 1
            if monotonic() > ends_at:
                break
        if pages and not is_unfinished:
            log.info("values of promoted variables stored")
        return not is_unfinished


def _collect(connection: Connection) -> bool:
    Lock.PUBLISHING.take(connection, exclusive=True)
    return variable_values.collect(connection)


def _add_missing(connection: Connection) -> int:
    Lock.PUBLISHING.take(connection, exclusive=True)
    return derived_rows.add_missing(connection, select_extent(connection).newest)
