"""Sum the rollups in the background, after the contributions of sessions that earlier versions recorded."""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archiver.archive import rollups
from archiver.database import run, run_split

log = structlog.get_logger(__name__)

SECONDS_PER_JOB = 10.0  # short, so that it does not delay the shutdown of a worker

Item = TypeVar("Item")


class Summing:
    """The duty that keeps the rollups."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._contributed = 0  # sessions

    def sum(self, beat: Callable[[], None]) -> None:
        """Sum stale buckets for about `SECONDS_PER_JOB`; call `beat` after each page.

        First computes missing contributions, because each of them makes buckets stale. A session or bucket that is
        locked or too slow is skipped, and its error raised.
        """
        ends_at, slow = monotonic() + SECONDS_PER_JOB, list[DBAPIError]()
        while done := self._page(rollups.select_uncontributed, rollups.contribute, slow):
            beat()
            self._contributed += done
            if monotonic() > ends_at:
                break
        if self._contributed:
            log.info("contributions of earlier sessions computed", sessions=self._contributed)
            self._contributed = 0
        # Not until none is stale: the publisher makes the latest bucket stale again and again.
        while self._page(rollups.select_stale, rollups.sum_stale, slow) == rollups.BUCKETS_PER_PAGE:
            beat()
            if monotonic() > ends_at:
                break
        if slow:
            raise slow[0]

    def _page(
        self,
        select: Callable[[Connection], Sequence[Item]],
        work: Callable[[Connection, Sequence[Item]], int],
        slow: list[DBAPIError],
    ) -> int:
        return sum(run_split(self._engine, run(self._engine, select), work, slow))
