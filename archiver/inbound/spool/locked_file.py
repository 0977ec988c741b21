"""Append to and drain a spool file that this process has locked, and recover from disk faults."""

import fcntl
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from archiver.durable import sync_folder
from archiver.events import Content, Delivery
from archiver.inbound.spool import files
from archiver.inbound.spool.counting import LOST, Count, add_lost
from archiver.inbound.spool.errors import (
    SpoolDamagedError,
    SpoolError,
    SpoolFullError,
    damaged,
    explained,
    unusable_message,
)
from archiver.inbound.spool.files import PAGE_BYTES, Row, delivery_of, open_file, row_of, transaction
from archiver.inbound.spool.salvage import insert_found, overwrite, set_aside
from archiver.inbound.spool.scanning import scan

log = structlog.get_logger(__name__)

MAX_FILES = 1_000
MAX_FAULTS = 10  # unusable file names, after which the folder counts as unusable
DELETED = 10_000  # deleted rows whose hashes are kept
MIN_ROOM_BYTES = 1_048_576  # with less room a spool counts as full


class Depth(msgspec.Struct, frozen=True, gc=False):
    """The number of waiting deliveries, the bytes of their bodies and the arrival time of the oldest."""

    events: int
    bytes: int
    oldest_at: datetime | None


class Spooled(msgspec.Struct, frozen=True, gc=False):
    """The row of a delivery in a spool. `id` increases in order of arrival within the file with the number `file`."""

    id: int
    file: int
    row: Row

    @property
    def size(self) -> int:
        """Return the bytes of the body."""
        return len(self.row[-1])

    def restore(self) -> Delivery[Content]:
        """Return the delivery."""
        return delivery_of(self.row)


SELECT_DEPTH = "SELECT count(*), coalesce(sum(length(body)), 0), min(received_at) FROM spooled"
_SELECT_NEWEST = "SELECT max(seq) FROM sqlite_sequence WHERE name = 'spooled' AND typeof(seq) = 'integer'"


class Spool:
    """A spool file that this process has locked; thread-safe."""

    def __init__(self, folder: Path, number: int, lock: int, max_bytes: int) -> None:
        self.path = folder / f"spool-{number}.db"
        self._lock_file, self._max_bytes = lock, max_bytes
        self._lock = threading.Lock()
        # Hashes of recently deleted rows, because SQLite may leave copies of rows that it has moved.
        self._deleted: deque[int] = deque(maxlen=DELETED)
        self._file = 0  # counts replacement files: ids restart in each
        self._count = Count(self.path)
        self._reopen()

    def _reopen(self) -> None:
        wal = files.read_wal(self.path)
        try:
            self._open()
        except SpoolDamagedError as error:
            self._salvage(error, wal)

    def _open(self) -> None:
        self._is_closed = True  # until it is open
        self._file += 1
        self._database = open_file(self.path, self._max_bytes)
        # Rows that are processed but not deleted, because a full disk prevents deletions: all up to an id, and some
        # later ones.
        self._gone_through, self._gone, self._passed_over = 0, set[int](), 0
        try:
            with explained(self.path):
                self._measure()
            self._recover_missing()
        except SpoolError:
            self._database.close()
            raise
        self._identity = self._file_identities()
        self._is_closed = False

    def _measure(self) -> None:
        """Read the number of deliveries, their bytes, and the newest id that a delivery has had."""
        events, size, _ = self._database.execute(SELECT_DEPTH).fetchone()
        (newest,) = self._database.execute(_SELECT_NEWEST).fetchone()
        self._events, self._bytes, self._newest = int(events), int(size), int(newest or 0)

    def _recover_missing(self) -> None:
        """Compare the file with its count, recover missing rows from its bytes, and report losses."""
        missing = self._count.read().missing_from(self._events, self._newest)
        if missing > 0:
            with transaction(self._database, self.path):
                known = files.select_rows(self._database, self.path)
                rows = scan(self.path.read_bytes(), files.read_wal(self.path))
                result = insert_found(self._database, rows, known, set(self._deleted))
            if result:
                log.error("spool file damaged; missing deliveries recovered", events=result, file=self.path.name)
                self._measure()
                missing -= result
        is_recorded = missing <= 0 or _report_lost(self.path, missing)
        self._count.unrecorded = 0 if is_recorded else missing
        self._count.write(self._events, self._newest, is_durable=missing > 0)

    def append(self, deliveries: Sequence[Delivery[Content]]) -> None:
        """Store these deliveries durably, all or none. Raises `SpoolError`; `SpoolFullError` if the spool is full."""
        rows = [row_of(delivery) for delivery in deliveries]
        with self._lock:
            self._ensure_in_place()
            try:
                self._append(rows)
            except SpoolDamagedError as error:
                self._reopen_after(error)
                self._append(rows)

    def _append(self, rows: Sequence[Row]) -> None:
        with transaction(self._database, self.path):
            files.insert_rows(self._database, rows)
        if not self._is_there():  # otherwise the write went to a removed file
            raise SpoolError(unusable_message(self.path, "removed while in use"))
        self._events += len(rows)
        self._newest += len(rows)
        self._bytes += sum(len(row[-1]) for row in rows)
        self._count.write(self._events, self._newest)

    def select_oldest(self, after: int, limit: int, most_bytes: int) -> list[Spooled]:
        """Return the oldest deliveries after this id, within both limits, but at least one if any is left."""
        with self._lock:
            if self._is_closed:
                self._reopen()
            try:
                return self._select_oldest(after, limit, most_bytes)
            except SpoolDamagedError as error:
                self._reopen_after(error)
                return self._select_oldest(after, limit, most_bytes)

    def _select_oldest(self, after: int, limit: int, most_bytes: int) -> list[Spooled]:
        result: list[Spooled] = []
        size = 0
        with closing(files.select(self._database, self.path, max(after, self._gone_through) + 1)) as waiting:
            for number, row in waiting:
                if number in self._gone:
                    continue
                size += len(row[-1])
                if result and size > most_bytes:
                    break
                result.append(Spooled(number, self._file, row))
                if len(result) == limit:
                    break
        if not result and after == 0 and self._events > 0:  # a damaged page may silently skip rows
            raise damaged(self.path, f"{self._events:,} deliveries cannot be reached")
        return result

    def delete(self, deliveries: Sequence[Spooled]) -> None:
        """Delete deliveries that are stored in Postgres; if none is left, also free their space.

        Deliveries that were read before the spool continued in another file are not deleted, because their ids now
        belong to other deliveries.

        On a full disk nothing can be deleted: the deliveries are skipped from now on, and overwritten when none is
        left. Raises `SpoolError`.
        """
        with self._lock:
            if self._is_closed:
                self._reopen()
            deliveries = [each for each in deliveries if each.file == self._file]
            self._count.write(self._events - len(deliveries), self._newest, is_durable=True)
            try:
                if self._gone_through or self._gone:
                    raise SpoolFullError  # known to be full; a new attempt would be slow
                with transaction(self._database, self.path):
                    self._database.executemany(
                        "DELETE FROM spooled WHERE id = ?", [(each.id,) for each in deliveries]
                    )
                self._deleted.extend(hash(each.row) for each in deliveries)
            except SpoolError:
                self._passed_over += len(deliveries)
                self._mark_deleted(deliveries)
            self._events -= len(deliveries)
            self._bytes -= sum(each.size for each in deliveries)
            if self._is_empty():
                self._free()
            elif deliveries:
                self._checkpoint()  # otherwise deleted deliveries remain in the write-ahead log (I8)

    def _mark_deleted(self, deliveries: Sequence[Spooled]) -> None:
        self._gone.update(each.id for each in deliveries)
        with explained(self.path):
            numbers = self._database.execute("SELECT id FROM spooled WHERE id > ? ORDER BY id", (self._gone_through,))
            for (number,) in numbers:
                if number not in self._gone:
                    break
                self._gone.remove(number)
                self._gone_through = number

    def _is_empty(self) -> bool:
        with explained(self.path):
            query = "SELECT NOT EXISTS (SELECT 1 FROM spooled WHERE id > ?)"
            is_empty = bool(self._database.execute(query, (self._gone_through,)).fetchone()[0])
        return is_empty and self._events <= 0

    def _free(self) -> None:
        if self._gone_through:
            if not self._is_there():
                return
            self._database.close()
            self._is_closed = True
            overwrite(self.path)
            self._open()
            return
        self._events = self._bytes = 0
        with suppress(sqlite3.Error):  # only space is at stake
            # As a script, because a single statement frees only one page.
            self._database.executescript("PRAGMA incremental_vacuum;")
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Truncate the write-ahead log.

        If another process reads it for longer than `BUSY_SECONDS`, the next deletion truncates it.
        """
        with suppress(sqlite3.Error):
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @property
    def events(self) -> int:
        """Return the number of waiting deliveries."""
        return self._events

    def depth(self) -> Depth:
        """Return the depth of the file. Raises `SpoolError`."""
        with self._lock, explained(self.path):
            query = "SELECT received_at FROM spooled WHERE id > ? ORDER BY id LIMIT 1"
            oldest = self._database.execute(query, (self._gone_through,)).fetchone()
        return Depth(self._events, self._bytes, datetime.fromisoformat(oldest[0]) if oldest else None)

    def room(self) -> int:
        """Return the bytes left within the limit of the spool and on the disk. Raises `SpoolError`."""
        with self._lock, explained(self.path):
            self._ensure_in_place()
            used, limit = (
                self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "max_page_count")
            )
            free = self._database.execute("PRAGMA freelist_count").fetchone()[0]
            disk = os.statvfs(self.path.parent)
        return int(min((limit - used + free) * PAGE_BYTES, disk.f_bavail * disk.f_frsize))

    def close(self) -> None:
        """Close and unlock the file."""
        with self._lock:
            self._database.close()
        os.close(self._lock_file)

    def _file_identities(self) -> list[tuple[int, int] | None]:
        """Return the identities of the files at these paths, because writes to a removed file would be lost."""
        return [_identity(path) for path in (self.path, Path(f"{self.path}-wal"), self.path.with_suffix(".lock"))]

    def _is_there(self) -> bool:
        return self._file_identities() == self._identity

    def _ensure_in_place(self) -> None:
        """Reopen the file if it is closed, and replace it if it was removed. Call this before a write."""
        if self._is_closed:
            self._reopen()
        elif not self._is_there():
            self._replace()

    def _replace(self) -> None:
        """Continue in another file, because this file or its lock was removed."""
        log.error("spool file removed while in use; continuing in a new file", spool=str(self.path))
        is_in_place = self._file_identities()[:2] == self._identity[:2]
        if not is_in_place:  # its content is copied to the new file
            self._count.write(0, 0)
        fresh = open_spool(self.path.parent, self._max_bytes)
        try:
            if not is_in_place:  # otherwise the process that now locks the file, possibly this one, drains them
                fresh._copy(files.readable(self._database, self.path))
        except BaseException:
            fresh.close()
            raise
        self._database.close()
        os.close(self._lock_file)
        self._file += 1
        self.path, self._lock_file = fresh.path, fresh._lock_file
        self._database, self._identity = fresh._database, fresh._identity
        self._count = fresh._count
        self._gone_through, self._gone = fresh._gone_through, fresh._gone
        self._passed_over = fresh._passed_over
        self._events, self._bytes, self._newest = fresh._events, fresh._bytes, fresh._newest

    def _copy(self, rows: Iterator[Row]) -> None:
        with transaction(self._database, self.path):
            files.insert_rows(self._database, rows)
        self._measure()
        self._count.write(self._events, self._newest)

    def _reopen_after(self, error: SpoolError) -> None:
        wal = files.read_wal(self.path)
        self._database.close()
        self._is_closed = True
        # Skipped deliveries are still in the file, and are read again.
        self._count.write(self._events + self._passed_over, self._newest)
        self._salvage(error, wal)

    def _salvage(self, error: SpoolError, wal: bytes) -> None:
        """Continue in a new file with the same name and the readable content of the damaged one."""
        self._count.write(self._count.read().events - self._count.unrecorded, 0)  # ids restart in the new file
        saved, saved_as = set_aside(self.path, wal, set(self._deleted))
        log.error(
            "spool file damaged; readable deliveries saved", reason=str(error), events=saved, aside=str(saved_as)
        )
        self._open()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        result = path.lstat()
    except OSError:
        return None
    return result.st_dev, result.st_ino


def open_spool(folder: Path, max_bytes: int) -> Spool:
    """Open the first unlocked file of this folder, or create one. Raises `SpoolError`."""
    with explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder.parent)  # SQLite syncs the files in the folder
    faults: list[SpoolError] = []
    for number in range(MAX_FILES):
        try:
            held = hold(folder, number, max_bytes)
        except SpoolFullError:
            raise
        except SpoolError as error:  # a fault of this file, unless the next ones have it too
            faults.append(error)
            if len(faults) == MAX_FAULTS:
                raise faults[0] from None
            continue
        if held is not None:
            if faults:
                log.error("spool file unusable; using another", reason=str(faults[0]))
            return held
    raise SpoolError(
        f"{folder} already has {MAX_FILES} spool files in use: run fewer processes with this ARCHIVER_HOME"
    )


def hold(folder: Path, number: int, max_bytes: int) -> Spool | None:
    """Lock and open the file with this number; None if another process has locked it."""
    for end in ("db", "db-wal", "db-shm", "lock"):
        name = f"spool-{number}.{end}"
        if not files.is_regular(folder / name):  # opening a named pipe would block
            if end == "db":
                report_replaced(folder, number)
            raise SpoolError(unusable_message(folder / name, "not a file"))
    lock = _opened_lock(folder, number)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Spool(folder, number, lock, max_bytes)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise


def _opened_lock(folder: Path, number: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with explained(folder):
        return os.open(folder / f"spool-{number}.lock", flags, 0o600)


def report_replaced(folder: Path, number: int) -> None:
    """Report the deliveries of a file as lost, once. Raises `SpoolError`.

    Call this if the path of the file is not a regular file.

    A running process still has the deliveries of its file, and copies them to another one.
    """
    path = folder / f"spool-{number}.db"
    count = Count(path)
    missing = count.read().events
    if missing == 0 or not files.is_regular(path.with_suffix(".lock")):
        return
    lock = _opened_lock(folder, number)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        missing = count.read().events
        count.write(0, 0, is_durable=True)
        # If the count is not 0 now, it cannot be written, and each run would add the loss.
        if missing > 0 and count.read().events == 0 and not _report_lost(path, missing):
            count.write(missing, 0, is_durable=True)
    except BlockingIOError:
        return
    finally:
        os.close(lock)


def _report_lost(path: Path, events: int) -> bool:
    """Log a loss, and return whether it is recorded. Deliveries are received even if it cannot be recorded."""
    in_all, fault = None, ""
    try:
        in_all = add_lost(path.parent, events).events
    except OSError as error:
        fault = f"{LOST} cannot be written: {error.strerror}"
    log.error(
        "acknowledged events missing from the spool",
        events=events,
        in_all=in_all,
        fault=fault,
        file=path.name,
        advice="`archiver backfill` fetches the histories of their sessions; see `archiver doctor`",
    )
    return not fault
