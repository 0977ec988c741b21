"""`archiver erase`: erase content everywhere and refuse later deliveries of it."""

import sys
from typing import BinaryIO

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn
from sqlalchemy import Engine

from archiver import database, settings
from archiver.archive import Timing
from archiver.cli import complain, connection, options
from archiver.cli.erasure import messages
from archiver.cli.output import progress
from archiver.compliance.erasure import HeldError, replay, requests, targets
from archiver.compliance.erasure.requests import Preview, Report, Selection
from archiver.inbound import spool
from archiver.ledger import audit_log

PAGE = 500


@click.command("erase")
@click.option("--session", "session_ids", multiple=True, metavar="ID", help="A whole session; may be repeated.")
@click.option("--chat", "chat_ids", multiple=True, metavar="ID", help="One turn (chat id); may be repeated.")
@click.option(
    "--where",
    "wheres",
    multiple=True,
    metavar="VARIABLE=VALUE",
    help="All sessions with this variable value; may be repeated.",
)
@click.option(
    "--reason", type=options.Audited(), help="Reason for the audit log; must not contain the erased content."
)
@click.option("--dry-run", is_flag=True, help="Show what would be erased; write nothing.")
@options.yes_option
@click.option("--skip-held", is_flag=True, help="Skip content under a legal hold, and erase the rest.")
@options.actor_option
@click.option("--list", "should_list", is_flag=True, help="Print all erasures as JSON lines, without content.")
@click.option("--replay", "file", type=click.File("rb"), help="Reapply a list printed by --list; - reads stdin.")
@options.json_option
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
    """Erase sessions and turns permanently from ledger, archive and quarantine, and refuse later deliveries.

    If the command is interrupted, run it again to continue; a worker also continues. Exit 1 if a legal hold forbids
    the erasure; the audit log records the refusal.
    """
    variables = [options.name_and_value(each, "--where") for each in wheres]
    selection = Selection(session_ids, chat_ids, variables)
    _check(selection, reason, should_list=should_list, is_replayed=file is not None)
    configuration = settings.read()
    with connection.ready(configuration) as engine:
        if should_list:
            _list(engine)
            return
        who = actor or audit_log.actor()
        try:
            if file is None:
                preview = requests.preview(engine, selection, who, reason, skip_held=skip_held)
            else:
                preview = requests.preview_replay(engine, replay.parse(file), who, reason, skip_held=skip_held)
            requests.refuse_held(engine, preview, dry_run=dry_run)  # before the confirmation
            messages.warn_of(preview)
            if dry_run:
                report = Report(None, preview.counts, preview.held, preview.repeating)
            else:
                if preview.by_rule:
                    _ask(preview, yes=yes)
                report = _erase(engine, preview, Timing.of(configuration), quiet=as_json)
        except replay.ReplayError as error:
            raise click.UsageError(str(error)) from None
        except HeldError as error:
            messages.print_held(error.held)
            messages.print_refusal(error.ordered, dry_run=dry_run)
            sys.exit(1)
        messages.print_report(report, dry_run=dry_run, as_json=as_json)
        messages.warn_of_spool(configuration.home / spool.SPOOL_FOLDER)


def _check(selection: Selection, reason: str | None, *, should_list: bool, is_replayed: bool) -> None:
    options.check_ids(selection.session_ids, "session")
    options.check_ids(selection.chat_ids, "chat")
    is_named = any(msgspec.structs.astuple(selection))
    if should_list + is_replayed + is_named != 1:
        raise click.UsageError("specify what to erase: --session, --chat or --where (or use --list or --replay)")
    if is_named and not (reason or "").strip():
        raise click.UsageError("--reason TEXT is required for the audit log")


def _ask(preview: Preview, *, yes: bool) -> None:
    if not preview.counts.events and not preview.counts.turns and not preview.held:
        complain("no matching content is archived, or it is already erased")
    selected = f"{len(preview.selected):,} selected: {messages.describe_counts(preview.counts)}"
    options.confirm(f"Erase permanently ({selected})?", yes=yes)


def _erase(engine: Engine, preview: Preview, timing: Timing, *, quiet: bool) -> Report:
    ordered = requests.order(engine, preview)
    with progress(SpinnerColumn(), TextColumn("Erasing: {task.completed:,} events"), quiet=quiet) as bar:
        task = bar.add_task("", total=None)
        return requests.purge(engine, ordered, timing, lambda step: bar.update(task, advance=step.events))


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
