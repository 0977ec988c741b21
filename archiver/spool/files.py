"""One file of a spool: an SQLite database of deliveries, each with a checksum, since a disk may lie.

Whatever reads a row checks it: a delivery was verified when it came, so nothing else may pass for it later.
"""

import os
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from archiver.spool.errors import SpoolDamagedError, damaged, explained

BUSY_SECONDS = 5
PAGE_BYTES = 4_096
PAGE_DELIVERIES = 200


class Spooled(msgspec.Struct, frozen=True, gc=False):
    """One delivery as it came. A fact of ours keeps what its bytes do not tell: its kind, its session, its key.

    `id` grows with arrival, within the file that `file` numbers; 0 before it is spooled.
    """

    id: int
    received_at: datetime
    source: str
    key_id: str | None
    body: bytes
    type: str | None = None
    session_id: str | None = None
    dedupe_key: bytes | None = None
    file: int = 0


_COLUMNS = "received_at, source, key_id, type, session_id, dedupe_key, body"
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS spooled (
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
_INSERT = f"INSERT INTO spooled ({_COLUMNS}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # a constant
_SELECT_FROM = f"SELECT id, checksum, {_COLUMNS} FROM spooled WHERE id >= ? ORDER BY id"  # noqa: S608  # a constant

Row = tuple[Any, ...]


def open_file(path: Path, max_bytes: int) -> sqlite3.Connection:
    """The file, made if there is none. Raises `SpoolError`, of a damaged one `SpoolDamagedError`."""
    with explained(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            for pragma in (
                "auto_vacuum = INCREMENTAL",  # before the first table, or never
                "journal_mode = WAL",
                "synchronous = FULL",  # each commit is fsynced, not only each checkpoint
                "secure_delete = ON",  # what has gone to the ledger must not be found here (I8)
                f"max_page_count = {max(max_bytes // PAGE_BYTES, 16)}",
            ):
                database.execute(f"PRAGMA {pragma}").fetchall()
            database.execute(_SCHEMA)
            if "checksum" not in {row[1] for row in database.execute("PRAGMA table_info(spooled)")}:
                database.execute("ALTER TABLE spooled ADD COLUMN checksum INTEGER")  # made by an older version
        except BaseException:
            database.close()
            raise
        return database


@contextmanager
def transaction(database: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All or none, durable at the end of the block. Raises `SpoolError`."""
    with explained(path):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:  # some errors have ended it already
                database.execute("ROLLBACK")
            raise


def insert(database: sqlite3.Connection, deliveries: Sequence[Spooled]) -> None:
    """Within a transaction."""
    rows = [row_of(each) for each in deliveries]
    database.executemany(_INSERT, [(*row, checksum(row)) for row in rows])


def row_of(delivery: Spooled) -> Row:
    """Return its columns, without number and checksum."""
    return (
        delivery.received_at.isoformat(),
        delivery.source,
        delivery.key_id,
        delivery.type,
        delivery.session_id,
        delivery.dedupe_key,
        delivery.body,
    )


def insert_all(database: sqlite3.Connection, deliveries: Iterator[Spooled]) -> int:
    """Within a transaction, and not all in memory; answers how many."""
    copied = 0
    while page := list(islice(deliveries, PAGE_DELIVERIES)):
        insert(database, page)
        copied += len(page)
    return copied


def select(database: sqlite3.Connection, path: Path, start: int) -> Generator[Spooled]:
    """The deliveries from this id on, in order. Raises `SpoolError`, at a damaged one `SpoolDamagedError`."""
    with explained(path):
        for number, stored, *row in database.execute(_SELECT_FROM, (start,)):
            if stored is not None and stored != checksum(tuple(row)):
                raise damaged(path, f"checksum of delivery {number}")
            received_at, source, key_id, kind, session_id, dedupe_key, body = row
            try:
                moment = datetime.fromisoformat(received_at)
            except (TypeError, ValueError):
                raise damaged(path, f"time of delivery {number}") from None
            yield Spooled(number, moment, source, key_id, body, kind, session_id, dedupe_key)


def readable(database: sqlite3.Connection, path: Path) -> Iterator[Spooled]:
    """Whatever can still be read of a damaged file."""
    with explained(path):
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'spooled'").fetchone():
            return
        last = int(database.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'spooled'").fetchone()[0] or 0)
    start = 1
    while start <= last:
        with suppress(SpoolDamagedError):
            for delivery in select(database, path, start):
                yield delivery
                start = delivery.id + 1
            break
        start += 1  # one that cannot be read, or lies where nothing can: try behind it


def insert_rows(database: sqlite3.Connection, rows: Iterator[Row]) -> int:
    """Likewise rows that were found by their checksums; answers how many."""
    return database.executemany(_INSERT, ((*row, checksum(row)) for row in rows)).rowcount


def select_rows(database: sqlite3.Connection, path: Path) -> set[Row]:
    """All rows, without their numbers. Raises `SpoolError`."""
    with explained(path):
        return set(database.execute(f"SELECT {_COLUMNS} FROM spooled"))  # noqa: S608  # a constant


def checksum(row: Row) -> int:
    """Of a row without its number."""
    *rest, body = row
    return crc32(body if isinstance(body, bytes) else b"", crc32(repr(rest).encode()))
