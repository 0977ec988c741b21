"""Replace a damaged or full file, and keep its readable content."""

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from itertools import count, takewhile
from pathlib import Path

from archiver.durable import sync_folder
from archiver.inbound.spool import files
from archiver.inbound.spool.errors import SpoolDamagedError, explained
from archiver.inbound.spool.scanning import scan


def set_aside(path: Path, wal: bytes, deleted: Collection[int]) -> tuple[int, Path]:
    """Replace the file with a new one that contains its readable content, and keep the old one under another name.

    `wal`: the write-ahead log before SQLite opened the file, because SQLite removes it together with frames that it
    skips. `deleted`: hashes of deleted rows, which may remain in bytes that SQLite no longer uses.

    Returns the number of saved deliveries and the new name of the damaged file. Raises `SpoolError`, and then leaves
    the file in place.
    """
    fresh = path.with_suffix(".new")
    with explained(path):
        fresh.unlink(missing_ok=True)
        saved = _copy(path, fresh, wal, deleted)
        saved_as = next(name for name in _names(path) if not name.exists())
        os.link(path, saved_as)
        for end in ("-wal", "-shm"):
            if (beside := Path(f"{path}{end}")).exists():
                beside.rename(f"{saved_as}{end}")
        fresh.replace(path)
        sync_folder(path.parent)
    return saved, saved_as


def set_aside_files(folder: Path) -> list[Path]:
    """Return the damaged files that an operator must inspect."""
    return sorted(folder.glob("damaged-*.db"))


def _names(path: Path) -> Iterator[Path]:
    return (path.with_name(f"damaged-{path.stem}-{number}.db") for number in count(1))


def _copy(path: Path, fresh: Path, wal: bytes, deleted: Collection[int]) -> int:
    raw = path.read_bytes()  # before SQLite sees it again
    damaged = sqlite3.connect(path, isolation_level=None)
    saved = 0
    try:
        damaged.execute("PRAGMA writable_schema = ON")  # opens a truncated file
        whole = files.open_file(fresh, 2**40)
        try:
            with files.transaction(whole, fresh):
                saved = files.insert_rows(whole, _readable(damaged, path))
                known = files.select_rows(whole, fresh)
                saved += insert_found(whole, scan(raw, wal), known, deleted)
            whole.execute("PRAGMA journal_mode = DELETE").fetchall()  # a single file, which can be renamed
        finally:
            whole.close()
    finally:
        damaged.close()
    return saved


def insert_found(
    database: sqlite3.Connection, found: Iterable[files.Row], known: Collection[files.Row], deleted: Collection[int]
) -> int:
    """Insert the rows that a scan found, except rows that are known or deleted. Return their number.

    Requires a transaction.
    """
    new = [row for row in found if row not in known and hash(row) not in deleted]
    return files.insert_rows(database, new)


def _readable(damaged: sqlite3.Connection, path: Path) -> Iterator[files.Row]:
    try:
        yield from files.readable(damaged, path)
    except SpoolDamagedError:
        return  # the number of rows is unknown too


def overwrite(path: Path) -> None:
    """Overwrite a file, so that its content is no longer on disk (I8), and leave it empty. Needs no free space."""
    with explained(path):
        for each in takewhile(Path.exists, (path, Path(f"{path}-wal"))):
            with each.open("r+b", buffering=0) as file:
                size = each.stat().st_size
                for start in range(0, size, files.PAGE_BYTES):
                    file.write(bytes(min(files.PAGE_BYTES, size - start)))
                os.fsync(file.fileno())
                file.truncate(0)
                os.fsync(file.fileno())
