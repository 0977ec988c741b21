"""Read and write a spool file: an SQLite database of deliveries, each with a checksum.

A row becomes a delivery only if its checksum is correct, because signatures are verified only on arrival.
"""

import os
import sqlite3
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zlib import crc32

from archiver import events
from archiver.events import Content, Delivery
from archiver.inbound.spool.errors import SpoolDamagedError, damaged, explained

BUSY_SECONDS = 5
PAGE_BYTES = 4_096


_COLUMNS = "received_at, source, key_id, type, session_id, dedupe_key, body"
_SCHEMA = """
    CREATE TABLE spooled (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        received_at TEXT NOT NULL,
        source TEXT NOT NULL,
        key_id TEXT,
        body BLOB NOT NULL,
        type TEXT,
        session_id TEXT,
        dedupe_key BLOB,
        checksum INTEGER
    )
"""
_OBJECTS = {("table", "spooled"), ("table", "sqlite_sequence")}
_MAGIC = b"SQLite format 3\0"
_WAL_FORMAT = 2  # the newest format that SQLite writes
_MAX_UNREADABLE = 1_000  # ids tried one by one after a damaged page; a scan finds later rows
_INSERT = f"INSERT INTO spooled ({_COLUMNS}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # only a constant is inserted, never input
_SELECT_FROM = f"SELECT id, checksum, {_COLUMNS} FROM spooled WHERE id >= ? ORDER BY id"  # noqa: S608  # only a constant is inserted, never input

Row = tuple[Any, ...]


def open_file(path: Path, max_bytes: int) -> sqlite3.Connection:
    """Open the file, or create it. Raises `SpoolError`; for a damaged file `SpoolDamagedError`."""
    with explained(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        _check_head(path)
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _check_pages(database, path)
            for pragma in (
                "auto_vacuum = INCREMENTAL",  # before the first table, or never
                "journal_mode = WAL",
                "synchronous = FULL",  # each commit is fsynced, not only each checkpoint
                "secure_delete = ON",  # deleted deliveries must not remain in the file (I8)
                f"max_page_count = {max(max_bytes // PAGE_BYTES, 16)}",
            ):
                database.execute(f"PRAGMA {pragma}").fetchall()
            _make_table(database, path)
        except BaseException:
            database.close()
            raise
        return database


def is_regular(path: Path) -> bool:
    """Return whether the path is a regular file or absent: not a folder, link, named pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return True


def _check_head(path: Path) -> None:
    """Raise `SpoolDamagedError` if SQLite could not write the file, or would remove a log that has deliveries."""
    with path.open("rb") as file:
        head = file.read(100)
    if head and (not head.startswith(_MAGIC) or max(head[18:20], default=0) > _WAL_FORMAT):
        raise damaged(path, "file header")
    if not head and read_wal(path):
        raise damaged(path, "empty, but with a write-ahead log")


def _check_pages(database: sqlite3.Connection, path: Path) -> None:
    """Raise `SpoolDamagedError` unless every page and row is intact.

    A damaged page may silently skip rows, return other rows or wrong numbers; with a damaged list of free pages, the
    next delivery may overwrite a waiting one.
    """
    (result,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise damaged(path, result)


def _make_table(database: sqlite3.Connection, path: Path) -> None:
    rows = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    if not rows:
        database.execute(_SCHEMA)
        return
    sql = next((sql for _, name, sql in rows if name == "spooled"), None) or ""
    plain = _without_spaces(_SCHEMA)
    before_checksums = plain.replace(",checksumINTEGER", "")
    if {each[:2] for each in rows} != _OBJECTS or _without_spaces(sql) not in {plain, before_checksums}:
        raise damaged(path, "schema")
    if _without_spaces(sql) == before_checksums:
        _add_checksums(database, path)


def _without_spaces(sql: str) -> str:
    return "".join(sql.split())


def _add_checksums(database: sqlite3.Connection, path: Path) -> None:
    """Add a checksum to each row of an older version; afterwards a row without one counts as damaged."""
    database.create_function("checksum_of", -1, lambda *row: checksum(row), deterministic=True)
    with transaction(database, path):
        database.execute("ALTER TABLE spooled ADD COLUMN checksum INTEGER")
        database.execute(f"UPDATE spooled SET checksum = checksum_of({_COLUMNS})")  # noqa: S608  # only a constant is inserted, never input


def read_wal(path: Path) -> bytes:
    """Return the write-ahead log of a file; empty if there is none."""
    with explained(path):
        wal = Path(f"{path}-wal")
        return wal.read_bytes() if wal.is_file() else b""


@contextmanager
def transaction(database: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Run the block in a transaction that is durable at its end. Raises `SpoolError`."""
    with explained(path):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:  # some errors end the transaction themselves
                database.execute("ROLLBACK")
            raise


def row_of(delivery: Delivery[Content]) -> Row:
    """Return the columns of a delivery, without its number and checksum."""
    kind, session_id, dedupe_key = delivery.internal
    received_at = delivery.received_at.isoformat()
    return received_at, delivery.source, delivery.key_id, kind, session_id, dedupe_key, delivery.content.body


def delivery_of(row: Row) -> Delivery[Content]:
    """Return the delivery of these columns."""
    received_at, source, key_id, kind, session_id, dedupe_key, body = row
    content = events.restore(body, source, kind, session_id, dedupe_key)
    return Delivery(content, datetime.fromisoformat(received_at), key_id, source)


def insert_rows(database: sqlite3.Connection, rows: Iterable[Row]) -> int:
    """Insert a stream of deliveries and return their number. Requires a transaction."""
    return max(database.executemany(_INSERT, ((*row, checksum(row)) for row in rows)).rowcount, 0)


def select(database: sqlite3.Connection, path: Path, start: int) -> Generator[tuple[int, Row]]:
    """Yield number and row of each delivery from this number on, in order.

    Raises `SpoolError`; at a damaged delivery, `SpoolDamagedError`.
    """
    with explained(path):
        last = start - 1
        for number, stored, *columns in database.execute(_SELECT_FROM, (start,)):
            row = tuple(columns)
            if number <= last:
                raise damaged(path, f"delivery {number} behind delivery {last}")
            if stored != checksum(row):
                raise damaged(path, f"checksum of delivery {number}")
            last = number
            try:
                datetime.fromisoformat(row[0])
            except (TypeError, ValueError):
                raise damaged(path, f"time of delivery {number}") from None
            yield number, row


def readable(database: sqlite3.Connection, path: Path) -> Iterator[Row]:
    """Yield the rows of a damaged file that can still be read."""
    with explained(path):
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'spooled'").fetchone():
            return
    start, unreadable = 1, 0
    while unreadable < _MAX_UNREADABLE:
        with suppress(SpoolDamagedError):
            for number, row in select(database, path, start):
                yield row
                start, unreadable = number + 1, 0
            break
        start += 1  # skip an unreadable id, or one on an unreadable page
        unreadable += 1


def select_rows(database: sqlite3.Connection, path: Path) -> set[Row]:
    """Return all rows without their numbers. Raises `SpoolError`."""
    with explained(path):
        return set(database.execute(f"SELECT {_COLUMNS} FROM spooled"))  # noqa: S608  # only a constant is inserted, never input


def checksum(row: Row) -> int:
    """Return the checksum of a row without its number."""
    *rest, body = row
    return crc32(body if isinstance(body, bytes) else b"", crc32(repr(rest).encode()))
