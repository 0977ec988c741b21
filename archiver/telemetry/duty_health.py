"""Health of one worker duty, reported by the duty and read by the supervisor in another thread.

Pure state. A duty reports each step that succeeds and each fault that it survives; a duty that reports nothing for
`HANG_SECONDS` is hanging.
"""

import re
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Literal

import msgspec

State = Literal["starting", "running", "failed", "hanging", "off"]

HANG_SECONDS = 90.0  # without a report: longer than any statement and the wait for its lock
_STEP = "step"
_MAX_CHARACTERS = 300
_PACKAGE = Path(__file__).parent.parent
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")


class Report(msgspec.Struct, frozen=True):
    """State of a duty, for other processes; no content."""

    state: State
    since: datetime
    reason: str = ""
    restarts: int = 0

    @property
    def is_faulty(self) -> bool:
        """Return whether the duty needs the attention of an operator."""
        return self.state in {"failed", "hanging"}


class Duty:
    """The state of one duty; `name` identifies it in metrics, logs and reports."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.restarts = 0
        self._faults: dict[str, str] = {}
        self._has_worked, self._off = False, ""
        self._beat_at = monotonic()
        self._shown: tuple[State, str] = ("starting", "")
        self._since = datetime.now(UTC)

    def beat(self) -> None:
        """Report progress of any kind."""
        self._beat_at = monotonic()

    def working(self, part: str = _STEP) -> None:
        """Report that a step of this part succeeded."""
        self.beat()
        self._faults.pop(part, None)
        if part == _STEP:
            self._has_worked = True

    def failing(self, reason: str, part: str = _STEP) -> None:
        """Report a fault of this part. The duty continues, or is restarted."""
        self.beat()
        self._faults[part] = _CREDENTIALS.sub("***@", reason)[:_MAX_CHARACTERS]

    def switch_off(self, reason: str) -> None:
        """Report that the settings disable this duty."""
        self.beat()
        self._off = reason

    def seconds_since_report(self) -> float:
        """Return the seconds since the last report if they exceed the limit; otherwise 0."""
        silent = monotonic() - self._beat_at
        return 0.0 if self._off or silent < HANG_SECONDS else silent

    def report(self, stuck: str = "") -> Report:
        """Return the current state. `stuck`: the reason if the whole process is blocked."""
        shown = self._now(stuck)
        if shown[0] != self._shown[0]:
            self._since = datetime.now(UTC)
        self._shown = shown
        return Report(shown[0], self._since, shown[1], self.restarts)

    def _now(self, stuck: str) -> tuple[State, str]:
        silent, faults = self.seconds_since_report(), list(dict(self._faults).values())
        if self._off:
            return "off", self._off
        if stuck or silent:
            before = f"; before that: {faults[0]}" if faults else ""
            return "hanging", (stuck or f"no progress for {silent:.0f} s") + before
        if faults:
            return "failed", faults[0]
        return ("running", "") if self._has_worked else ("starting", "")


def as_text(reports: Mapping[str, Report]) -> str:
    """Return reports as the JSON text that `parse` reads."""
    return msgspec.json.encode(reports).decode()


def parse(text: str) -> dict[str, Report]:
    """Return the reports in this JSON text; raise `ValueError` (msgspec's) if it contains none."""
    return msgspec.json.decode(text, type=dict[str, Report])


def fault_location(error: BaseException) -> str:
    """Return the innermost location of this package in a traceback, such as `feed/publisher.py:45`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    result = next(reversed(own or frames), None)
    if result is None:
        return "an unknown place"
    path = Path(result.filename)
    shown = path.relative_to(_PACKAGE) if _PACKAGE in path.parents else Path(path.name)
    return f"{shown}:{result.lineno}"
