"""One erasure: what it is about, whether it may be, the order, and the report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn
from sqlalchemy import Connection, Engine

from archiver import database, erasure, ledger
from archiver.cli import connection
from archiver.cli.erasure import telling
from archiver.cli.output import progress
from archiver.erasure import Act, Counts, HeldError, Ordered, Target, replay, targets
from archiver.erasure.quarantined import Found, delete_found, select_found, select_free
from archiver.erasure.resent import select_resent
from archiver.erasure.sweeping import NOTHING_SEARCHED, Searched
from archiver.projection import Timing


class Wanted(msgspec.Struct, frozen=True):
    """What is asked for: ids, and variables with their values."""

    session_ids: Sequence[str]
    chat_ids: Sequence[str]
    variables: Sequence[tuple[str, str]]


class Run:
    """One erasure, from the question to the report."""

    def __init__(
        self, engine: Engine, timing: Timing, *, yes: bool, dry_run: bool, skip_held: bool, as_json: bool
    ) -> None:
        self._engine, self._timing = engine, timing
        self._yes, self._dry_run, self._skip_held, self._as_json = yes, dry_run, skip_held, as_json

    def erase(self, wanted: Wanted, who: str, reason: str) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            found = _find(opened, wanted)
            looked = self._look(opened, found, wanted.variables)
            unclaimed = targets.select_unclaimed(opened, looked.named)
            unknown = targets.select_unknown(opened, found)
            names = sorted({name for name, _ in wanted.variables})
            unheard = [name for name in names if not targets.has_variable(opened, name)]
        # Of a variable its name, never its value.
        detail = {
            "sessions": len({each.session_id for each in looked.named if not each.chat_id}),
            "chats": len({each.chat_id for each in looked.named if each.chat_id}),
            "where": names,
            "skip_held": self._skip_held,
            "found": msgspec.structs.asdict(looked.counts),
        }
        act = Act("erase", who, reason, detail)
        if looked.held and not self._skip_held:
            self._refuse(looked.held, lambda: erasure.check(self._engine, found, "request", act))
        telling.warn_of_unknown(unknown, unheard)
        telling.warn_of(unclaimed)
        telling.warn_of_kept(looked.kept)
        telling.warn_of_unsearchable(looked.counts.unsearchable)
        telling.warn_of_resent(looked.resent)
        if self._dry_run:
            self._report(looked.counts, looked.held, None, looked.resent)
            return
        self._ask(looked)
        ordered = erasure.order(self._engine, found, "request", act, skip_held=self._skip_held, found=looked.rows)
        # And what came meanwhile.
        with database.transaction(self._engine, statement_seconds=600) as opened:
            counts = looked.counts if ordered.held == looked.held else targets.count(opened, ordered.targets)
            before = looked.rows if ordered.held == looked.held else Found()
            free = [each for each in found if each not in ordered.held]
            rows = before.with_later(select_found(opened, free, wanted.variables, before.searched))
        with database.transaction(self._engine, statement_seconds=600) as opened:
            ledger.lock_placement(opened, exclusive=False)
            counts.quarantined = ordered.quarantined + delete_found(opened, rows)
            counts.unsearchable = len(rows.unsearchable)
        self._finish(counts, [ordered], Searched({*free, *ordered.targets}, rows.searched))

    def replay(self, lines: Sequence[replay.Line], act: Act) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            new = [line.target for line in replay.select_new(opened, lines)]
            looked = self._look(opened, new)
        act = msgspec.structs.replace(act, detail={"lines": len(lines), "new": len(new)})
        if looked.held and not self._skip_held:
            self._refuse(looked.held, lambda: replay.check(self._engine, lines, act))
        telling.warn_of_kept(looked.kept)
        telling.warn_of_unsearchable(looked.counts.unsearchable)
        telling.warn_of_resent(looked.resent)
        if self._dry_run:
            self._report(looked.counts, looked.held, None, looked.resent)
            return
        if new:
            self._ask(looked)
        done = replay.replay(self._engine, lines, act, skip_held=self._skip_held)
        counts = looked.counts
        if {target for each in done for target in each.held} != looked.held.keys():
            with database.transaction(self._engine, statement_seconds=600) as opened:
                counts = targets.count(opened, [target for each in done for target in each.targets])
        counts.quarantined = sum(each.quarantined for each in done)
        self._finish(counts, done)

    def _look(
        self, opened: Connection, found: Sequence[Target], variables: Sequence[tuple[str, str]] = ()
    ) -> "_Looked":
        whole = targets.with_strays(opened, found)
        held = erasure.covering(opened, whole)
        free = [each for each in whole if each not in held]
        named = [each for each in found if each not in held]
        rows = select_found(opened, named, variables)
        counts = targets.count(opened, free)
        counts.quarantined, counts.unsearchable = len(select_free(opened, rows)), len(rows.unsearchable)
        return _Looked(named, free, held, counts, rows, select_resent(opened, free))

    def _refuse(self, held: Mapping[Target, Sequence[int]], check: Callable[[], None]) -> None:
        """As the erasure would be refused, before anybody is asked."""
        if self._dry_run:
            raise HeldError(held)
        check()

    def _ask(self, looked: "_Looked") -> None:
        if not looked.counts.events and not looked.counts.turns and not looked.held:
            click.echo("archiver: nothing of it is archived, or it was erased before", err=True)
        named = f"{len(looked.named):,} named: {telling.told(looked.counts)}"
        connection.confirm(f"Erase for good ({named})?", yes=self._yes)

    def _finish(self, counts: Counts, done: Sequence[Ordered], searched: Searched = NOTHING_SEARCHED) -> None:
        ordered = {target for each in done for target in each.targets}
        held: dict[Target, Sequence[int]] = {}  # since it was ordered
        resent: set[Target] = set()
        with progress(SpinnerColumn(), TextColumn("Erasing: {task.completed:,} events"), quiet=self._as_json) as bar:
            task = bar.add_task("", total=None)
            # From the first one on: what an erasure that was stopped has left goes too.
            for step in erasure.sweep(self._engine, self._timing, searched=searched):
                counts.quarantined += step.quarantined
                resent |= {*step.resent}
                held |= {target: holds for target, holds in step.held.items() if target in ordered}
                bar.update(task, advance=step.events)
        if held:
            with database.transaction(self._engine, statement_seconds=600) as opened:
                counts = counts.without(targets.count(opened, sorted(held)))
        held = {target: holds for each in done for target, holds in each.held.items()} | held
        act_id = next((each.act_id for each in done if each.act_id is not None), None)
        self._report(counts, held, act_id, sorted(resent))

    def _report(
        self, counts: Counts, held: Mapping[Target, Sequence[int]], act_id: int | None, resent: Sequence[Target]
    ) -> None:
        if self._as_json:
            told: dict[str, Any] = {"dry_run": self._dry_run, "act": act_id, **msgspec.structs.asdict(counts)}
            told["held"] = [msgspec.structs.asdict(target) | {"holds": holds} for target, holds in held.items()]
            if resent:
                told["resent"] = {"count": len(resent), "turns": [msgspec.structs.asdict(each) for each in resent]}
            click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2))
        else:
            click.echo(f"{'It would erase' if self._dry_run else 'Erased'} {telling.told(counts)}.")
        if held:
            telling.tell_held(held)


class _Looked(msgspec.Struct, frozen=True):
    """What is found before anything is done: what of it is free to go, and which rows of the quarantine.

    `named`: those of the free ones that were asked for; the others are facts of theirs without a session.
    """

    named: Sequence[Target]
    free: Sequence[Target]
    held: Mapping[Target, Sequence[int]]
    counts: Counts
    rows: Found
    resent: Sequence[Target]

    @property
    def kept(self) -> int:
        """Rows of the quarantine that stay."""
        return len({*self.rows.naming, *self.rows.telling}) - self.counts.quarantined


def _find(opened: Connection, wanted: Wanted) -> list[Target]:
    found = {Target(each) for each in wanted.session_ids}
    if wanted.chat_ids:
        found |= targets.of_chats(opened, wanted.chat_ids)
    for name, value in wanted.variables:
        found |= targets.of_variable(opened, name, value)
    return sorted(found)
