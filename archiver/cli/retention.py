"""`archiver retention`: what the settings let expire, now."""

from collections.abc import Mapping
from datetime import UTC, datetime

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn
from rich.table import Table
from sqlalchemy import Engine

from archiver import acts, erasure, settings
from archiver.cli import connection
from archiver.cli.output import console, counted, progress
from archiver.erasure.retention import Due, Rules, examine, expire
from archiver.projection import Timing
from archiver.worker import timing_of


@click.command("retention")
@click.option("--dry-run", is_flag=True, help="Show what would expire; write nothing.")
@connection.yes_option
@connection.actor_option
@connection.json_option
def command(*, dry_run: bool, yes: bool, actor: str | None, as_json: bool) -> None:
    """Let expire what is older than ARCHIVER_RETENTION_DAYS and its like say. A worker does so daily by itself."""
    configuration = settings.read()
    rules = Rules.of(configuration)
    if rules.is_content_for_ever and not rules.metadata:
        raise settings.SettingsError(
            "Nothing ever expires: set ARCHIVER_RETENTION_DAYS.\nThis command reads the environment that it is called"
            " in, not the one of `serve` or `worker`: `archiver audit --kind settings.changed` tells what those have."
        )
    now = datetime.now(UTC)
    with connection.ready(configuration) as engine:
        due = examine(engine, rules, now)
        if not dry_run and not due.is_nothing:
            connection.confirm(f"Let expire for good ({_told(due)})?", yes=yes)
            who = actor or acts.actor()
            _expire(engine, rules, now, timing=timing_of(configuration), due=due, who=who, quiet=as_json)
    if as_json:
        told = {"dry_run": dry_run} | msgspec.structs.asdict(due)
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2))
        return
    if due.content:
        console().print(_table(due.content))
    click.echo(f"{'Would expire' if dry_run else 'Expired'}: {_told(due)}.")


def _expire(engine: Engine, rules: Rules, now: datetime, *, timing: Timing, due: Due, who: str, quiet: bool) -> None:
    columns = (SpinnerColumn(), TextColumn("Expiring: {task.completed:,} rows and sessions"))
    with progress(*columns, quiet=quiet) as bar:
        task = bar.add_task("", total=None)
        for step in expire(engine, rules, now, timing=timing, due=due, who=who):
            bar.update(task, advance=step.sessions + step.removed + step.quarantined)
        for swept in erasure.sweep(engine, timing):
            bar.update(task, advance=swept.events)


def _told(due: Due) -> str:
    return (
        f"content of {counted(due.content.total(), 'session')}, what was left of {due.metadata.total():,} erased"
        f" before, {due.quarantined:,} quarantined; {due.held:,} held"
    )


def _table(counts: Mapping[str, int]) -> Table:
    table = Table("assistant", "sessions")
    for name, number in sorted(counts.items()):
        table.add_row(name, f"{number:,}")
    return table
