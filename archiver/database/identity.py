"""Identify the database, and detect that it was replaced or has lost rows.

The newest row in `archiver.epochs` identifies it: by the system identifier of the cluster, the object id of the
database, and, if it is embedded, the inode of its files, which a copy does not share. Each machine remembers in
`ARCHIVER_HOME/served.json` the newest event, seal and change that it saw committed, and the highest timeline. A
database that lacks one of them is in an earlier state; the machine that detects this records it in
`archiver.epoch_faults`, so that machines without that memory stop as well. A table that cannot be read is left out of
the comparison. Until `archiver adopt` begins a new epoch, nothing is sealed, published or sent, but events are
received.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import msgspec
import structlog
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.database import explain, limit, limit_locks, privileges, run_async
from archiver.errors import ArchiverError

T = TypeVar("T")

log = structlog.get_logger(__name__)

FILE = "served.json"
WATCH_SECONDS, WATCH_LIMIT_SECONDS, LOG_SECONDS = 2.0, 3.0, 60.0
CHECK_SECONDS = 1.0  # between two checks in one process
# gap of cursors at the start of an epoch: more than can be published between two checks of a machine
SKIPPED = 1_000_000
UNREADABLE_SECONDS = 10.0  # pause after a check that could not be completed
FOREIGN = "this database is not the one served before"
_MAX_EPOCHS = 20  # databases and epochs that one ARCHIVER_HOME remembers
ADVICE = (
    "If this database replaces the earlier one, run `archiver adopt`; otherwise set DATABASE_URL to the earlier one."
)


class ForeignDatabaseError(ArchiverError):
    """The database is not the one served before; the message says why."""


class Identity(msgspec.Struct, frozen=True):
    """The identity of a database. Fields are empty or None if unknown or unreadable by this user."""

    system_identifier: str
    database_oid: int
    timeline: int | None
    place: str | None = None

    def differs_from(self, other: "Identity") -> str:
        """Return the first difference from the recorded identity; empty if there is none. A timeline may increase."""
        if self.database_oid != other.database_oid:
            return f"its object id is {self.database_oid}, not {other.database_oid}"
        for own_value, other_value, what in (
            (self.system_identifier, other.system_identifier, "it is in another cluster"),
            (self.place, other.place, "it has other files"),
        ):
            if own_value and other_value and own_value != other_value:
                return f"{what} ({own_value}, not {other_value})"
        if self.timeline and other.timeline and self.timeline < other.timeline:
            return f"its timeline went back from {other.timeline} to {self.timeline}"
        return ""


class Epoch(msgspec.Struct, frozen=True):
    """A period of a database's life; `archiver adopt` starts the next."""

    id: int
    identity: Identity
    cursor: int
    began_at: datetime

    @property
    def key(self) -> str:
        """Return the name of this epoch in the file of this machine."""
        whole = self.identity
        return f"{whole.system_identifier}:{whole.database_oid}:{self.id}:{self.began_at.timestamp():.6f}"

    @property
    def _prefix(self) -> str:
        return f"{self.identity.system_identifier}:{self.identity.database_oid}:"

    def is_same_database(self, key: str) -> bool:
        """Return whether this key belongs to an epoch of the same database."""
        return key.startswith(self._prefix)

    def newer_of(self, keys: Iterable[str]) -> int:
        """Return the number of the newest later epoch of the same database among these keys; 0 if there is none."""
        own = [key.removeprefix(self._prefix) for key in keys if self.is_same_database(key)]
        numbers = [int(key.partition(":")[0]) for key in own]
        return max((number for number in numbers if number > self.id), default=0)


class Watermarks(msgspec.Struct, frozen=True):
    """The highest timeline, and the id of the newest committed row of each kind with content that is unique to it."""

    timeline: int = 0
    event_id: int = 0
    event_at: str = ""
    seal_id: int = 0
    seal_hash: str = ""
    cursor: int = 0
    changed_at: str = ""

    def merge(self, other: "Watermarks") -> "Watermarks":
        """Return the newer value of each watermark."""
        event, seal, change = (
            max((self.event_id, self.event_at), (other.event_id, other.event_at)),
            max((self.seal_id, self.seal_hash), (other.seal_id, other.seal_hash)),
            max((self.cursor, self.changed_at), (other.cursor, other.changed_at)),
        )
        return Watermarks(max(self.timeline, other.timeline), *event, *seal, *change)


_MAY_ASK = text("SELECT has_function_privilege('pg_control_system()', 'EXECUTE')")
_SYSTEM = text("SELECT CAST((pg_control_system()).system_identifier AS text)")
_OWN = text(
    """
    SELECT CAST(d.oid AS bigint) AS oid, pg_is_in_recovery() AS is_standby
      FROM pg_database d WHERE d.datname = current_database()
    """
)
_TIMELINE = text("SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")


def select_identity(connection: Connection, place: str | None = None) -> Identity:
    """Return the identity of the database. `place`: the id of its files, if it is embedded."""
    system = str(connection.scalar(_SYSTEM)) if connection.scalar(_MAY_ASK) else ""
    own = connection.execute(_OWN).one()
    timeline = None if own.is_standby else int(str(connection.scalar(_TIMELINE)), 16)
    return Identity(system, own.oid, timeline, place)


def embedded_files_id(home: Path, url: URL) -> str | None:
    """Return the id of the files of an embedded database; it survives a move, but a copy has a different one.

    Returns None for any other database, and if the database's sockets had to be placed elsewhere.
    """
    data = (home / "postgres").resolve()
    if url.query.get("host") != str(data):
        return None
    try:
        return f"inode {(data / 'PG_VERSION').stat().st_ino}"
    except OSError:
        return None


def may_select(connection: Connection) -> bool:
    """Return whether this user may read the identity of the database."""
    return privileges.may_select(connection, "epochs")


_EPOCH = text(
    "SELECT id, system_identifier, database_oid, timeline, place, cursor, began_at FROM archiver.epochs"
    " ORDER BY id DESC LIMIT 1"
)


def select_epoch(connection: Connection) -> Epoch | None:
    """Return the newest epoch; None if no process has served this database yet."""
    row = connection.execute(_EPOCH).first()
    if row is None:
        return None
    identity = Identity(row.system_identifier, row.database_oid, row.timeline, row.place)
    return Epoch(row.id, identity, row.cursor, row.began_at)


_INSERT = text(
    """
    INSERT INTO archiver.epochs (id, system_identifier, database_oid, timeline, place, cursor, given, began_at)
    VALUES (:id, :system_identifier, :database_oid, :timeline, :place, :cursor, :given, clock_timestamp())
    ON CONFLICT (id) DO NOTHING
    """
)
_NEWEST_CURSOR = text("SELECT coalesce(max(cursor), 0) FROM archiver.changes")


def insert_epoch(connection: Connection, identity: Identity, number: int = 1, given: int = 0) -> None:
    """Begin an epoch at the current end of the feed. `given`: the greatest cursor that is known to be in use."""
    cursor = int(connection.scalar(_NEWEST_CURSOR) or 0)
    skipped = SKIPPED if number > 1 else 0
    values = {"id": number, "cursor": cursor, "given": max(cursor, given) + skipped}
    connection.execute(_INSERT, {**values, **msgspec.structs.asdict(identity)})


_SELECT_FAULT = text("SELECT host, reason, cursor FROM archiver.epoch_faults WHERE epoch_id = :epoch_id")
_INSERT_FAULT = text(
    """
    INSERT INTO archiver.epoch_faults (epoch_id, host, reason, cursor, found_at)
    VALUES (:epoch_id, :host, :reason, :cursor, clock_timestamp())
    ON CONFLICT (epoch_id) DO NOTHING
    """
)


class IncompleteCheckError(ArchiverError):
    """A check could not read a table in time, or could not read or write a file; the message says why."""


PROBE_LOCK_SECONDS, PROBE_SECONDS = 0.1, 1.0


def _probe(connection: Connection, statement: TextClause, parameters: Mapping[str, Any]) -> Any:
    """Return the first row. The transaction, its limits and its locks remain as they were, even after a failure.

    Raises `IncompleteCheckError`, and SQLAlchemy's own error if the connection is lost.
    """
    nested = connection.begin_nested()
    try:
        limit(connection, PROBE_SECONDS)
        limit_locks(connection, PROBE_LOCK_SECONDS)
        return connection.execute(statement, parameters).first()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        raise IncompleteCheckError(explain(error)) from None
    finally:
        if nested.is_active:
            nested.rollback()


class Kind(msgspec.Struct, frozen=True):
    """A kind of row that machines remember. `newest` selects the newest row; `has`: whether a given row exists."""

    table: str
    number: str  # fields of `Watermarks`
    content: str
    newest: TextClause
    has: TextClause
    name: str


KINDS = (
    Kind(
        "events",
        "event_id",
        "event_at",
        text("SELECT id, CAST(received_at AS text) FROM archiver.events ORDER BY id DESC LIMIT 1"),
        text(
            """
            SELECT EXISTS (SELECT FROM archiver.events WHERE id = :number AND CAST(received_at AS text) = :content)
                   OR EXISTS (SELECT FROM archiver.removals WHERE event_id = :number)
            """
        ),
        "event",
    ),
    Kind(
        "seals",
        "seal_id",
        "seal_hash",
        text("SELECT id, encode(hash, 'hex') FROM archiver.seals ORDER BY id DESC LIMIT 1"),
        text("SELECT EXISTS (SELECT FROM archiver.seals WHERE id = :number AND encode(hash, 'hex') = :content)"),
        "seal",
    ),
    # The view, because auditors cannot read the table.
    Kind(
        "changes",
        "cursor",
        "changed_at",
        text("SELECT cursor, CAST(changed_at AS text) FROM analytics.changes ORDER BY cursor DESC LIMIT 1"),
        text(  # old changes are deleted
            """
            SELECT :number <= (SELECT coalesce(max(cursor), 0) FROM analytics.changes)
                   AND NOT EXISTS (SELECT FROM analytics.changes
                                    WHERE cursor = :number AND CAST(changed_at AS text) <> :content)
            """
        ),
        "change",
    ),
)


class MachineRecord:
    """The newest committed rows that this machine has seen, in a file shared by its processes."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE

    def read(self) -> dict[str, Watermarks]:
        """Return the watermarks by `Epoch.key`. Raises `IncompleteCheckError` if the file cannot be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Watermarks])
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise IncompleteCheckError(f"{self._path} (ARCHIVER_HOME) cannot be read: {error.strerror}") from None
        except ValueError:
            raise IncompleteCheckError(f"{self._path} (ARCHIVER_HOME) is damaged: delete it") from None

    def remember(self, key: str, marks: Watermarks) -> Watermarks:
        """Merge these watermarks into those of the epoch `key`; return the result.

        Raises `IncompleteCheckError` if the file cannot be read or written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known = self.read()
                merged = known.pop(key, Watermarks()).merge(marks)
                trimmed = dict(list(known.items())[-_MAX_EPOCHS:]) | {key: merged}
                written = self._path.with_suffix(".new")
                with written.open("wb") as file:
                    file.write(msgspec.json.format(msgspec.json.encode(trimmed)))
                    file.flush()
                    os.fsync(file.fileno())
                written.replace(self._path)
                return merged
        except OSError as error:
            raise IncompleteCheckError(f"{self._path} (ARCHIVER_HOME) cannot be written: {error.strerror}") from None


class Guard:
    """A check of whether the database may be served: sealed, published and delivered from."""

    def __init__(self, home: Path, url: URL) -> None:
        self._memory, self._place = MachineRecord(home), embedded_files_id(home, url)
        self._seen: tuple[str, Watermarks] | None = None
        self._is_saved = False
        self._unreadable: dict[str, tuple[str, float]] = {}  # the reason, and the time of the next check
        self._reason, self._asked_at = "", float("-inf")

    @property
    def unreadable(self) -> str:
        """Return the parts that could not be checked or stored, with reasons; empty if none.

        The database is served regardless of these.
        """
        return "; ".join(f"{name}: {why}" for name, (why, _) in self._unreadable.items())

    def _try(self, name: str, work: Callable[[], T]) -> T | None:
        """Return the result; None if the check fails. A failed check is not repeated for `UNREADABLE_SECONDS`."""
        _, until = self._unreadable.get(name, ("", 0.0))
        if monotonic() < until:
            return None
        try:
            answer = work()
        except IncompleteCheckError as error:
            if name not in self._unreadable:
                log.warning("database identity check incomplete", part=name, reason=str(error))
            telemetry.identity_unreadable.labels(name).inc()
            self._unreadable[name] = str(error), monotonic() + UNREADABLE_SECONDS
            return None
        self._unreadable.pop(name, None)
        return answer

    def reason(self, connection: Connection) -> str:
        """Return why the database may not be served; empty if it may.

        Checks at most once per second, in the caller's transaction.
        """
        if monotonic() - self._asked_at >= CHECK_SECONDS:
            self._reason = self.examine(connection)
            self._asked_at = monotonic()
        return self._reason

    def require(self, connection: Connection) -> None:
        """Raise `ForeignDatabaseError` if the database may not be served."""
        if reason := self.reason(connection):
            raise ForeignDatabaseError(reason)

    def adopt(self, connection: Connection) -> int:
        """Begin a new epoch with the database as it is; return its number.

        Its number, and the cursors of its changes, are greater than all that any machine is known to have seen.
        """
        epoch, remembered = select_epoch(connection), self._memory_of()
        if epoch is None:
            insert_epoch(connection, select_identity(connection, self._place))
            return 1
        fault = connection.execute(_SELECT_FAULT, {"epoch_id": epoch.id}).first()
        newer = epoch.newer_of(remembered)
        seen = [marks.cursor for key, marks in remembered.items() if epoch.is_same_database(key)]
        number = max(epoch.id, newer) + 1
        given = max([*seen, 0 if fault is None else fault.cursor])
        insert_epoch(connection, select_identity(connection, self._place), number, given)
        return number

    def _memory_of(self) -> dict[str, Watermarks]:
        return self._try("memory", self._memory.read) or {}

    def examine(self, connection: Connection) -> str:
        """Check now; return why the database may not be served, or an empty string."""
        identity, epoch = select_identity(connection, self._place), select_epoch(connection)
        if epoch is None:
            return ""
        fault = (
            identity.differs_from(epoch.identity)
            or self._missing_rows_reason(connection, identity, epoch)
            or self._recorded(connection, epoch)
        )
        return f"{FOREIGN}: {fault}" if fault else ""

    def _missing_rows_reason(self, connection: Connection, identity: Identity, epoch: Epoch) -> str:
        """Return what this machine saw and the database lacks: an epoch, a timeline, or rows; empty if nothing."""
        remembered = self._memory_of()
        if newer := epoch.newer_of(remembered):
            return f"it lacks epoch {newer}, which this machine saw"
        known = self._known(remembered, epoch)
        if identity.timeline and identity.timeline < known.timeline:
            return f"its timeline went back from {known.timeline} to {identity.timeline}"
        if identity.timeline is None:  # a standby may be behind, and stores no events
            return ""
        lost = [
            f"{kind.name} {number}" for kind in KINDS if (number := self._missing_number(connection, kind, known))
        ]
        return f"it lacks {', '.join(lost)}, which this machine saw committed" if lost else ""

    def _known(self, remembered: Mapping[str, Watermarks], epoch: Epoch) -> Watermarks:
        known = remembered.get(epoch.key, Watermarks())
        return known.merge(self._seen[1]) if self._seen is not None and self._seen[0] == epoch.key else known

    def _missing_number(self, connection: Connection, kind: Kind, known: Watermarks) -> int:
        """Return the number of the row that was seen committed and is now missing; 0 if none is missing."""
        number, content = getattr(known, kind.number), getattr(known, kind.content)
        if not number:
            return 0
        row = self._try(kind.table, lambda: _probe(connection, kind.has, {"number": number, "content": content}))
        return 0 if row is None or row[0] else number

    def _recorded(self, connection: Connection, epoch: Epoch) -> str:
        """Return the fault that a machine recorded for this epoch; empty if none."""
        row = self._try("epoch_faults", lambda: _probe(connection, _SELECT_FAULT, {"epoch_id": epoch.id}))
        return "" if row is None else f"{row.reason} (found by the machine {row.host})"

    def report(self, connection: Connection) -> str:
        """Check now; return why the database may not be served, or an empty string.

        A fault that only this machine can detect is recorded, so that other machines stop as well.
        """
        reason = self.examine(connection)
        if reason and (epoch := select_epoch(connection)) is not None:
            self._record(connection, select_identity(connection, self._place), epoch)
        return reason

    def watch(self, connection: Connection) -> str:
        """Return why the database may not be served, as `report` does; if it may, remember its newest rows.

        Begins the first epoch of a database that has none.
        """
        identity, epoch = select_identity(connection, self._place), select_epoch(connection)
        if epoch is None:
            if identity.timeline is not None:
                insert_epoch(connection, identity)
            return ""
        if reason := self.report(connection):
            return reason
        marks = self._select_marks(connection, identity, epoch)
        if self._seen != (epoch.key, marks) or not self._is_saved:
            self._seen = (epoch.key, marks)
            self._is_saved = self._try("memory_written", partial(self._memory.remember, epoch.key, marks)) is not None
        return ""

    def _record(self, connection: Connection, identity: Identity, epoch: Epoch) -> None:
        if identity.timeline is None or identity.differs_from(epoch.identity):
            return  # a standby stores no rows; other processes detect by themselves that it is another database
        if fault := self._missing_rows_reason(connection, identity, epoch):
            cursor = self._known(self._memory_of(), epoch).cursor
            row = {"epoch_id": epoch.id, "host": socket.gethostname(), "reason": fault, "cursor": cursor}
            connection.execute(_INSERT_FAULT, row)

    def _select_marks(self, connection: Connection, identity: Identity, epoch: Epoch) -> Watermarks:
        """Return the newest row of each kind; for a kind that cannot be read, the row known before."""
        known = self._seen[1] if self._seen is not None and self._seen[0] == epoch.key else Watermarks()
        values: dict[str, Any] = {"timeline": identity.timeline or 0}
        for kind in KINDS:
            row = self._try(kind.table, partial(_probe, connection, kind.newest, {}))
            if row is not None:
                values |= {kind.number: row[0], kind.content: row[1]}
        return msgspec.structs.replace(known, **values)


async def watch_identity(engine: AsyncEngine, guard: Guard) -> None:
    """Watch the database of a receiver until cancelled; log a fault once a minute. Events are stored in any case."""
    fault, logged_at = "", float("-inf")
    while True:
        try:
            reason = await run_async(engine, guard.watch, WATCH_LIMIT_SECONDS)
        except (SQLAlchemyError, TimeoutError):  # other duties report an unavailable database
            reason = fault
        if reason and (not fault or monotonic() - logged_at >= LOG_SECONDS):
            log.error("database is not the one served before; receiving only", reason=reason, advice=ADVICE)
            logged_at = monotonic()
        fault = reason
        await asyncio.sleep(WATCH_SECONDS)
