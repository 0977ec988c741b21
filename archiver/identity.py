"""Which database this is, and whether it is the one that was served before.

A database is the one of its newest row in `archiver.epochs`: system identifier of its cluster, object id, and, of an
embedded one, the inode of its files, none of which a copy shares. What the row cannot show, this machine remembers in
`ARCHIVER_HOME/served.json`: the newest event, seal and change that it saw committed, and the highest timeline. A
database that lacks one of them has gone back. Until `archiver adopt` begins a new epoch nothing is sealed, published
or sent; events are received.
"""

import asyncio
import fcntl
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from time import monotonic

import msgspec
import structlog
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import run_in_transaction

log = structlog.get_logger(__name__)

FILE = "served.json"
WATCH_SECONDS, WATCH_LIMIT_SECONDS, LOG_SECONDS = 2.0, 3.0, 60.0
CHECK_SECONDS = 1.0  # between two looks in one process
_KEPT = 20  # databases and epochs that one ARCHIVER_HOME remembers
ADVICE = "If this database takes over, run `archiver adopt`; otherwise let DATABASE_URL name the one served before."


class ForeignDatabaseError(Exception):
    """The database is not the one served before; the text says why."""


class Identity(msgspec.Struct, frozen=True):
    """What tells a database from its copies. Empty or None where this user may not ask, or it is not known."""

    system_identifier: str
    database_oid: int
    timeline: int | None
    place: str | None = None

    def differs_from(self, other: "Identity") -> str:
        """What differs from the one recorded, in words; empty where nothing does. A timeline may go up."""
        if self.database_oid != other.database_oid:
            return f"its object id is {self.database_oid}, not {other.database_oid}"
        for mine, theirs, what in (
            (self.system_identifier, other.system_identifier, "it is in another cluster"),
            (self.place, other.place, "its files are others"),
        ):
            if mine and theirs and mine != theirs:
                return f"{what} ({mine}, not {theirs})"
        if self.timeline and other.timeline and self.timeline < other.timeline:
            return f"its timeline went back from {other.timeline} to {self.timeline}"
        return ""


class Epoch(msgspec.Struct, frozen=True):
    """A stretch of a database's life; another begins with `archiver adopt`."""

    id: int
    identity: Identity
    cursor: int
    began_at: datetime

    @property
    def key(self) -> str:
        """Its name in the file of this machine."""
        whole = self.identity
        return f"{whole.system_identifier}:{whole.database_oid}:{self.id}:{self.began_at.timestamp():.6f}"

    def newer_of(self, keys: Iterable[str]) -> int:
        """The number of a later epoch of the same database among these keys; 0 where there is none."""
        prefix = f"{self.identity.system_identifier}:{self.identity.database_oid}:"
        numbers = [int(key.removeprefix(prefix).partition(":")[0]) for key in keys if key.startswith(prefix)]
        return max((number for number in numbers if number > self.id), default=0)


class Marks(msgspec.Struct, frozen=True):
    """The newest of each that was seen committed: its number, and what cannot be the same of another."""

    timeline: int = 0
    event_id: int = 0
    event_at: str = ""
    seal_id: int = 0
    seal_hash: str = ""
    cursor: int = 0
    changed_at: str = ""

    def merge(self, other: "Marks") -> "Marks":
        """The newer of each."""
        event, seal, change = (
            max((self.event_id, self.event_at), (other.event_id, other.event_at)),
            max((self.seal_id, self.seal_hash), (other.seal_id, other.seal_hash)),
            max((self.cursor, self.changed_at), (other.cursor, other.changed_at)),
        )
        return Marks(max(self.timeline, other.timeline), *event, *seal, *change)


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
    """Return which database this is. `place`: of an embedded one, which files it has."""
    system = str(connection.scalar(_SYSTEM)) if connection.scalar(_MAY_ASK) else ""
    own = connection.execute(_OWN).one()
    timeline = None if own.is_standby else int(str(connection.scalar(_TIMELINE)), 16)
    return Identity(system, own.oid, timeline, place)


def place_of(home: Path, url: URL) -> str | None:
    """Return which files a database has that is embedded here: those of a copy are others, a moved one keeps them.

    None of any other database, and where its sockets had to lie elsewhere.
    """
    data = (home / "postgres").resolve()
    if url.query.get("host") != str(data):
        return None
    try:
        return f"inode {(data / 'PG_VERSION').stat().st_ino}"
    except OSError:
        return None


# By object id: a name cannot be looked up in a schema that one may not enter.
_MAY_SELECT = text(
    """
    SELECT count(*) = 5 AND bool_and(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'archiver' AND c.relname IN ('epochs', 'events', 'seals', 'changes', 'removals')
    """
)


def may_select(connection: Connection) -> bool:
    """Whether this user may read what tells which database this is."""
    return bool(connection.scalar(_MAY_SELECT))


_EPOCH = text(
    "SELECT id, system_identifier, database_oid, timeline, place, cursor, began_at FROM archiver.epochs"
    " ORDER BY id DESC LIMIT 1"
)


def select_epoch(connection: Connection) -> Epoch | None:
    """Return the newest epoch; None where no process has served this database yet."""
    row = connection.execute(_EPOCH).first()
    if row is None:
        return None
    identity = Identity(row.system_identifier, row.database_oid, row.timeline, row.place)
    return Epoch(row.id, identity, row.cursor, row.began_at)


_INSERT = text(
    """
    INSERT INTO archiver.epochs (id, system_identifier, database_oid, timeline, place, cursor, began_at)
    VALUES (:id, :system_identifier, :database_oid, :timeline, :place, :cursor, clock_timestamp())
    ON CONFLICT (id) DO NOTHING
    """
)
_NEWEST_CURSOR = text("SELECT coalesce(max(cursor), 0) FROM archiver.changes")


def insert_epoch(connection: Connection, identity: Identity, after: int = 0) -> None:
    """Begin the epoch that follows this one, at the present end of the feed."""
    cursor = connection.scalar(_NEWEST_CURSOR)
    connection.execute(_INSERT, {"id": after + 1, "cursor": cursor, **msgspec.structs.asdict(identity)})


_MARKS = text(
    """
    SELECT coalesce(e.id, 0), coalesce(CAST(e.received_at AS text), ''),
           coalesce(s.id, 0), coalesce(encode(s.hash, 'hex'), ''),
           coalesce(c.cursor, 0), coalesce(CAST(c.changed_at AS text), '')
      FROM (SELECT 1) AS one
      LEFT JOIN (SELECT id, received_at FROM archiver.events ORDER BY id DESC LIMIT 1) AS e ON true
      LEFT JOIN (SELECT id, hash FROM archiver.seals ORDER BY id DESC LIMIT 1) AS s ON true
      LEFT JOIN (SELECT cursor, changed_at FROM archiver.changes ORDER BY cursor DESC LIMIT 1) AS c ON true
    """
)


def select_marks(connection: Connection, identity: Identity) -> Marks:
    """Return the newest event, seal and change."""
    return Marks(identity.timeline or 0, *connection.execute(_MARKS).one())


_LACKING = text(
    """
    SELECT CAST(:event_id AS bigint) = 0
           OR EXISTS (SELECT FROM archiver.events
                       WHERE id = :event_id AND CAST(received_at AS text) = :event_at)
           OR EXISTS (SELECT FROM archiver.removals WHERE event_id = :event_id) AS has_event,
           CAST(:seal_id AS bigint) = 0
           OR EXISTS (SELECT FROM archiver.seals
                       WHERE id = :seal_id AND encode(hash, 'hex') = :seal_hash) AS has_seal,
           CAST(:cursor AS bigint) <= (SELECT coalesce(max(cursor), 0) FROM archiver.changes)
           AND NOT EXISTS (SELECT FROM archiver.changes
                            WHERE cursor = :cursor AND CAST(changed_at AS text) <> :changed_at) AS has_change
    """
)


def lacking(connection: Connection, marks: Marks) -> str:
    """Return what this database lacks of what was seen committed, in words; empty where it has all of it."""
    has = connection.execute(_LACKING, msgspec.structs.asdict(marks)).one()
    lost = [
        name
        for name, is_there in (
            (f"event {marks.event_id}", has.has_event),
            (f"seal {marks.seal_id}", has.has_seal),
            (f"change {marks.cursor}", has.has_change),
        )
        if not is_there
    ]
    return f"it lacks {', '.join(lost)}, which this machine saw committed" if lost else ""


class Memory:
    """What this machine saw, in a file that its processes share."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE

    def read(self) -> dict[str, Marks]:
        """By epoch; nothing where the file is missing or is none."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Marks])
        except (OSError, ValueError):
            return {}

    def remember(self, key: str, marks: Marks) -> None:
        """Add what was seen. Raises `OSError`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self.read()
            merged = known.pop(key, Marks()).merge(marks)
            kept = dict(list(known.items())[-_KEPT:]) | {key: merged}
            written = self._path.with_suffix(".new")
            with written.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(kept)))
                file.flush()
                os.fsync(file.fileno())
            written.replace(self._path)


class Guard:
    """Says whether a database may be sealed, published and sent from; asks it once a second at most."""

    def __init__(self, home: Path, url: URL) -> None:
        self._memory, self._place = Memory(home), place_of(home, url)
        self._seen: tuple[str, Marks] | None = None
        self._reason, self._asked_at = "", float("-inf")

    def reason(self, connection: Connection) -> str:
        """Return why not, in words; empty where it may. Within the caller's transaction."""
        if monotonic() - self._asked_at >= CHECK_SECONDS:
            self._reason = self.examine(connection)
            self._asked_at = monotonic()
        return self._reason

    def require(self, connection: Connection) -> None:
        """Raise `ForeignDatabaseError` where it may not."""
        if reason := self.reason(connection):
            raise ForeignDatabaseError(reason)

    def adopt(self, connection: Connection) -> int:
        """Begin a new epoch with the database as it is; answers its number."""
        epoch = select_epoch(connection)
        number = epoch.id if epoch else 0
        insert_epoch(connection, select_identity(connection, self._place), number)
        return number + 1

    def examine(self, connection: Connection) -> str:
        """The same, asked now."""
        identity, epoch = select_identity(connection, self._place), select_epoch(connection)
        if epoch is None:
            return ""
        remembered = self._memory.read()
        if newer := epoch.newer_of(remembered):
            return f"this database is not the one served before: it lacks epoch {newer}, which this machine saw"
        known = remembered.get(epoch.key, Marks())
        if self._seen is not None and self._seen[0] == epoch.key:
            known = known.merge(self._seen[1])
        went_back = bool(identity.timeline and identity.timeline < known.timeline)
        fault = identity.differs_from(epoch.identity) or (
            f"its timeline went back from {known.timeline} to {identity.timeline}" if went_back else ""
        )
        if not fault and identity.timeline is not None:  # a standby may be behind, and takes no events
            fault = lacking(connection, known)
        return f"this database is not the one served before: {fault}" if fault else ""

    def watch(self, connection: Connection) -> str:
        """Examine the database, and remember what it has where nothing is wrong; begin its first epoch."""
        reason = self.examine(connection)
        if reason:
            return reason
        identity = select_identity(connection, self._place)
        epoch = select_epoch(connection)
        if epoch is None:
            insert_epoch(connection, identity)
            return ""
        marks = select_marks(connection, identity)
        if self._seen != (epoch.key, marks):
            self._seen = (epoch.key, marks)
            self._memory.remember(epoch.key, marks)
        return ""


async def watch_identity(engine: AsyncEngine, guard: Guard) -> None:
    """Watch the database of a receiver until cancelled; log once a minute what is wrong. Events are stored anyway."""
    fault, logged_at = "", float("-inf")
    while True:
        try:
            reason = await run_in_transaction(engine, guard.watch, WATCH_LIMIT_SECONDS)
        except (SQLAlchemyError, TimeoutError, OSError):  # a database that is away is reported by others
            reason = fault
        if reason and (not fault or monotonic() - logged_at >= LOG_SECONDS):
            log.error("the database is not the one served before; events are received", reason=reason, advice=ADVICE)
            logged_at = monotonic()
        fault = reason
        await asyncio.sleep(WATCH_SECONDS)
