"""Define the errors of a spool, each with its remedy."""

import errno
import os
import pwd
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archiver.errors import ArchiverError

# Error codes of SQLite for damaged files. A damaged schema or file format is a plain SQLITE_ERROR; text that is not
# UTF-8 fails in Python without a code (0). Other codes are faults of the disk, its permissions or its space.
_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_TOOBIG,
}


class SpoolError(ArchiverError):
    """The spool cannot be used; the message gives the cause and the remedy.

    `reason` is public, for `/readyz`: it names no path.
    """

    reason = "cannot be used: see the log, and check ARCHIVER_HOME and its disk"


class SpoolFullError(SpoolError):
    """The spool or its disk is full."""

    message = "the spool is full: give it more space (ARCHIVER_SPOOL_BYTES, or the disk of ARCHIVER_HOME)"
    reason = "full"


class SpoolDamagedError(SpoolError):
    """The file of the spool is damaged."""

    reason = "damaged: see the log"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert errors of the block to `SpoolError`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code
        if code == sqlite3.SQLITE_FULL:
            raise SpoolFullError from None
        if code in _DAMAGED or (code == 0 and isinstance(error, sqlite3.OperationalError)):
            raise damaged(path, str(error)) from None
        raise SpoolError(unusable_message(path, inaccessible_to_process(path) or str(error))) from None
    except MemoryError:  # a damaged length may be that of a whole disk
        raise SpoolError(unusable_message(path, "too large to read")) from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise SpoolFullError from None
        place, reason = Path(error.filename or path), error.strerror or str(error)
        raise SpoolError(unusable_message(place, inaccessible_to_process(place) or reason)) from None


def inaccessible_to_process(path: Path) -> str:
    """Return text that names the spool file or folder that denies access, and its owner; empty if none does."""
    for place in (path, Path(f"{path}-wal"), Path(f"{path}-shm"), path.parent):
        with suppress(OSError):
            owner = place.lstat().st_uid
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                return ""
            if not is_accessible(place):
                return (
                    f"{place.name} belongs to {user_name(owner)}; {user_name(os.geteuid())} may not read and write it"
                )
    return ""


def is_accessible(path: Path) -> bool:
    """Return whether this process may read and write a file or folder."""
    return os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def user_name(user: int) -> str:
    """Return the name of a user, or the number if it has no name, after the word `user`."""
    try:
        return f"user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"user {user}"


def damaged(path: Path, reason: str) -> SpoolDamagedError:
    """Return the error for a damaged file that no receiver has salvaged yet."""
    return SpoolDamagedError(
        f"The spool {path} is damaged ({reason}): check the disk of ARCHIVER_HOME; a receiver sets the file aside"
        " within half a minute and archives its readable deliveries."
    )


def unusable_message(place: Path, reason: str) -> str:
    return (
        f"The spool {place} cannot be used ({reason}): check ARCHIVER_HOME and its disk, or set ARCHIVER_SPOOL=off."
    )
