"""One erasure: targets, checks, order and report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn
from sqlalchemy import Connection, Engine

from archiver import database
from archiver.archive import Timing
from archiver.cli import connection
from archiver.cli.erasure import messages
from archiver.cli.output import progress
from archiver.compliance import erasure
from archiver.compliance.erasure import AuditEntry, Counts, HeldError, Ordered, Target, replay, targets
from archiver.compliance.erasure.quarantine_matches import (
    QuarantineMatches,
    delete_matches,
    select_deletable,
    select_matches,
)
from archiver.compliance.erasure.repeated_content import select_repeating_turns
from archiver.compliance.erasure.sweeping import NONE_SEARCHED, SearchedRows
from archiver.database import Lock


class ErasureRequest(msgspec.Struct, frozen=True):
    """The requested targets: ids, and variables with values."""

    session_ids: Sequence[str]
    chat_ids: Sequence[str]
    variables: Sequence[tuple[str, str]]


class Run:
    """One erasure, from the preview to the report."""

    def __init__(
        self, engine: Engine, timing: Timing, *, yes: bool, dry_run: bool, skip_held: bool, as_json: bool
    ) -> None:
        self._engine, self._timing = engine, timing
        self._yes, self._dry_run, self._skip_held, self._as_json = yes, dry_run, skip_held, as_json

    def erase(self, request: ErasureRequest, who: str, reason: str) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            matches = _find(opened, request)
            preview = self._preview(opened, matches, request.variables)
            unclaimed = targets.select_unclaimed(opened, preview.targets)
            unknown = targets.select_unknown(opened, matches)
            names = sorted({name for name, _ in request.variables})
            unknown_variables = [name for name in names if not targets.has_variable(opened, name)]
        # Of a variable its name, never its value.
        detail = {
            "sessions": len({each.session_id for each in preview.targets if not each.chat_id}),
            "chats": len({each.chat_id for each in preview.targets if each.chat_id}),
            "where": names,
            "skip_held": self._skip_held,
            "found": msgspec.structs.asdict(preview.counts),
        }
        entry = AuditEntry("erase", who, reason, detail)
        if preview.held and not self._skip_held:
            self._refuse(preview.held, lambda: erasure.check(self._engine, matches, "request", entry))
        messages.warn_of_unknown(unknown, unknown_variables)
        messages.warn_of_unclaimed_words(unclaimed)
        messages.warn_of_held_quarantine(preview.quarantine_rows_held)
        messages.warn_of_unsearchable(preview.counts.unsearchable)
        messages.warn_of_repeated_content(preview.repeating)
        if self._dry_run:
            self._report(preview.counts, preview.held, None, preview.repeating)
            return
        self._ask(preview)
        ordered = erasure.order(
            self._engine, matches, "request", entry, skip_held=self._skip_held, matches=preview.rows
        )
        # Also deliveries that arrived in between.
        with database.transaction(self._engine, statement_seconds=600) as opened:
            counts = preview.counts if ordered.held == preview.held else targets.count(opened, ordered.targets)
            before = preview.rows if ordered.held == preview.held else QuarantineMatches()
            deletable = [each for each in matches if each not in ordered.held]
            rows = before.with_later(select_matches(opened, deletable, request.variables, before.searched))
        with database.transaction(self._engine, statement_seconds=600) as opened:
            Lock.RECORDING.take(opened, exclusive=False)
            counts.quarantined = ordered.quarantined + delete_matches(opened, rows)
            counts.unsearchable = len(rows.unsearchable)
        self._finish(counts, [ordered], SearchedRows({*deletable, *ordered.targets}, rows.searched))

    def replay(self, lines: Sequence[replay.ListedErasure], entry: AuditEntry) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            new = [line.target for line in replay.select_new(opened, lines)]
            preview = self._preview(opened, new)
        entry = msgspec.structs.replace(entry, detail={"lines": len(lines), "new": len(new)})
        if preview.held and not self._skip_held:
            self._refuse(preview.held, lambda: replay.check(self._engine, lines, entry))
        messages.warn_of_held_quarantine(preview.quarantine_rows_held)
        messages.warn_of_unsearchable(preview.counts.unsearchable)
        messages.warn_of_repeated_content(preview.repeating)
        if self._dry_run:
            self._report(preview.counts, preview.held, None, preview.repeating)
            return
        if new:
            self._ask(preview)
        done = replay.replay(self._engine, lines, entry, skip_held=self._skip_held)
        counts = preview.counts
        if {target for each in done for target in each.held} != preview.held.keys():
            with database.transaction(self._engine, statement_seconds=600) as opened:
                counts = targets.count(opened, [target for each in done for target in each.targets])
        counts.quarantined = sum(each.quarantined for each in done)
        self._finish(counts, done)

    def _preview(
        self, opened: Connection, matches: Sequence[Target], variables: Sequence[tuple[str, str]] = ()
    ) -> "_Preview":
        whole = targets.with_unassigned(opened, matches)
        held = erasure.covering(opened, whole)
        deletable = [each for each in whole if each not in held]
        selected = [each for each in matches if each not in held]
        rows = select_matches(opened, selected, variables)
        counts = targets.count(opened, deletable)
        counts.quarantined, counts.unsearchable = len(select_deletable(opened, rows)), len(rows.unsearchable)
        return _Preview(selected, deletable, held, counts, rows, select_repeating_turns(opened, deletable))

    def _refuse(self, held: Mapping[Target, Sequence[int]], check: Callable[[], None]) -> None:
        """Refuse as the erasure would, before asking for confirmation."""
        if self._dry_run:
            raise HeldError(held)
        check()

    def _ask(self, preview: "_Preview") -> None:
        if not preview.counts.events and not preview.counts.turns and not preview.held:
            click.echo("archiver: no matching content is archived, or it is already erased", err=True)
        selected = f"{len(preview.targets):,} named: {messages.describe_counts(preview.counts)}"
        connection.confirm(f"Erase for good ({selected})?", yes=self._yes)

    def _finish(self, counts: Counts, done: Sequence[Ordered], searched: SearchedRows = NONE_SEARCHED) -> None:
        ordered = {target for each in done for target in each.targets}
        held: dict[Target, Sequence[int]] = {}  # since it was ordered
        repeating: set[Target] = set()
        with progress(SpinnerColumn(), TextColumn("Erasing: {task.completed:,} events"), quiet=self._as_json) as bar:
            task = bar.add_task("", total=None)
            # From the first one on: what an erasure that was stopped has left goes too.
            for step in erasure.sweep(self._engine, self._timing, searched=searched):
                counts.quarantined += step.quarantined
                repeating |= {*step.repeating}
                held |= {target: holds for target, holds in step.held.items() if target in ordered}
                bar.update(task, advance=step.events)
        if held:
            with database.transaction(self._engine, statement_seconds=600) as opened:
                counts = counts.without(targets.count(opened, sorted(held)))
        held = {target: holds for each in done for target, holds in each.held.items()} | held
        act_id = next((each.act_id for each in done if each.act_id is not None), None)
        self._report(counts, held, act_id, sorted(repeating))

    def _report(
        self, counts: Counts, held: Mapping[Target, Sequence[int]], act_id: int | None, repeating: Sequence[Target]
    ) -> None:
        if self._as_json:
            report: dict[str, Any] = {"dry_run": self._dry_run, "act": act_id, **msgspec.structs.asdict(counts)}
            report["held"] = [msgspec.structs.asdict(target) | {"holds": holds} for target, holds in held.items()]
            if repeating:
                report["resent"] = {
                    "count": len(repeating),
                    "turns": [msgspec.structs.asdict(each) for each in repeating],
                }
            click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
        else:
            click.echo(f"{'It would erase' if self._dry_run else 'Erased'} {messages.describe_counts(counts)}.")
        if held:
            messages.print_held(held)


class _Preview(msgspec.Struct, frozen=True):
    """The preview of an erasure: which targets are free of holds, and which quarantine rows match.

    `selected`: those of the free ones that were asked for; the others are facts of theirs without a session.
    """

    targets: Sequence[Target]
    deletable: Sequence[Target]
    held: Mapping[Target, Sequence[int]]
    counts: Counts
    rows: QuarantineMatches
    repeating: Sequence[Target]

    @property
    def quarantine_rows_held(self) -> int:
        """Return the number of matching quarantine rows that a hold keeps."""
        return len({*self.rows.by_id, *self.rows.by_variable}) - self.counts.quarantined


def _find(opened: Connection, request: ErasureRequest) -> list[Target]:
    matches = {Target(each) for each in request.session_ids}
    if request.chat_ids:
        matches |= targets.of_chats(opened, request.chat_ids)
    for name, value in request.variables:
        matches |= targets.of_variable(opened, name, value)
    return sorted(matches)
