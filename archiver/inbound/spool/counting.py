"""Store the number of deliveries of a spool file, and the newest of their ids, in a second file, to detect losses.

Neither exceeds its value in the spool file: they are written after an insertion and before a deletion. A spool file
with an older newest id is an old copy that someone put back.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import structlog

log = structlog.get_logger(__name__)

LOST = "lost.json"  # in the folder of the spool
_MAX_BYTES = 4_096  # of a count or of the recorded losses; the rest of a longer file is damage


class Lost(msgspec.Struct, frozen=True):
    """The number of acknowledged deliveries that are missing from all files, and the time of the first loss."""

    events: int = 0
    since: datetime | None = None


class Counted(msgspec.Struct, frozen=True, gc=False):
    """The number of waiting deliveries and the newest id that a delivery of the file has had; 0 if unknown."""

    events: int = 0
    newest: int = 0

    def missing_from(self, events: int, newest: int) -> int:
        """Return the number of deliveries that a file with this number and newest id lacks; 0 or less if none.

        Deliveries with an id after the newest of an old copy count as waiting, up to the counted number, because
        the oldest are drained first.
        """
        return max(self.events - events, min(self.events, self.newest - newest))


class Count:
    """The count of one file, stored next to it. A failed write is ignored, because the deliveries have priority.

    `unrecorded`: lost deliveries that could not be added to the recorded losses. They remain in the count, so that
    the next process that opens the file reports them again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".count")
        self.unrecorded = 0

    def read(self) -> Counted:
        """Return the count; zeros if there is none. An earlier version writes a line without the newest id."""
        try:
            numbers = [max(int(part), 0) for part in _read(self._path).partition(b"\n")[0].split()]
            return Counted(*numbers[:2])
        except (OSError, ValueError) as error:
            log.warning(
                "count of a spool file unreadable; losses of this file cannot be detected",
                file=self._path.name,
                reason=str(error),
            )
            return Counted()

    def write(self, events: int, newest: int, *, is_durable: bool = False) -> None:
        """Store the count, so that it survives a killed process; with `is_durable`, also a crash of the machine."""
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            opened = os.open(self._path, flags, 0o600)
            try:
                os.pwrite(opened, f"{events + self.unrecorded:020} {newest:020}\n".encode(), 0)
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
