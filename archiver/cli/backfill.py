"""`archiver backfill`: fetch histories now and recover messages that webhooks lost."""

import asyncio
import csv
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from archiver import database, settings, telemetry
from archiver.archive import Timing
from archiver.cli import complain, connection, escaped, options
from archiver.cli.output import Number, Table, Whole, console, print_json, progress
from archiver.database import schema
from archiver.history import ReconcileResult, backfill
from archiver.history.backfill import Selection
from archiver.history.callhq import UnauthorizedError, printable
from archiver.history.opening import reconciling
from archiver.settings import Settings

_INTERRUPTED = "Interrupted; nothing is lost. Run the same command again to continue."
MAX_SHOWN = 20  # failures


class Summary:
    """The outcomes of a backfill, counted."""

    def __init__(self, *, dry_run: bool, lifetime: timedelta) -> None:
        self.dry_run = dry_run
        self.was_interrupted = False
        self.is_all_not_found = False  # every response was 404
        self.recently_active = 0  # sessions that CallHQ does not return although they have not expired
        self._lifetime = lifetime
        self.outcomes: Counter[str] = Counter()
        self.coverage: Counter[str] = Counter()
        self.recovered = 0
        self.repaired: list[tuple[str, int]] = []
        self.failures: list[tuple[str, str]] = []
        self._started = time.monotonic()

    def add(self, result: ReconcileResult) -> None:
        """Add the result of one session."""
        self.outcomes[result.outcome] += 1
        if result.outcome in _FAILURES:
            self.failures.append((result.session_id, result.error or _FAILURES[result.outcome]))
        if result.after is not None and result.outcome != "failed":  # otherwise the coverage is unchanged
            self.coverage[result.after.coverage] += 1
        if result.outcome == "gone" and result.before is not None:
            self.recently_active += result.before.last_event_at > datetime.now(UTC) - self._lifetime
        if result.recovered > 0:
            self.recovered += result.recovered
            self.repaired.append((result.session_id, result.recovered))

    @property
    def is_url_suspect(self) -> bool:
        """Return whether CallHQ found none of the sessions although some must exist."""
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
            printed.print(Text(f"  {escaped(session_id)}: {number} messages"))
        for session_id, error in self.failures[:MAX_SHOWN]:
            complain(f"{escaped(session_id)}: {escaped(error)}")
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
    "unreadable": "a response of unexpected form",
    "unavailable": "no response before the session expired",
    "busy": "being read by a worker",
    "unknown": "unknown",
}

_MEANINGS = {
    "read": "sessions read",
    "gone": "not found or expired (404, 410)",
    "unreadable": "response of unexpected form",
    "unavailable": "expired before any response",
    "unknown": "unknown to the archive and to CallHQ (404)",
    "failed": "could not be read",
    "busy": "being read by a worker",
}


@click.command("backfill")
@click.option("--session", "session_ids", multiple=True, metavar="ID", help="Only this session; may be repeated.")
@click.option(
    "--file",
    "file",
    type=click.File(encoding="utf-8-sig"),
    help="Only the ids in this file: one per line, or the first column of a CSV; - reads stdin.",
)
@click.option(
    "--since",
    metavar="TIME",
    help="Only sessions with an event at or after this time: 2024-01-15 or 2024-01-15T09:30:00Z.",
)
@click.option("--all", "every", is_flag=True, help="Every session, including those already reconciled.")
@click.option("--dry-run", is_flag=True, help="Show what would be repaired; write nothing.")
@click.option(
    "--rate",
    type=Number(0, min_open=True),
    help="Maximum calls per second.  [default: ARCHIVER_HISTORY_RATE]",
)
@click.option(
    "--concurrency",
    type=Whole(1, 256),
    help="Maximum concurrent calls.  [default: ARCHIVER_HISTORY_CONCURRENCY]",
)
@options.json_option
def command(
    *,
    session_ids: tuple[str, ...],
    file: TextIO | None,
    since: str | None,
    every: bool,
    dry_run: bool,
    rate: float | None,
    concurrency: int | None,
    as_json: bool,
) -> None:
    """Fetch histories now and recover messages that webhooks lost.

    Without options, it reads the sessions whose coverage is open, and those that CallHQ did not return although they
    have not expired. Session ids that are new to the archive are registered, unless CallHQ does not know them either.
    After Ctrl-C, run the same command again to continue. Exit 1 if any session could not be read, if CallHQ found
    none, or after Ctrl-C.
    """
    listed = (*session_ids, *(_read_ids(file) if file else ()))
    options.check_ids(listed, "session")
    if sum([bool(session_ids or file), since is not None, every]) > 1:
        raise click.UsageError("use only one of --session/--file, --since and --all")
    if file is not None and not listed:
        raise click.UsageError("--file: the file contains no ids; write one id per line")
    selection = Selection(listed, options.moment(since, "--since"), every)
    configuration = settings.read()
    telemetry.configure_logs("error", configuration.log_format)
    if not configuration.callhq_api_key.get_secret_value():
        raise settings.SettingsError("CALLHQ_API_KEY is not set. It is required to fetch histories.")
    summary = Summary(dry_run=dry_run, lifetime=timedelta(seconds=configuration.session_lifetime))
    with connection.database_url(configuration) as url:
        with connection.engine_at(configuration, url) as engine, database.transaction(engine) as opened:
            schema.check(opened)
        try:
            connection.run(
                _run(configuration, url, selection, summary, rate=rate, concurrency=concurrency, quiet=as_json)
            )
        except UnauthorizedError:
            summary.show(as_json=as_json)
            raise
    summary.show(as_json=as_json)
    if summary.was_interrupted:
        complain(f"{_INTERRUPTED}")
    if summary.is_url_suspect:
        complain(f"{_found_nothing(configuration, summary)}")
    if summary.was_interrupted or summary.failures or summary.is_url_suspect:
        sys.exit(1)


def _found_nothing(configuration: Settings, summary: Summary) -> str:
    recent = f", although {summary.recently_active:,} of them were active recently" if summary.recently_active else ""
    return (
        f"CallHQ returned 404 for every session{recent}. Check CALLHQ_API_URL."
        f" It is {printable(configuration.callhq_api_url)}; run `archiver doctor`."
    )


def _read_ids(file: TextIO) -> Iterator[str]:
    try:
        lines = file.read().splitlines()
        # Spreadsheets use semicolons where a comma is the decimal separator.
        delimiter = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter)):
            session_id = row[0].strip() if row else ""
            is_heading = number == 0 and re.sub(r"[\s_-]", "", session_id).lower() in {"id", "sessionid"}
            if session_id and not is_heading:
                yield session_id
    except (UnicodeDecodeError, csv.Error) as error:
        raise click.UsageError(f"--file: expected UTF-8 text with one id per line, or a CSV ({error})") from None


async def _run(
    configuration: Settings,
    url: str,
    selection: Selection,
    summary: Summary,
    *,
    rate: float | None,
    concurrency: int | None,
    quiet: bool,
) -> None:
    """Run until all sessions are read, or until Ctrl-C or SIGTERM."""

    async def read() -> None:
        async with reconciling(
            configuration, database.database_url(url), concurrency=concurrency, rate=rate, mark_unavailable=False
        ) as (
            engine,
            reconciler,
            _,
        ):
            timing = Timing.of(configuration)
            begun = datetime.now(UTC) if summary.dry_run else await backfill.begin(engine, selection)
            total = await backfill.count(engine, selection, begun, timing)
            with _progress(total, summary, quiet=quiet) as on_result:
                async for page in backfill.pages(engine, selection, begun, timing):
                    if summary.dry_run:
                        await reconciler.preview_all(page, on_result)
                    else:
                        unknown_sessions = await backfill.unknown_sessions(engine, page)
                        await reconciler.discover_all(unknown_sessions, on_result)
                        unknown_ids = set(unknown_sessions)
                        await reconciler.read_all([each for each in page if each not in unknown_ids], on_result)
            summary.is_all_not_found = reconciler.is_all_not_found
            if not summary.dry_run and not summary.failures:  # otherwise the next run continues with the failed ones
                await backfill.end(engine, selection)

    reading = asyncio.create_task(read())

    def interrupt() -> None:
        summary.was_interrupted = True
        reading.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        await reading
    except asyncio.CancelledError:
        if not summary.was_interrupted:
            raise


class _Rate(ProgressColumn):
    """The average rate since the start, because results arrive in groups."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:,.1f}/s" if seconds else "")


@contextmanager
def _progress(total: int, summary: Summary, *, quiet: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with progress(*columns, quiet=quiet) as bar:
        task = bar.add_task("Reading", total=total)

        def on_result(reading: ReconcileResult) -> None:
            summary.add(reading)
            bar.update(task, advance=1, description=f"Fetching, {summary.recovered:,} messages recovered")

        yield on_result
