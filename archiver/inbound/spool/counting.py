"""Store the number of deliveries of a spool file in a second file, to detect losses.

The count never exceeds the number of waiting deliveries: it is written after an insertion and before a deletion.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

LOST = "lost.json"  # in the folder of the spool
_MAX_BYTES = 4_096  # of a count or of the recorded losses; the rest of a longer file is damage


class Lost(msgspec.Struct, frozen=True):
    """The number of acknowledged deliveries that are missing from all files, and the time of the first loss."""

    events: int = 0
    since: datetime | None = None


class Count:
    """The count of one file, stored next to it. A failed write is ignored, because the deliveries have priority.

    `unrecorded`: lost deliveries that could not be added to the recorded losses. They remain in the count, so that
    the next process that opens the file reports them again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".count")
        self.unrecorded = 0

    def read(self) -> int:
        """Return the count; 0 if there is none."""
        with suppress(OSError, ValueError):
            return max(int(_read(self._path)), 0)
        return 0

    def write(self, events: int, *, is_durable: bool = False) -> None:
        """Store the count, so that it survives a killed process; with `is_durable`, also a crash of the machine."""
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            opened = os.open(self._path, flags, 0o600)
            try:
                os.pwrite(opened, f"{events + self.unrecorded:020}\n".encode(), 0)
                if is_durable:
                    os.fdatasync(opened)
            finally:
                os.close(opened)


def add_lost(folder: Path, events: int) -> Lost:
    """Add to the recorded losses, which stay until an operator deletes the file; return their sum.

    Raises `OSError`.
    """
    known = select_lost(folder)
    lost = Lost(known.events + events, known.since or datetime.now(UTC))
    fresh = folder / f"{LOST}.new"
    fresh.write_bytes(msgspec.json.encode(lost))
    fresh.replace(folder / LOST)
    return lost


def select_lost(folder: Path) -> Lost:
    """Return the recorded losses."""
    try:
        return msgspec.json.decode(_read(folder / LOST), type=Lost)
    except (OSError, msgspec.DecodeError):
        return Lost()


def _read(path: Path) -> bytes:
    """Return the content of a file; empty if it is not a regular file, because opening a named pipe would block."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)
