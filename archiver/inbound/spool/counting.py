"""The number of deliveries in a file, stored beside it, to detect losses.

It is never more than what waits: written after what is added, before what is deleted.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

LOST = "lost.json"  # in the folder of the spool


class Lost(msgspec.Struct, frozen=True):
    """Deliveries that were acknowledged and are in no file any more: how many, since when."""

    events: int = 0
    since: datetime | None = None


class Count:
    """The count beside one file. What it cannot write it leaves: the deliveries themselves come first."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".count")

    def read(self) -> int:
        """The count; 0 where there is none."""
        with suppress(OSError, ValueError):
            return max(int(_read(self._path)), 0)
        return 0

    def write(self, events: int, *, is_durable: bool = False) -> None:
        """Keep it: for a process that is killed, or with `is_durable` for a machine that is."""
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            opened = os.open(self._path, flags, 0o600)
            try:
                os.pwrite(opened, f"{events:020}\n".encode(), 0)
                if is_durable:
                    os.fdatasync(opened)
            finally:
                os.close(opened)


def add_lost(folder: Path, events: int) -> Lost:
    """Note that so many more are lost, until a person removes the note."""
    known = select_lost(folder)
    lost = Lost(known.events + events, known.since or datetime.now(UTC))
    fresh = folder / f"{LOST}.new"
    fresh.write_bytes(msgspec.json.encode(lost))
    fresh.replace(folder / LOST)
    return lost


def select_lost(folder: Path) -> Lost:
    """What was noted."""
    try:
        return msgspec.json.decode(_read(folder / LOST), type=Lost)
    except (OSError, msgspec.DecodeError):
        return Lost()


def _read(path: Path) -> bytes:
    """Return the content of a file; empty where this is none: opening a named pipe would block."""
    return path.read_bytes() if path.is_file() else b""
