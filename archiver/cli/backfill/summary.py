"""The result of a backfill, for people and programs."""

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from archiver.cli import complain
from archiver.cli.output import console, print_json
from archiver.history import ReconcileResult

MAX_SHOWN = 20  # failures


class Summary:
    """What a backfill came to."""

    def __init__(self, *, dry_run: bool, lifetime: timedelta) -> None:
        self.dry_run = dry_run
        self.was_interrupted = False
        self.is_all_not_found = False  # every answer was 404
        self.recently_active = 0  # sessions that CallHQ does not show, although it cannot have forgotten them
        self._lifetime = lifetime
        self.outcomes: Counter[str] = Counter()
        self.coverage: Counter[str] = Counter()
        self.recovered = 0
        self.repaired: list[tuple[str, int]] = []
        self.failures: list[tuple[str, str]] = []
        self._started = time.monotonic()

    def add(self, result: ReconcileResult) -> None:
        """One more session."""
        self.outcomes[result.outcome] += 1
        if result.outcome in _FAILURES:
            self.failures.append((result.session_id, result.error or _FAILURES[result.outcome]))
        if result.after is not None and result.outcome != "failed":  # else it stands as before
            self.coverage[result.after.coverage] += 1
        if result.outcome == "gone" and result.before is not None:
            self.recently_active += result.before.last_event_at > datetime.now(UTC) - self._lifetime
        if result.recovered > 0:
            self.recovered += result.recovered
            self.repaired.append((result.session_id, result.recovered))

    @property
    def is_url_suspect(self) -> bool:
        """Return whether nothing was found where something must exist."""
        return self.is_all_not_found and (self.recently_active > 0 or self.outcomes["unknown"] > 0)

    def show(self, *, as_json: bool) -> None:
        """Print the summary on stdout."""
        seconds = time.monotonic() - self._started
        if as_json:
            print_json(self._figures(seconds))
            return
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name in ("read", "gone", "unreadable", "unavailable", "unknown", "failed", "busy"):
            if self.outcomes[name] or name == "read":
                table.add_row(_MEANINGS[name], f"{self.outcomes[name]:,}")
        would = "messages that would be recovered" if self.dry_run else "messages recovered"
        table.add_row(would, f"{self.recovered:,}", style="bold")
        table.add_row("in sessions", f"{len(self.repaired):,}")
        for state, number in sorted(self.coverage.items()):
            table.add_row(f"{'would be' if self.dry_run else 'now'} {state}", f"{number:,}")
        table.add_row("sessions/s", f"{self.outcomes.total() / seconds:,.1f}" if seconds else "")
        if not self.outcomes and not self.was_interrupted:
            click.echo("Nothing to read: no session matches, or all matching sessions are already read.")
            return
        printed = console()
        printed.print(table)
        for session_id, number in self.repaired[:MAX_SHOWN] if self.dry_run else ():
            printed.print(Text(f"  {session_id}: {number} messages"))
        for session_id, error in self.failures[:MAX_SHOWN]:
            complain(f"{session_id}: {error}")
        if len(self.failures) > MAX_SHOWN:
            complain(f"and {len(self.failures) - MAX_SHOWN:,} more")

    def _figures(self, seconds: float) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run,
            "interrupted": self.was_interrupted,
            "sessions": self.outcomes.total(),
            "outcomes": self.outcomes,
            "coverage": self.coverage,
            "recovered_messages": self.recovered,
            "repaired_sessions": [{"id": each, "messages": number} for each, number in self.repaired],
            "failures": [{"id": each, "error": error} for each, error in self.failures],
            "seconds": round(seconds, 3),
        }


_FAILURES = {
    "failed": "could not be read",
    "unreadable": "an answer of an unexpected shape",
    "unavailable": "no answer, and the session has expired",
    "busy": "left to a worker that reads it now",
    "unknown": "unknown",
}

_MEANINGS = {
    "read": "sessions read",
    "gone": "no longer there (404, 410)",
    "unreadable": "answered in an unexpected shape",
    "unavailable": "given up: expired before any answer",
    "unknown": "unknown here and there (404)",
    "failed": "could not be read",
    "busy": "left to a worker that reads them now",
}
