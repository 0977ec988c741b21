"""Compact in the background: split into pieces the history responses that earlier versions stored as bytes."""

from collections.abc import Callable
from time import monotonic

import structlog
from sqlalchemy import Engine

from archiver.ledger import compaction

log = structlog.get_logger(__name__)

SECONDS_PER_JOB = 10.0  # short, so that it delays neither the shutdown of a worker nor other tasks


class Compacting:
    """The compaction duty: it splits the history responses of earlier versions into pieces, once for each session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._after: str | None = ""  # the last completed session; None when all are complete
        self._responses = 0

    def compact(self, beat: Callable[[], None]) -> None:
        """Continue where the last call ended, for about `SECONDS_PER_JOB`; call `beat` after each step."""
        if self._after is None:
            return
        started = monotonic()
        for step in compaction.compact(self._engine, self._after):
            beat()
            self._responses += step.responses
            self._after = step.last
            if monotonic() - started > SECONDS_PER_JOB:
                break
        if self._after is None and self._responses:
            log.info("history responses compacted", responses=self._responses)
