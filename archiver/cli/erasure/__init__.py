"""`archiver erase`: erase content everywhere and refuse later deliveries of it."""

import sys
from typing import BinaryIO

import click
import msgspec
from sqlalchemy import Engine

from archiver import database, settings
from archiver.archive import Timing
from archiver.cli import connection
from archiver.cli.erasure import messages
from archiver.cli.erasure.running import ErasureRequest, Run
from archiver.compliance.erasure import AuditEntry, HeldError, replay, targets
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
@click.option("--reason", help="Reason for the audit log; must not contain the erased content.")
@click.option("--dry-run", is_flag=True, help="Show what would be erased; write nothing.")
@connection.yes_option
@click.option("--skip-held", is_flag=True, help="Skip what a legal hold covers, and erase the rest.")
@connection.actor_option
@click.option("--list", "should_list", is_flag=True, help="Print all erasures as JSON lines, without content.")
@click.option("--replay", "file", type=click.File("rb"), help="Apply a list printed by --list again; - reads stdin.")
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
    """Erase sessions and turns permanently from ledger, archive and quarantine, and refuse later deliveries.

    Stopped half-way, the same command goes on; so does any worker. Exit 1 where a legal hold forbids it, which is
    recorded.
    """
    variables = [connection.name_and_value(each, "--where") for each in wheres]
    request = ErasureRequest(session_ids, chat_ids, variables)
    _check(request, reason, should_list=should_list, is_replayed=file is not None)
    configuration = settings.read()
    with connection.ready(configuration) as engine:
        if should_list:
            _list(engine)
            return
        run = Run(engine, Timing.of(configuration), yes=yes, dry_run=dry_run, skip_held=skip_held, as_json=as_json)
        try:
            if file is not None:
                run.replay(replay.parse(file), AuditEntry("erase.replay", actor or audit_log.actor(), reason))
            else:
                run.erase(request, actor or audit_log.actor(), str(reason))
            messages.warn_of_spool(configuration.home / spool.SPOOL_FOLDER)
        except replay.ReplayError as error:
            raise click.UsageError(str(error)) from None
        except HeldError as error:
            messages.print_held(error.held)
            messages.print_refusal(error.ordered, dry_run=dry_run)
            sys.exit(1)


def _check(request: ErasureRequest, reason: str | None, *, should_list: bool, is_replayed: bool) -> None:
    connection.check_ids(request.session_ids, "session")
    connection.check_ids(request.chat_ids, "chat")
    is_named = any(msgspec.structs.astuple(request))
    if should_list + is_replayed + is_named != 1:
        raise click.UsageError("Specify what to erase: --session, --chat or --where (or use --list or --replay).")
    if is_named and not (reason or "").strip():
        raise click.UsageError("--reason TEXT is required for the audit log.")


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
