"""Determine the time for expiry. Nothing expires while a clock is in doubt."""

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
MAX_PAUSE = timedelta(days=31)  # largest plausible time between two runs if the machine restarted in between
FILE = "retention-clock.json"  # in ARCHIVER_HOME

Reason = Literal["clocks_differ", "time_jumped", "seal_in_future"]


class ClockError(ArchiverError):
    """Expiry is stopped because of a clock; the message gives the cause and the remedy. `reason` is a stable code."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class ClockReading(msgspec.Struct, frozen=True):
    """A reading of the clocks of this machine: wall time, and seconds since boot, which cannot be set."""

    at: datetime
    boot_id: str
    seconds: float


def read_clocks() -> ClockReading:
    """Read the clocks of this machine. The seconds since boot include the time spent suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return ClockReading(datetime.now(UTC), _boot_id(), time.clock_gettime(clock))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def destruction_time(connection: Connection, home: Path) -> datetime:
    """Return the time of this machine or that of Postgres, whichever is earlier. Raises `ClockError`.

    The error means that the two differ by more than a minute, that time has jumped since the last call with the same
    ARCHIVER_HOME, or that the newest seal is dated in the future.
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
            f"retention is stopped: the newest seal, {newest.id}, is dated {newest.sealed_at:{_FORMAT}}, which is in"
            f" the future (now: {now:{_FORMAT}}). Correct the clocks of this machine and of Postgres, or"
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
            f"retention is stopped: this machine's clock ({after.at:{_FORMAT}}) is"
            f" {max(ahead, behind)} {which} the Postgres clock ({server.astimezone(UTC):{_FORMAT}}). Synchronise both"
            " (NTP), then retry.",
        )


def _compare_with_last(reading: ClockReading, file: Path) -> None:
    last = _read(file)
    if last is None:
        return
    passed = reading.at - last.at
    if reading.boot_id and reading.boot_id == last.boot_id:
        surplus = passed - timedelta(seconds=reading.seconds - last.seconds)
        has_jumped = abs(surplus) > TOLERANCE
    else:  # the machine was restarted, so the elapsed time is unknown
        surplus, has_jumped = passed, passed < -TOLERANCE or passed > MAX_PAUSE
    if has_jumped:
        jumped = "went back" if surplus < timedelta() else "jumped"
        amount = timedelta(seconds=round(abs(surplus).total_seconds()))
        raise ClockError(
            "time_jumped",
            f"retention is stopped: time {jumped} by {amount} since the last run at"
            f" {last.at:{_FORMAT}} (now: {reading.at:{_FORMAT}}). Correct the clock (NTP); if it is correct,"
            f" delete {file} and retry.",
        )


def _read(file: Path) -> ClockReading | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=ClockReading)
    except (OSError, msgspec.DecodeError):
        return None


def _write(reading: ClockReading, file: Path) -> None:
    """Store the reading atomically. If the folder is not writable, only time jumps go undetected."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}")
        with os.fdopen(handle, "wb") as opened:
            opened.write(msgspec.json.encode(reading))
        Path(name).replace(file)
    except OSError:
        return
