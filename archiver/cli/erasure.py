"""`archiver erase`: what must go goes, everywhere, and stays away."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from sqlalchemy import Connection, Engine

from archiver import acts, database, erasure, ledger, schema, settings, spool
from archiver.cli import connection
from archiver.erasure import Act, Counts, HeldError, Ordered, Target, replay, targets
from archiver.erasure.quarantined import Found, delete_found, select_found, select_free
from archiver.projection import Timing
from archiver.worker import timing_of

PAGE = 500
SHOWN = 20  # held ones


class Wanted(msgspec.Struct, frozen=True):
    """What is asked for: ids, and variables with their values."""

    session_ids: Sequence[str]
    chat_ids: Sequence[str]
    variables: Sequence[tuple[str, str]]


@click.command("erase")
@click.option("--session", "session_ids", multiple=True, metavar="ID", help="A whole session; may be repeated.")
@click.option("--chat", "chat_ids", multiple=True, metavar="ID", help="One turn; may be repeated.")
@click.option(
    "--where",
    "wheres",
    multiple=True,
    metavar="VARIABLE=VALUE",
    help="The sessions in which this variable has this value; may be repeated.",
)
@click.option("--reason", help="Why, for the record: never what is erased.")
@click.option("--dry-run", is_flag=True, help="Show what would be erased; write nothing.")
@connection.yes_option
@click.option("--skip-held", is_flag=True, help="Pass over what a legal hold covers, and erase the rest.")
@connection.actor_option
@click.option("--list", "should_list", is_flag=True, help="Print what was erased, as JSON lines without content.")
@click.option("--replay", "file", type=click.File("rb"), help="Erase again what such a list names; - is stdin.")
@connection.json_option
def command(
    *,
    session_ids: tuple[str, ...],
    chat_ids: tuple[str, ...],
    wheres: tuple[str, ...],
    reason: str | None,
    dry_run: bool,
    yes: bool,
    skip_held: bool,
    actor: str | None,
    should_list: bool,
    file: BinaryIO | None,
    as_json: bool,
) -> None:
    """Erase sessions and turns for good: from ledger, archive and quarantine, and from whatever comes later.

    Stopped half-way, the same command goes on; so does any worker. Exit 1 where a legal hold forbids it, which is
    recorded.
    """
    variables = [connection.name_and_value(each, "--where") for each in wheres]
    wanted = Wanted(session_ids, chat_ids, variables)
    _check(wanted, reason, should_list=should_list, is_replayed=file is not None)
    configuration = settings.read()
    with connection.engine(configuration, create=False) as engine:
        with database.transaction(engine) as opened:
            schema.check(opened)
        if should_list:
            _list(engine)
            return
        run = _Run(engine, timing_of(configuration), yes=yes, dry_run=dry_run, skip_held=skip_held, as_json=as_json)
        try:
            if file is not None:
                run.replay(replay.parse(file), Act("erase.replay", actor or acts.actor(), reason))
            else:
                run.erase(wanted, actor or acts.actor(), str(reason))
            _warn_of_spool(configuration.home / spool.SPOOL_FOLDER)
        except replay.ReplayError as error:
            raise click.UsageError(str(error)) from None
        except HeldError as error:
            _tell_held(error.held)
            click.echo(
                "archiver: nothing was erased; release the hold, or say --skip-held to erase the rest", err=True
            )
            sys.exit(1)


def _check(wanted: Wanted, reason: str | None, *, should_list: bool, is_replayed: bool) -> None:
    connection.check_ids(wanted.session_ids, "session")
    connection.check_ids(wanted.chat_ids, "chat")
    is_named = any(msgspec.structs.astuple(wanted))
    if should_list + is_replayed + is_named != 1:
        raise click.UsageError("Say what to erase: --session, --chat or --where; or else --list, or --replay.")
    if is_named and not (reason or "").strip():
        raise click.UsageError("Say why, for the record: --reason TEXT.")


def _list(engine: Engine) -> None:
    after = 0
    while True:
        with database.transaction(engine) as opened:
            page = targets.select_erasures(opened, after, PAGE)
        for row in page:
            click.echo(msgspec.json.encode({name: value for name, value in row.items() if name != "id"}).decode())
        if len(page) < PAGE:
            return
        after = page[-1]["id"]


class _Run:
    """One erasure, from the question to the report."""

    def __init__(
        self, engine: Engine, timing: Timing, *, yes: bool, dry_run: bool, skip_held: bool, as_json: bool
    ) -> None:
        self._engine, self._timing = engine, timing
        self._yes, self._dry_run, self._skip_held, self._as_json = yes, dry_run, skip_held, as_json

    def erase(self, wanted: Wanted, who: str, reason: str) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            found = _find(opened, wanted)
            counts = targets.count(opened, targets.with_strays(opened, found))
            held = erasure.covering(opened, found)
            rows = select_found(opened, [each for each in found if each not in held], wanted.variables)
            counts.quarantined = len(select_free(opened, rows))
            unclaimed = targets.select_unclaimed(opened, found)
        _warn_of(unclaimed)
        _warn_of_kept(len({*rows.naming, *rows.telling}) - counts.quarantined)
        if self._dry_run:
            self._report(counts, held, None)
            return
        self._ask(found, counts)
        # Of a variable its name, never its value.
        detail = {
            "sessions": len({each.session_id for each in found if not each.chat_id}),
            "chats": len({each.chat_id for each in found if each.chat_id}),
            "where": sorted({name for name, _ in wanted.variables}),
            "skip_held": self._skip_held,
            "found": msgspec.structs.asdict(counts),
        }
        act = Act("erase", who, reason, detail)
        ordered = erasure.order(self._engine, found, "request", act, skip_held=self._skip_held, found=rows)
        # And what came meanwhile.
        with database.transaction(self._engine, statement_seconds=600) as opened:
            rows = select_found(opened, [each for each in found if each not in ordered.held], wanted.variables)
        with database.transaction(self._engine, statement_seconds=600) as opened:
            ledger.lock_placement(opened, exclusive=False)
            counts.quarantined = ordered.quarantined + delete_found(opened, rows)
        self._finish(counts, [ordered])

    def replay(self, lines: Sequence[replay.Line], act: Act) -> None:
        with database.transaction(self._engine, statement_seconds=600) as opened:
            new = [line.target for line in replay.select_new(opened, lines)]
            counts = targets.count(opened, targets.with_strays(opened, new))
            held = erasure.covering(opened, new)
            rows = select_found(opened, [each for each in new if each not in held]) if new else Found()
            counts.quarantined = len(select_free(opened, rows))
        _warn_of_kept(len(rows.naming) - counts.quarantined)
        if self._dry_run:
            self._report(counts, held, None)
            return
        if new:
            self._ask(new, counts)
        detail = {"lines": len(lines), "new": len(new)}
        done = replay.replay(
            self._engine, lines, msgspec.structs.replace(act, detail=detail), skip_held=self._skip_held
        )
        counts.quarantined = sum(each.quarantined for each in done)
        self._finish(counts, done)

    def _ask(self, found: Sequence[Target], counts: Counts) -> None:
        if not counts.events and not counts.turns:
            click.echo("archiver: nothing of it is archived, or it was erased before", err=True)
        named = f"{len(found):,} named: {_told(counts)}"
        connection.confirm(f"Erase for good ({named})?", yes=self._yes)

    def _finish(self, counts: Counts, done: Sequence[Ordered]) -> None:
        held = {target: holds for each in done for target, holds in each.held.items()}
        ordered = {target for each in done for target in each.targets}
        columns = (SpinnerColumn(), TextColumn("Erasing: {task.completed:,} events"))
        with Progress(*columns, console=Console(stderr=True), disable=self._as_json) as progress:
            task = progress.add_task("", total=None)
            # From the first one on: what an erasure that was stopped has left goes too.
            for step in erasure.sweep(self._engine, self._timing):
                counts.quarantined += step.quarantined
                held |= {target: holds for target, holds in step.held.items() if target in ordered}
                progress.update(task, advance=step.events)
        self._report(counts, held, next((each.act_id for each in done if each.act_id is not None), None))

    def _report(self, counts: Counts, held: Mapping[Target, Sequence[int]], act_id: int | None) -> None:
        if self._as_json:
            told: dict[str, Any] = {"dry_run": self._dry_run, "act": act_id, **msgspec.structs.asdict(counts)}
            told["held"] = [msgspec.structs.asdict(target) | {"holds": holds} for target, holds in held.items()]
            click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2))
        else:
            click.echo(f"{'It would erase' if self._dry_run else 'Erased'} {_told(counts)}.")
        if held:
            _tell_held(held)


def _find(opened: Connection, wanted: Wanted) -> list[Target]:
    found = {Target(each) for each in wanted.session_ids}
    if wanted.chat_ids:
        found |= targets.of_chats(opened, wanted.chat_ids)
    for name, value in wanted.variables:
        found |= targets.of_variable(opened, name, value)
    return sorted(found)


def _warn_of(unclaimed: Sequence[str]) -> None:
    for session_id in unclaimed[:SHOWN]:
        click.echo(
            f"archiver: no webhook told what a turn named here said, and session {session_id} holds words of history"
            " that no turn claims: they may be its words, and stay; erase the whole session to be sure",
            err=True,
        )
    if len(unclaimed) > SHOWN:
        click.echo(f"archiver: and {len(unclaimed) - SHOWN:,} more sessions", err=True)


def _warn_of_kept(kept: int) -> None:
    if kept:
        click.echo(
            f"archiver: {kept:,} rows of the quarantine stay, for they may be about what a legal hold covers: erase"
            " again once it is released",
            err=True,
        )


def _warn_of_spool(folder: Path) -> None:
    try:
        waiting = spool.select_depth(folder).events
    except spool.SpoolError as error:
        click.echo(f"archiver: what waits on the spool is not known: {error}", err=True)
    else:
        if waiting:
            click.echo(
                f"archiver: {waiting:,} deliveries wait on the spool in {folder}: those of what was erased stay there"
                " until serve has drained it, and are refused then",
                err=True,
            )
    for each in spool.set_aside_files(folder):
        click.echo(
            f"archiver: {each} is damaged and may hold what was erased: look at it, then remove it by hand", err=True
        )


def _told(counts: Counts) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in msgspec.structs.asdict(counts).items())


def _tell_held(held: Mapping[Target, Sequence[int]]) -> None:
    for target, holds in list(held.items())[:SHOWN]:
        turn = f" chat {target.chat_id}" if target.chat_id else ""
        numbers = ", ".join(str(each) for each in holds)
        session = f"session {target.session_id}" if target.session_id else "without a session,"
        click.echo(f"archiver: {session}{turn} is under legal hold {numbers}; see archiver hold list", err=True)
    if len(held) > SHOWN:
        click.echo(f"archiver: and {len(held) - SHOWN:,} more", err=True)
