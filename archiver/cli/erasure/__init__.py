"""`archiver erase`: what must go goes, everywhere, and stays away."""

import sys
from typing import BinaryIO

import click
import msgspec
from sqlalchemy import Engine

from archiver import acts, database, settings, spool
from archiver.cli import connection
from archiver.cli.erasure import telling
from archiver.cli.erasure.running import Run, Wanted
from archiver.erasure import Act, HeldError, replay, targets
from archiver.worker import timing_of

PAGE = 500


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
    with connection.ready(configuration) as engine:
        if should_list:
            _list(engine)
            return
        run = Run(engine, timing_of(configuration), yes=yes, dry_run=dry_run, skip_held=skip_held, as_json=as_json)
        try:
            if file is not None:
                run.replay(replay.parse(file), Act("erase.replay", actor or acts.actor(), reason))
            else:
                run.erase(wanted, actor or acts.actor(), str(reason))
            telling.warn_of_spool(configuration.home / spool.SPOOL_FOLDER)
        except replay.ReplayError as error:
            raise click.UsageError(str(error)) from None
        except HeldError as error:
            telling.tell_held(error.held)
            telling.tell_refusal(error.ordered, dry_run=dry_run)
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
