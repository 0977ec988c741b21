"""Spool deliveries on local disk while Postgres does not accept them, each fsynced before the response (I1).

Every process has its own file `spool-N.db` (SQLite) and holds the lock of `spool-N.lock`. Another process adopts the
file of an exited one. A disk may fill up, or lose or damage a file: all acknowledged deliveries that are still
readable are then saved.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

import structlog

from archiver.inbound.spool.counting import LOST, Lost, select_lost
from archiver.inbound.spool.errors import (
    SpoolError,
    SpoolFullError,
    explained,
    is_accessible,
    unusable_message,
    user_name,
)
from archiver.inbound.spool.files import BUSY_SECONDS, PAGE_BYTES, is_regular
from archiver.inbound.spool.locked_file import (
    MIN_ROOM_BYTES,
    SELECT_DEPTH,
    Depth,
    Spool,
    Spooled,
    hold,
    open_spool,
    report_replaced,
)
from archiver.inbound.spool.salvage import set_aside_files

__all__ = [
    "LOST",
    "MIN_ROOM_BYTES",
    "SPOOL_FOLDER",
    "Depth",
    "Lost",
    "Spool",
    "SpoolError",
    "SpoolFullError",
    "Spooled",
    "open_left_behind",
    "open_spool",
    "select_depth",
    "select_foreign",
    "select_lost",
    "select_room",
    "select_unfit",
    "set_aside_files",
]

log = structlog.get_logger(__name__)

SPOOL_FOLDER = "spool"  # in ARCHIVER_HOME


def open_left_behind(folder: Path) -> Iterator[Spool]:
    """Yield non-empty files of exited processes, for the caller to close; unreadable ones are skipped."""
    for path in sorted(folder.glob("spool-*.db")):
        number = path.stem.removeprefix("spool-")
        try:
            held = _hold(folder, int(number)) if number.isdecimal() else None
        except (OSError, SpoolError) as error:
            log.error("spool file of an exited process unreadable", reason=str(error))  # noqa: TRY400  # there is nothing to trace
            continue
        if held is not None and held.events:
            yield held
        elif held is not None:
            held.close()


def _hold(folder: Path, number: int) -> Spool | None:
    path = folder / f"spool-{number}.db"
    if not is_regular(path):
        report_replaced(folder, number)
        return None
    size = path.lstat().st_size
    return hold(folder, number, 2 * size) if size else None


def select_depth(folder: Path) -> Depth:
    """Return the depth of all files of a folder together. Raises `SpoolError`."""
    events, size, oldest = 0, 0, None
    for path in sorted(folder.glob("spool-*.db")):
        if not is_regular(path):
            continue
        with explained(path):
            database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
            try:
                rows = database.execute(SELECT_DEPTH).fetchone()
            finally:
                database.close()
        events, size = events + rows[0], size + rows[1]
        oldest = min(oldest or rows[2], rows[2]) if rows[2] else oldest
    return Depth(events, size, datetime.fromisoformat(oldest) if oldest else None)


def select_unfit(folder: Path) -> list[Path]:
    """Return paths with the name of a spool file that are not regular files: folders, links, named pipes."""
    return [path for name in ("spool-*.*", f"{LOST}*") for path in sorted(folder.glob(name)) if not is_regular(path)]


def select_foreign(folder: Path) -> dict[Path, str]:
    """Return the spool files that a process of the folder's owner cannot use, each with the name of its owner.

    A command that another user ran, such as root, may have created them.
    """
    foreign = {}
    with explained(folder):
        of_folder = folder.stat().st_uid if folder.exists() else 0
        for path in sorted(folder.glob("spool-*.*")):
            with suppress(FileNotFoundError):  # removed by a running process
                owner = path.lstat().st_uid
                if owner != of_folder or not is_accessible(path):
                    foreign[path] = user_name(owner)
    return foreign


def select_room(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet.

    Raises `SpoolError` if the disk is not writable.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with explained(folder):
        if place == folder:
            with TemporaryFile(dir=folder) as trial:
                trial.write(bytes(PAGE_BYTES))
                trial.flush()
                os.fsync(trial.fileno())
        elif not os.access(place, os.W_OK | os.X_OK):
            raise SpoolError(unusable_message(folder, f"{place} is not writable"))
        disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize
