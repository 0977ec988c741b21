"""Read and write the tables `workers` and `duties`: latest reports, and starts of shared duties."""

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec
from sqlalchemy import Connection, text

from archiver import __version__
from archiver.database import privileges
from archiver.telemetry import duty_health as duties
from archiver.telemetry.duty_health import Report

BEAT_SECONDS = 5.0
FRESH_SECONDS = 30.0  # a worker that reported within this time is running
_KEPT_DAYS = 1  # days for which a worker that exited without a report is still shown


class Worker(msgspec.Struct, frozen=True):
    """One worker process as it last reported. `age`: seconds since then, on the clock of Postgres."""

    id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    beat_at: datetime
    age: float
    duties: dict[str, Report]

    @property
    def is_fresh(self) -> bool:
        """Return whether the worker is running, according to its reports."""
        return -FRESH_SECONDS < self.age < FRESH_SECONDS

    @property
    def name(self) -> str:
        """Return the host and the process id."""
        return f"{self.host}:{self.pid}"

    @property
    def faulty(self) -> dict[str, Report]:
        """Return the duties that need an operator."""
        return {name: report for name, report in self.duties.items() if report.is_faulty}


_UPSERT = text(
    """
    INSERT INTO archiver.workers (id, host, pid, version, started_at, beat_at, duties)
    VALUES (:id, :host, :pid, :version, :started_at, clock_timestamp(), CAST(:duties AS json))
    ON CONFLICT (id) DO UPDATE SET beat_at = excluded.beat_at, duties = excluded.duties
    """
)


class Process(msgspec.Struct, frozen=True):
    """The process that reports."""

    id: str
    host: str = msgspec.field(default_factory=socket.gethostname)
    pid: int = msgspec.field(default_factory=os.getpid)
    version: str = __version__
    started_at: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))


def upsert_worker(connection: Connection, process: Process, reports: Mapping[str, Report]) -> None:
    """Record the reports of a worker, with the time of the clock of Postgres."""
    values = msgspec.structs.asdict(process) | {"duties": duties.as_text(reports)}
    connection.execute(_UPSERT, values)


def delete_worker(connection: Connection, worker_id: str) -> None:
    """Delete the row of a worker."""
    connection.execute(text("DELETE FROM archiver.workers WHERE id = :id"), {"id": worker_id})


_DELETE_OLD = text(
    "DELETE FROM archiver.workers WHERE beat_at < clock_timestamp() - make_interval(days => :days)"
).bindparams(days=_KEPT_DAYS)


def delete_old(connection: Connection) -> None:
    """Delete the rows of workers that have not reported for a day."""
    connection.execute(_DELETE_OLD)


_SELECT = text(
    """
    SELECT id, host, pid, version, started_at, beat_at,
           extract(epoch FROM clock_timestamp() - beat_at)::float8 AS age, CAST(duties AS text) AS duties
      FROM archiver.workers ORDER BY host, pid, id LIMIT 1000
    """
)


def may_select(connection: Connection) -> bool:
    """Return whether this user may read the reports of workers; False also if the schema is older."""
    return privileges.may_select(connection, "workers")


def select_workers(connection: Connection) -> Sequence[Worker]:
    """Return the latest report of every worker."""
    return [
        Worker(**{**row, "duties": duties.parse(row["duties"])}) for row in connection.execute(_SELECT).mappings()
    ]


def select_indexing(connection: Connection, *, is_on: bool = True) -> list[Worker]:
    """Return the running workers with ARCHIVER_SEARCH=on, or those with off."""
    return [
        each
        for each in select_workers(connection)
        if each.is_fresh and "search" in each.duties and (each.duties["search"].state != "off") == is_on
    ]


# A time in the future was written while the clock of Postgres was ahead: it is treated as long past.
_CLAIM = text(
    """
    INSERT INTO archiver.duties (name, begun_at) VALUES (:name, clock_timestamp())
    ON CONFLICT (name) DO UPDATE SET begun_at = excluded.begun_at
     WHERE duties.begun_at <= excluded.begun_at - make_interval(secs => :seconds)
        OR duties.begun_at > excluded.begun_at
    RETURNING 1
    """
)


def claim(connection: Connection, name: str, seconds: float) -> bool:
    """Claim a duty that one worker at a time runs. Return False if it began in the last `seconds`."""
    return connection.scalar(_CLAIM, {"name": name, "seconds": seconds}) is not None
