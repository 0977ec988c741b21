"""The time for expiry: nothing expires while a clock is in doubt."""

import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
from sqlalchemy import Connection, text

from archiver.compliance.seals import select_newest
from archiver.errors import ArchiverError

TOLERANCE = timedelta(minutes=1)
MAX_PAUSE = timedelta(days=31)  # between two runs with a restart of the machine in between
FILE = "retention-clock.json"  # in ARCHIVER_HOME

Reason = Literal["clocks_differ", "time_jumped", "seal_in_future"]


class ClockError(ArchiverError):
    """Expiry is stopped because of a clock; the message says why and what to do. `reason` is a stable code."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class ClockReading(msgspec.Struct, frozen=True):
    """The clocks of this machine: wall time, and seconds since boot, which cannot be set."""

    at: datetime
    boot_id: str
    seconds: float


def read_clocks() -> ClockReading:
    """Return what the clocks of this machine show. Seconds include the time in which it was suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return ClockReading(datetime.now(UTC), _boot_id(), time.clock_gettime(clock))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def destruction_time(connection: Connection, home: Path) -> datetime:
    """Return the earlier of this machine's and Postgres' time. Raises `ClockError`.

    It is raised where both differ by more than a minute, where time has jumped since this was last asked with the
    same ARCHIVER_HOME, and where the newest seal lies in the future.
    """
    reading = read_clocks()
    server: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    _compare_with_postgres(reading, read_clocks(), server)
    _compare_with_last(reading, home / FILE)
    now = min(reading.at, server)
    newest = select_newest(connection)
    if newest.id and newest.sealed_at > now + TOLERANCE:
        raise ClockError(
            "seal_in_future",
            f"Nothing is destroyed for its age: the newest seal, {newest.id}, is dated {newest.sealed_at:{_FORMAT}},"
            f" in the future: it is {now:{_FORMAT}} here. Set the clocks of this machine and of Postgres right, or"
            " wait until that time has passed.",
        )
    _write(reading, home / FILE)
    return now


_FORMAT = "%Y-%m-%d %H:%M:%S UTC"


def _compare_with_postgres(before: ClockReading, after: ClockReading, server: datetime) -> None:
    ahead, behind = before.at - server, server - after.at
    if max(ahead, behind) > TOLERANCE:
        which = "ahead of" if ahead > behind else "behind"
        raise ClockError(
            "clocks_differ",
            f"Nothing is destroyed for its age: this machine's clock ({after.at:{_FORMAT}}) is"
            f" {max(ahead, behind)} {which} Postgres' clock ({server.astimezone(UTC):{_FORMAT}}). Synchronise both"
            " (NTP), then run it again.",
        )


def _compare_with_last(reading: ClockReading, file: Path) -> None:
    last = _read(file)
    if last is None:
        return
    passed = reading.at - last.at
    if reading.boot_id and reading.boot_id == last.boot_id:
        surplus = passed - timedelta(seconds=reading.seconds - last.seconds)
        has_jumped = abs(surplus) > TOLERANCE
    else:  # how long the machine was off is not known
        surplus, has_jumped = passed, passed < -TOLERANCE or passed > MAX_PAUSE
    if has_jumped:
        raise ClockError(
            "time_jumped",
            f"Nothing is destroyed for its age: time has jumped by {surplus} since it was last done, at"
            f" {last.at:{_FORMAT}}; it is {reading.at:{_FORMAT}} here. Set the clock right (NTP); if it is right,"
            f" remove {file} and run it again.",
        )


def _read(file: Path) -> ClockReading | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=ClockReading)
    except (OSError, msgspec.DecodeError):
        return None


def _write(reading: ClockReading, file: Path) -> None:
    """Store the reading atomically. Without a writable folder only jumps go unnoticed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}")
        with os.fdopen(handle, "wb") as opened:
            opened.write(msgspec.json.encode(reading))
        Path(name).replace(file)
    except OSError:
        return
