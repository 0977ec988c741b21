"""Erasures on request: `preview`, then `order`, then `purge`. They neither prompt nor print.

Each step also finds the deliveries that arrived, and the holds that were placed, since the previous step.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import get_args

import msgspec
from sqlalchemy import Connection, Engine

from archiver.archive import Timing
from archiver.compliance.erasure import ordering, targets
from archiver.compliance.erasure.holds import covering
from archiver.compliance.erasure.ordering import AuditEntry, HeldError, Ordered, Rule
from archiver.compliance.erasure.quarantine_matches import (
    QuarantineMatches,
    delete_matches,
    select_deletable,
    select_matches,
)
from archiver.compliance.erasure.repeated_content import select_repeating_turns
from archiver.compliance.erasure.replay import ListedErasure, select_new
from archiver.compliance.erasure.sweeping import SearchedRows, Step, sweep
from archiver.compliance.erasure.targets import Counts, Target
from archiver.database import Lock, transaction

ByRule = Mapping[Rule, Mapping[Target, datetime | None]]

STATEMENT_SECONDS = 600  # the ledger and the quarantine are read from end to end


class Selection(msgspec.Struct, frozen=True):
    """The sessions and turns to erase, and variables with values, which select sessions and unassigned turns."""

    session_ids: Sequence[str] = ()
    chat_ids: Sequence[str] = ()
    variables: Sequence[tuple[str, str]] = ()


class Preview(msgspec.Struct, frozen=True):
    """The targets that an erasure would erase, and those that a hold keeps.

    `by_rule`: the selected targets by rule, each with the time of its erasure; None: now. `selected`: those of them
    that no hold covers. `rows`: the quarantine rows about them. `repeating`: other turns whose deliveries
    repeat their content. `unclaimed`: sessions with history messages that may belong to a selected turn. `replayed`:
    listed targets that were ordered before; an interrupted replay may have left quarantine rows about them.
    `unknown`, `unknown_variables`: not in the archive, so probably misspelt.
    """

    entry: AuditEntry
    by_rule: ByRule
    variables: Sequence[tuple[str, str]]
    skip_held: bool
    selected: Sequence[Target]
    held: Mapping[Target, Sequence[int]]
    counts: Counts
    rows: QuarantineMatches
    repeating: Sequence[Target]
    unclaimed: Sequence[str] = ()
    replayed: Sequence[Target] = ()
    unknown: Sequence[Target] = ()
    unknown_variables: Sequence[str] = ()

    @property
    def quarantine_rows_held(self) -> int:
        """Return the number of matching quarantine rows that a hold keeps."""
        return len({*self.rows.by_id, *self.rows.by_variable}) - self.counts.quarantined


class OrderedRequest(msgspec.Struct, frozen=True):
    """The targets ordered under each rule, the counts, and the quarantine rows searched for the targets."""

    parts: Sequence[Ordered]
    counts: Counts
    searched: SearchedRows


class Report(msgspec.Struct, frozen=True):
    """The result of an erasure. `act_id`: the audit entry; None if nothing was ordered."""

    act_id: int | None
    counts: Counts
    held: Mapping[Target, Sequence[int]]
    repeating: Sequence[Target]


def preview(
    engine: Engine, selection: Selection, actor: str, reason: str | None, *, skip_held: bool = False
) -> Preview:
    """Return what an erasure of the selection would erase. Writes nothing."""
    names = sorted({name for name, _ in selection.variables})
    with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
        named = _select_targets(connection, selection)
        entry = AuditEntry("erase", actor, reason)
        result = _preview(
            connection, entry, {"request": dict.fromkeys(named)}, selection.variables, skip_held=skip_held
        )
        result = msgspec.structs.replace(
            result,
            unclaimed=targets.select_unclaimed(connection, result.selected),
            unknown=targets.select_unknown(connection, named),
            unknown_variables=[name for name in names if not targets.has_variable(connection, name)],
        )
    # The name of a variable, never its value.
    detail = {
        "sessions": len({each.session_id for each in result.selected if not each.chat_id}),
        "chats": len({each.chat_id for each in result.selected if each.chat_id}),
        "where": names,
        "skip_held": skip_held,
        "found": msgspec.structs.asdict(result.counts),
    }
    return msgspec.structs.replace(result, entry=msgspec.structs.replace(entry, detail=detail))


def preview_replay(
    engine: Engine, lines: Sequence[ListedErasure], actor: str, reason: str | None, *, skip_held: bool = False
) -> Preview:
    """Return what the listed erasures that are new to this database would erase. Writes nothing."""
    with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
        new = select_new(connection, lines)
        rules: tuple[Rule, ...] = get_args(Rule)
        by_rule = {rule: {line.target: line.erased_at for line in new if line.rule == rule} for rule in rules}
        by_rule = {rule: times for rule, times in by_rule.items() if times}
        entry = AuditEntry("erase.replay", actor, reason, {"lines": len(lines), "new": len(new)})
        known = sorted({line.target for line in lines} - {line.target for line in new})
        return _preview(connection, entry, by_rule, (), skip_held=skip_held, replayed=known)


def _preview(
    connection: Connection,
    entry: AuditEntry,
    by_rule: ByRule,
    variables: Sequence[tuple[str, str]],
    *,
    skip_held: bool,
    replayed: Sequence[Target] = (),
) -> Preview:
    named = sorted({target for times in by_rule.values() for target in times})
    whole = targets.with_unassigned(connection, named)
    held = covering(connection, whole)
    deletable = [each for each in whole if each not in held]
    selected = [each for each in named if each not in held]
    rows = select_matches(connection, [*selected, *replayed], variables)
    counts = targets.count(connection, deletable)
    counts.quarantined, counts.unsearchable = len(select_deletable(connection, rows)), len(rows.unsearchable)
    repeating = select_repeating_turns(connection, deletable)
    return Preview(entry, by_rule, variables, skip_held, selected, held, counts, rows, repeating, replayed=replayed)


def _select_targets(connection: Connection, selection: Selection) -> list[Target]:
    named = {Target(each) for each in selection.session_ids}
    if selection.chat_ids:
        named |= targets.of_chats(connection, selection.chat_ids)
    for name, value in selection.variables:
        named |= targets.of_variable(connection, name, value)
    return sorted(named)


def refuse_held(engine: Engine, preview: Preview, *, dry_run: bool = False) -> None:
    """Raise `HeldError` if `order` would raise it. The error is recorded, unless `dry_run`."""
    if not preview.held or preview.skip_held:
        return
    if dry_run:
        raise HeldError(preview.held)
    _check(engine, preview)


def _check(engine: Engine, preview: Preview) -> None:
    for rule, times in preview.by_rule.items():
        ordering.check(engine, sorted(times), rule, preview.entry)


def order(engine: Engine, preview: Preview) -> OrderedRequest:
    """Order the erasure: deliveries of its targets are refused from now on, and the next sweep erases their content.

    Raises `HeldError`, which is recorded, if any target is held, unless `skip_held`.
    """
    has_several_rules = len(preview.by_rule) > 1
    if has_several_rules and not preview.skip_held:
        _check(engine, preview)  # before any of them is ordered
    parts: list[Ordered] = []
    for rule, times in preview.by_rule.items():
        matches = _search(engine, times) if has_several_rules else preview.rows
        erased_at = {target: at for target, at in times.items() if at is not None}
        try:
            parts.append(
                ordering.order(
                    engine,
                    list(times),
                    rule,
                    preview.entry,
                    skip_held=preview.skip_held,
                    erased_at=erased_at,
                    matches=matches,
                )
            )
        except HeldError as error:
            error.ordered += sum(len(each.targets) for each in parts)
            raise
    return _count_ordered(engine, preview, parts)


def _search(engine: Engine, times: Mapping[Target, datetime | None]) -> QuarantineMatches:
    with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
        return select_matches(connection, sorted(times.keys() - covering(connection, sorted(times)).keys()))


def _count_ordered(engine: Engine, preview: Preview, parts: Sequence[Ordered]) -> OrderedRequest:
    """Return the ordered request with its counts. Deletes matching rows quarantined since the preview."""
    ordered = [target for part in parts for target in part.targets]
    held = _held(parts)
    deletable = [target for times in preview.by_rule.values() for target in times if target not in held]
    is_as_previewed = held == preview.held
    before = preview.rows if is_as_previewed else QuarantineMatches()
    with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
        counts = preview.counts if is_as_previewed else targets.count(connection, ordered)
        searchable = [*deletable, *preview.replayed]
        rows = before.with_later(select_matches(connection, searchable, preview.variables, before.searched))
    with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
        Lock.RECORDING.take(connection, exclusive=False)
        quarantined = sum(part.quarantined for part in parts) + delete_matches(connection, rows)
    counts = msgspec.structs.replace(counts, quarantined=quarantined, unsearchable=len(rows.unsearchable))
    return OrderedRequest(parts, counts, SearchedRows({*deletable, *ordered}, rows.searched))


def purge(engine: Engine, request: OrderedRequest, timing: Timing, on_step: Callable[[Step], None]) -> Report:
    """Erase the ordered content, and the content that interrupted erasures left. `on_step` is called after each step.

    Raises a database error if a target is locked or takes too long; the others are erased, and a worker retries it.
    """
    ordered = {target for part in request.parts for target in part.targets}
    quarantined = request.counts.quarantined
    held: dict[Target, Sequence[int]] = {}  # by holds placed since the order
    repeating: set[Target] = set()
    for step in sweep(engine, timing, searched=request.searched):
        quarantined += step.quarantined
        repeating |= {*step.repeating}
        held |= {target: holds for target, holds in step.held.items() if target in ordered}
        on_step(step)
    counts = msgspec.structs.replace(request.counts, quarantined=quarantined)
    if held:
        with transaction(engine, statement_seconds=STATEMENT_SECONDS) as connection:
            counts = counts.without(targets.count(connection, sorted(held)))
    act_id = next((part.act_id for part in request.parts if part.act_id is not None), None)
    return Report(act_id, counts, _held(request.parts) | held, sorted(repeating))


def _held(parts: Sequence[Ordered]) -> dict[Target, Sequence[int]]:
    return {target: holds for part in parts for target, holds in part.held.items()}
