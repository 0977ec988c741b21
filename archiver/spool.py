"""The spool: deliveries on local disk while Postgres cannot take them, each fsynced before it is answered (I1).

Every process has a file of its own, `spool-N.db` (SQLite), which it holds by the lock of `spool-N.lock`. What a
process leaves behind is adopted by another one, or by its successor.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import msgspec

SPOOL_FOLDER = "spool"  # in ARCHIVER_HOME
MAX_FILES = 1_000
BUSY_SECONDS = 5
_PAGE_BYTES = 4_096


class SpoolError(Exception):
    """The spool cannot be used; the text says why and what helps."""


class SpoolFullError(SpoolError):
    """The spool is full: give it more room (ARCHIVER_SPOOL_BYTES, or the disk of ARCHIVER_HOME)."""


class Spooled(msgspec.Struct, frozen=True, gc=False):
    """One delivery as it came. A fact of ours keeps what its bytes do not tell: its kind, its session, its key.

    `id` grows with arrival; 0 before it is spooled.
    """

    id: int
    received_at: datetime
    source: str
    key_id: str | None
    body: bytes
    type: str | None = None
    session_id: str | None = None
    dedupe_key: bytes | None = None


class Depth(msgspec.Struct, frozen=True, gc=False):
    """What waits in a spool: deliveries, the bytes of their bodies, when the oldest of them came."""

    events: int
    bytes: int
    oldest_at: datetime | None


_SCHEMA = """
    CREATE TABLE IF NOT EXISTS spooled (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        received_at TEXT NOT NULL,
        source TEXT NOT NULL,
        key_id TEXT,
        body BLOB NOT NULL,
        type TEXT,
        session_id TEXT,
        dedupe_key BLOB
    )
"""
_INSERT = """
    INSERT INTO spooled (received_at, source, key_id, body, type, session_id, dedupe_key) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_SELECT_OLDEST = """
    SELECT id, received_at, source, key_id, body, type, session_id, dedupe_key
      FROM spooled WHERE id > ? ORDER BY id LIMIT ?
"""
_SELECT_DEPTH = "SELECT count(*), coalesce(sum(length(body)), 0), min(received_at) FROM spooled"


class Spool:
    """One file, held by this process. Threads may share it."""

    def __init__(self, folder: Path, number: int, lock: int, max_bytes: int) -> None:
        self.path = folder / f"spool-{number}.db"
        self._lock_file = lock
        self._lock = threading.Lock()
        self._database = _open(self.path, max_bytes)
        events, size, _ = self._database.execute(_SELECT_DEPTH).fetchone()
        self._events, self._bytes = int(events), int(size)

    def append(self, deliveries: Sequence[Spooled]) -> None:
        """Make these deliveries durable, all or none. Raises `SpoolError`, of a full one `SpoolFullError`."""
        rows = [
            (
                each.received_at.isoformat(),
                each.source,
                each.key_id,
                each.body,
                each.type,
                each.session_id,
                each.dedupe_key,
            )
            for each in deliveries
        ]
        with self._lock, _transaction(self._database):
            self._database.executemany(_INSERT, rows)
        self._events += len(deliveries)
        self._bytes += sum(len(each.body) for each in deliveries)

    def select_oldest(self, after: int, most: int, most_bytes: int) -> list[Spooled]:
        """The oldest deliveries after this id: so many, or so many bytes of them, but at least one."""
        found: list[Spooled] = []
        size = 0
        with self._lock, _explained():
            for number, received_at, *told in self._database.execute(_SELECT_OLDEST, (after, most)):
                delivery = Spooled(number, datetime.fromisoformat(received_at), *told)
                size += len(delivery.body)
                if found and size > most_bytes:
                    break
                found.append(delivery)
        return found

    def delete(self, deliveries: Sequence[Spooled]) -> None:
        """Let go of deliveries that are safe elsewhere; when none is left, of the room that they took too."""
        with self._lock:
            with _transaction(self._database):
                self._database.executemany("DELETE FROM spooled WHERE id = ?", [(each.id,) for each in deliveries])
            self._events -= len(deliveries)
            self._bytes -= sum(len(each.body) for each in deliveries)
            if not self._events:
                with suppress(sqlite3.Error):  # it is only room
                    # As a script: executed as a statement, the first would free one page.
                    self._database.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    def depth(self) -> Depth:
        """What waits."""
        with self._lock, _explained():
            oldest = self._database.execute("SELECT received_at FROM spooled ORDER BY id LIMIT 1").fetchone()
        return Depth(self._events, self._bytes, datetime.fromisoformat(oldest[0]) if oldest else None)

    def room(self) -> int:
        """Bytes that it may still take, for it may fill neither its limit nor the disk."""
        with self._lock, _explained():
            used, most = (
                self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "max_page_count")
            )
            free = self._database.execute("PRAGMA freelist_count").fetchone()[0]
            disk = os.statvfs(self.path.parent)
        return int(min((most - used + free) * _PAGE_BYTES, disk.f_bavail * disk.f_frsize))

    def close(self) -> None:
        """Leave the file to whoever takes it next."""
        with self._lock:
            self._database.close()
        os.close(self._lock_file)


def open_spool(folder: Path, max_bytes: int) -> Spool:
    """The first file of this folder that nobody holds, made if there is none. Raises `SpoolError`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sync(folder.parent)  # SQLite sees to what is in the folder
    except OSError as error:
        raise SpoolError(_unusable(folder, error.strerror or str(error))) from None
    for number in range(MAX_FILES):
        if (held := _hold(folder, number, max_bytes)) is not None:
            return held
    raise SpoolError(f"{folder} has {MAX_FILES} spools in use.")


def open_left_behind(folder: Path) -> Iterator[Spool]:
    """The files that hold something and that nobody holds. Raises `SpoolError`."""
    for path in sorted(folder.glob("spool-*.db")):
        number = path.stem.removeprefix("spool-")
        if number.isdecimal() and (held := _hold(folder, int(number), path.stat().st_size)) is not None:
            if held.depth().events:
                yield held
            held.close()


def select_depth(folder: Path) -> Depth:
    """What waits in all files of a folder, whoever holds them. Raises `SpoolError`."""
    events, size, oldest = 0, 0, None
    for path in sorted(folder.glob("spool-*.db")):
        with _explained():
            database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
            try:
                found = database.execute(_SELECT_DEPTH).fetchone()
            finally:
                database.close()
        events, size = events + found[0], size + found[1]
        oldest = min(oldest or found[2], found[2]) if found[2] else oldest
    return Depth(events, size, datetime.fromisoformat(oldest) if oldest else None)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _hold(folder: Path, number: int, max_bytes: int) -> Spool | None:
    """The file of this number, if nobody else holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock = os.open(folder / f"spool-{number}.lock", flags, 0o600)
    except OSError as error:
        raise SpoolError(_unusable(folder, error.strerror or str(error))) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Spool(folder, number, lock, max_bytes)
    except BlockingIOError:
        os.close(lock)
        return None
    except SpoolError:
        os.close(lock)
        raise


def _open(path: Path, max_bytes: int) -> sqlite3.Connection:
    with _explained():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in (
            "auto_vacuum = INCREMENTAL",  # before the first table, or never
            "journal_mode = WAL",
            "synchronous = FULL",  # each commit is fsynced, not only each checkpoint
            "secure_delete = ON",  # what has gone to the ledger must not be found here (I8)
            f"max_page_count = {max(max_bytes // _PAGE_BYTES, 16)}",
        ):
            database.execute(f"PRAGMA {pragma}").fetchall()
        database.execute(_SCHEMA)
        return database


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    with _explained():
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:  # some errors have ended it already
                database.execute("ROLLBACK")
            raise


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise SpoolFullError(str(SpoolFullError.__doc__)) from None
        raise SpoolError(f"The spool cannot be used ({error}): check the disk of ARCHIVER_HOME.") from None
    except OSError as error:
        raise SpoolError(_unusable(Path(error.filename or "."), error.strerror or str(error))) from None


def _unusable(place: Path, reason: str) -> str:
    return (
        f"The spool {place} cannot be used ({reason}): check ARCHIVER_HOME and its disk, or set ARCHIVER_SPOOL=off."
    )
