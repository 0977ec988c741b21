"""The time by which content is destroyed: nothing goes for its age while any clock is in doubt."""

import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
from sqlalchemy import Connection, text

from archiver.seals import select_newest

TOLERANCE = timedelta(minutes=1)
LONGEST_PAUSE = timedelta(days=31)  # between two runs with a restart of the machine in between
FILE = "retention-clock.json"  # in ARCHIVER_HOME

Reason = Literal["clocks_differ", "time_jumped", "seal_in_future"]


class ClockError(Exception):
    """Content may not be destroyed by its age now; the text says why and what to do. `reason` is a stable code."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Reading(msgspec.Struct, frozen=True):
    """What the clocks of this machine showed: the time, and the seconds since its start, which cannot be set."""

    at: datetime
    boot_id: str
    seconds: float


def read_clocks() -> Reading:
    """Return what the clocks of this machine show. Seconds include the time in which it was suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Reading(datetime.now(UTC), _boot_id(), time.clock_gettime(clock))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def time_to_destroy_by(connection: Connection, home: Path) -> datetime:
    """Return the earlier of this machine's clock and Postgres' clock. Raises `ClockError`.

    It is raised where both differ by more than a minute, where time has jumped since this was last asked with the
    same ARCHIVER_HOME, and where the newest seal lies in the future.
    """
    reading = read_clocks()
    theirs: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    _compare_with_postgres(reading, read_clocks(), theirs)
    _compare_with_last(reading, home / FILE)
    now = min(reading.at, theirs)
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


def _compare_with_postgres(before: Reading, after: Reading, theirs: datetime) -> None:
    ahead, behind = before.at - theirs, theirs - after.at
    if max(ahead, behind) > TOLERANCE:
        which = "ahead of" if ahead > behind else "behind"
        raise ClockError(
            "clocks_differ",
            f"Nothing is destroyed for its age: this machine's clock ({after.at:{_FORMAT}}) is"
            f" {max(ahead, behind)} {which} Postgres' clock ({theirs.astimezone(UTC):{_FORMAT}}). Synchronise both"
            " (NTP), then run it again.",
        )


def _compare_with_last(reading: Reading, file: Path) -> None:
    last = _read(file)
    if last is None:
        return
    passed = reading.at - last.at
    if reading.boot_id and reading.boot_id == last.boot_id:
        surplus = passed - timedelta(seconds=reading.seconds - last.seconds)
        has_jumped = abs(surplus) > TOLERANCE
    else:  # how long the machine was off is not known
        surplus, has_jumped = passed, passed < -TOLERANCE or passed > LONGEST_PAUSE
    if has_jumped:
        raise ClockError(
            "time_jumped",
            f"Nothing is destroyed for its age: time has jumped by {surplus} since it was last done, at"
            f" {last.at:{_FORMAT}}; it is {reading.at:{_FORMAT}} here. Set the clock right (NTP); if it is right,"
            f" remove {file} and run it again.",
        )


def _read(file: Path) -> Reading | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Reading)
    except (OSError, msgspec.DecodeError):
        return None


def _write(reading: Reading, file: Path) -> None:
    """Keep it for the next time, whole or not at all. Where the folder takes none, only jumps go unnoticed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}")
        with os.fdopen(handle, "wb") as opened:
            opened.write(msgspec.json.encode(reading))
        Path(name).replace(file)
    except OSError:
        return
