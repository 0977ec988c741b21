"""`archiver retention`: expire content now, according to the settings."""

from collections.abc import Mapping
from datetime import datetime

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn
from sqlalchemy import Engine

from archiver import database, settings
from archiver.archive import Timing
from archiver.cli import connection, options
from archiver.cli.output import Table, console, counted, print_json, progress
from archiver.compliance import erasure
from archiver.compliance.erasure.clocks import destruction_time
from archiver.compliance.erasure.retention import Due, Rules, expire, preview
from archiver.ledger import audit_log


@click.command("retention")
@click.option("--dry-run", is_flag=True, help="Show what would expire; write nothing.")
@options.yes_option
@options.actor_option
@options.json_option
def command(*, dry_run: bool, yes: bool, actor: str | None, as_json: bool) -> None:
    """Expire content older than the retention settings allow. A worker does so daily."""
    configuration = settings.read()
    rules = Rules.of(configuration)
    if rules.keeps_content_forever and not rules.metadata:
        raise settings.SettingsError(
            "content never expires: set ARCHIVER_RETENTION_DAYS.\nThis command reads its own environment, not that of"
            " `serve` or `worker`; `archiver audit --kind settings.changed` shows theirs."
        )
    swept = 0
    with connection.ready(configuration) as engine:
        with database.transaction(engine) as opened:
            now = destruction_time(opened, configuration.home)
        due = preview(engine, rules, now)
        if not dry_run:
            if not due.is_empty:
                options.confirm(f"Erase permanently ({_due_text(due)})?", yes=yes)
            # Also completes the expiry that a killed run ordered, even if nothing else has expired.
            who = actor or audit_log.actor()
            swept = _expire(engine, rules, now, timing=Timing.of(configuration), due=due, who=who, quiet=as_json)
    if as_json:
        output = {"dry_run": dry_run, "events": swept} | msgspec.structs.asdict(due)
        print_json(output)
        return
    if due.content:
        console().print(_table(due.content))
    click.echo(f"{'Would expire' if dry_run else 'Expired'}: {_due_text(due)}.")
    if due.is_empty and swept:
        click.echo(f"Erased the content of {counted(swept, 'event')} whose expiry was ordered earlier.")


def _expire(engine: Engine, rules: Rules, now: datetime, *, timing: Timing, due: Due, who: str, quiet: bool) -> int:
    swept = 0
    columns = (SpinnerColumn(), TextColumn("Expiring: {task.completed:,} rows and sessions"))
    with progress(*columns, quiet=quiet) as bar:
        task = bar.add_task("", total=None)
        for step in expire(engine, rules, now, timing=timing, due=due, who=who):
            bar.update(task, advance=step.sessions + step.removed + step.quarantined)
        for taken in erasure.sweep(engine, timing):
            bar.update(task, advance=taken.events)
            swept += taken.events
    return swept


def _due_text(due: Due) -> str:
    return (
        f"content of {counted(due.content.total(), 'session')}, metadata of {due.metadata.total():,} erased"
        f" earlier, {due.quarantined:,} quarantined; {due.held:,} held"
    )


def _table(counts: Mapping[str, int]) -> Table:
    table = Table("assistant", "sessions")
    for name, number in sorted(counts.items()):
        table.add_row(name, f"{number:,}")
    return table
