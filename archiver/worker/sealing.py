"""Periodic sealing with the configured key."""

from collections.abc import Callable
from datetime import timedelta
from time import monotonic

import structlog
from sqlalchemy import Engine

from archiver import database, telemetry
from archiver.compliance import seals
from archiver.database.identity import Guard
from archiver.settings import Settings

log = structlog.get_logger(__name__)

SEALS_PER_JOB = 20  # a backlog must not delay the shutdown of a worker


class Sealing:
    """The sealing duty. It runs in a thread, because it reads in streams."""

    def __init__(self, configuration: Settings, engine: Engine, guard: Guard) -> None:
        self._engine, self._guard = engine, guard
        self._key = seals.signing_key(configuration)
        self._every = timedelta(seconds=configuration.seal_every)
        self._not_before = float("-inf")  # on `time.monotonic`
        self._settling = seals.Settling()

    def seal(self, beat: Callable[[], None] = lambda: None) -> None:
        """Seal the settled rows, if the newest seal is old enough; `beat` is called after each seal."""
        with database.transaction(self._engine) as connection:
            self._guard.require(connection)
            newest = seals.select_newest(connection)
        now = database.now()
        # A clock that is or was ahead must not stop sealing.
        if timedelta() <= now - newest.sealed_at < self._every or monotonic() < self._not_before:
            return
        try:
            made = seals.seal(self._engine, self._key, SEALS_PER_JOB, self._settling, beat)
        except seals.LedgerBusyError as error:
            if not self._settling.is_waiting:
                self._not_before = monotonic() + self._every.total_seconds()
            log.warning("sealing failed", reason=str(error))
            return
        if len(made) < SEALS_PER_JOB:
            telemetry.sealing.set(now.timestamp())
