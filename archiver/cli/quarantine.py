"""`archiver quarantine`: see what could not be archived, and drive it again."""

import sys
from collections.abc import Iterator

import click
import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from archiver import database, schema, settings
from archiver import quarantine as store
from archiver.cli import connection
from archiver.ingest import Outcome, retry_quarantined

PAGE = 500
ID = click.IntRange(1, 2**63 - 1)


@click.group()
def quarantine() -> None:
    """Deliveries that were authentic but could not be archived."""


@quarantine.command("list")
@click.option("--reason", help="Only those with this reason.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@connection.json_option
def list_(reason: str | None, limit: int, as_json: bool) -> None:
    """List them, oldest first, without their content."""
    with connection.engine(settings.read()) as engine, database.transaction(engine) as opened:
        schema.check(opened)
        rows = [dict(row) for row in store.select_quarantine(opened, limit=limit, reason=reason)]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    if not rows:
        click.echo("Nothing is quarantined.")
        return
    table = Table("id", "received", "times", "bytes", "reason", "detail")
    for row in rows:
        received = f"{row['received_at']:%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(row["id"]),
            received,
            str(row["delivery_count"]),
            str(row["bytes"]),
            row["reason"],
            Text(row["detail"]),
        )
    Console().print(table)


@quarantine.command()
@click.argument("quarantine_id", metavar="ID", type=ID)
@click.option("--raw", is_flag=True, help="Write only the exact bytes, for a file or a pipe.")
def show(quarantine_id: int, raw: bool) -> None:
    """Show one with its body."""
    with connection.engine(settings.read()) as engine, database.transaction(engine) as opened:
        schema.check(opened)
        row = store.select_quarantined(opened, quarantine_id)
    if row is None:
        _no_such(quarantine_id)
    elif raw:
        sys.stdout.buffer.write(row["body"])
    else:
        for name in ("id", "received_at", "last_received_at", "delivery_count", "reason", "detail", "key_id"):
            click.echo(f"{name + ':':18}{row[name]}")
        click.echo(f"{'bytes:':18}{len(row['body'])}\n")
        # Control characters of a stranger's making do not reach the terminal.
        shown = bytes(row["body"]).decode("utf-8", "backslashreplace")
        click.echo(
            "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)
        )


@quarantine.command()
@click.argument("quarantine_ids", metavar="[ID]...", type=ID, nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every one, oldest first.")
@click.option("--reason", help="Every one with this reason.")
@connection.json_option
def retry(quarantine_ids: tuple[int, ...], every: bool, reason: str | None, as_json: bool) -> None:
    """Drive quarantined deliveries through the archiver again.

    What can be archived now leaves the quarantine; the rest stays. Exit 1 if any stays.
    """
    if bool(quarantine_ids) == (every or reason is not None):
        raise click.UsageError("Name ids, or say --all or --reason.")
    with connection.engine(settings.read()) as engine:
        with database.transaction(engine) as opened:
            schema.check(opened)
        ids = list(quarantine_ids) or list(_every_id(engine, reason))
        shown = track(ids, "Retrying", console=Console(stderr=True), disable=as_json or len(ids) < PAGE)
        outcomes = {quarantine_id: retry_quarantined(engine, quarantine_id) for quarantine_id in shown}
    _print(outcomes, as_json=as_json)
    left = sum(outcome is None or outcome.status == "quarantined" for outcome in outcomes.values())
    if left:
        click.echo(f"archiver: {left} could not be archived; see archiver quarantine show ID", err=True)
        sys.exit(1)


def _every_id(engine: Engine, reason: str | None) -> Iterator[int]:
    after = 0
    while True:
        with database.transaction(engine) as opened:
            rows = store.select_quarantine(opened, after=after, limit=PAGE, reason=reason)
        yield from (row["id"] for row in rows)
        if len(rows) < PAGE:
            return
        after = rows[-1]["id"]


def _print(outcomes: dict[int, Outcome | None], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcomes), indent=2))
        return
    for quarantine_id, outcome in outcomes.items():
        if outcome is None:
            click.echo(f"{quarantine_id}: no such row in the quarantine")
        elif outcome.status == "quarantined":
            click.echo(f"{quarantine_id}: still quarantined: {outcome.detail}")
        else:
            click.echo(f"{quarantine_id}: {outcome.status} as event {outcome.id}")
    if not outcomes:
        click.echo("Nothing is quarantined.")


def _no_such(quarantine_id: int) -> None:
    click.echo(f"archiver: {quarantine_id} is not in the quarantine; see archiver quarantine list", err=True)
    sys.exit(1)
