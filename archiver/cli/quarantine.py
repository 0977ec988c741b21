"""`archiver quarantine`: inspect and retry deliveries that could not be archived."""

import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click
from sqlalchemy import Connection, Engine, RowMapping

from archiver import database, settings
from archiver.archive import Timing
from archiver.cli import complain, connection, escaped, fail, options
from archiver.cli.output import Table, Whole, console, print_json
from archiver.compliance.erasure.quarantine_matches import select_unsearchable
from archiver.inbound import Outcome, retry_quarantined
from archiver.ledger import audit_log
from archiver.ledger import quarantine as store

PAGE = 500
ID = Whole(1, 2**63 - 1)


@click.group()
def quarantine() -> None:
    """Inspect and retry authentic deliveries that could not be archived."""


@quarantine.command("list")
@click.option("--reason", help="Only deliveries with this reason.")
@click.option(
    "--unsearchable", is_flag=True, help="Only rows whose body cannot be decoded, so that erasures cannot search it."
)
@click.option("--limit", default=50, show_default=True, type=Whole(1, 10_000), help="Maximum number of rows.")
@options.json_option
def list_(reason: str | None, unsearchable: bool, limit: int, as_json: bool) -> None:
    """List quarantined deliveries, oldest first, without content."""
    with connection.opened(settings.read()) as opened:
        only = list(islice(select_unsearchable(opened), None if reason else limit)) if unsearchable else None
        rows = [dict(row) for row in store.select_quarantine(opened, limit=limit, reason=reason, only=only)]
        if not rows:
            _check_reason(opened, reason)
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("All quarantined bodies are searchable." if unsearchable else _empty_message(reason))
        return
    table = Table("id", "source", "received", "times", "bytes", "reason", "detail")
    for row in rows:
        received = f"{row['received_at']:%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(row["id"]),
            row["source"],
            received,
            str(row["delivery_count"]),
            str(row["bytes"]),
            row["reason"],
            row["detail"],
        )
    console().print(table)


def _check_reason(opened: Connection, reason: str | None) -> None:
    """Fail with a usage error if this version does not use the reason and no row has it; accept None."""
    if reason is None or reason in store.REASONS:
        return
    known = {*store.REASONS, *store.select_reasons(opened)}
    if reason not in known:
        names = escaped(", ".join(sorted(known)))
        raise click.BadParameter(f"unknown reason; known reasons: {names}", param_hint="--reason")


def _empty_message(reason: str | None) -> str:
    return "Nothing is quarantined." if reason is None else f"Nothing is quarantined with reason {reason}."


@quarantine.command()
@click.argument("quarantine_id", metavar="ID", type=ID)
@click.option("--raw", is_flag=True, help="Write only the exact bytes, for a file or a pipe.")
@options.json_option
def show(quarantine_id: int, raw: bool, as_json: bool) -> None:
    """Show one quarantined delivery with its body."""
    if raw and as_json:
        raise click.UsageError("use either --raw or --json")
    with connection.opened(settings.read()) as opened:
        row = store.select_quarantined(opened, quarantine_id)
    if row is None:
        fail(f"{quarantine_id} is not in the quarantine; see `archiver quarantine list`")
    elif raw:
        sys.stdout.buffer.write(row["body"])
    elif as_json:
        print_json(_described(row) | _body_json(row["body"]))
    else:
        for name, value in _described(row).items():
            if value is not None:
                click.echo(f"{name + ':':18}{escaped(value)}")
        shown = bytes(row["body"]).decode("utf-8", "backslashreplace")
        click.echo("\n" + escaped(shown, keep="\n\t"))


_DESCRIBED = (
    "id",
    "source",
    "type",
    "session_id",
    "received_at",
    "last_received_at",
    "delivery_count",
    "reason",
    "detail",
    "key_id",
)


def _described(row: RowMapping) -> dict[str, Any]:
    return {name: row[name] for name in _DESCRIBED} | {"bytes": len(row["body"])}


def _body_json(body: bytes) -> dict[str, str | None]:
    """Return the body as text (null if it is not UTF-8) and as base64."""
    try:
        text: str | None = bytes(body).decode()
    except UnicodeDecodeError:
        text = None
    return {"body": text, "body_base64": b64encode(body).decode()}


@quarantine.command()
@click.argument("quarantine_ids", metavar="[ID]...", type=ID, nargs=-1)
@click.option("--all", "every", is_flag=True, help="All rows, oldest first.")
@click.option("--reason", help="All rows with this reason.")
@options.actor_option
@options.json_option
def retry(quarantine_ids: tuple[int, ...], every: bool, reason: str | None, actor: str | None, as_json: bool) -> None:
    """Retry quarantined deliveries through the write path.

    Deliveries that can be archived now leave the quarantine; the others stay. Exit 1 if any stays or is unknown.
    """
    by_rule = every or reason is not None
    if quarantine_ids and by_rule:
        raise click.UsageError("specify ids, or --all or --reason, but not both")
    if not quarantine_ids and not by_rule:
        raise click.UsageError("specify ids, --all or --reason")
    configuration = settings.read()
    outcomes: dict[int, Outcome | None] = {}
    with connection.ready(configuration) as engine:
        with database.transaction(engine) as opened:
            _check_reason(opened, reason)
        for quarantine_id in quarantine_ids or _every_id(engine, reason):
            outcomes[quarantine_id] = outcome = retry_quarantined(engine, quarantine_id, Timing.of(configuration))
            if not as_json:
                click.echo(f"{quarantine_id}: {_outcome_text(outcome)}")
        if outcomes:
            became = Counter("absent" if each is None else each.status for each in outcomes.values())
            with database.transaction(engine) as opened:
                audit_log.insert_entry(
                    opened, "quarantine.retry", actor or audit_log.actor(), None, {"became": became}
                )
    if as_json:
        print_json(outcomes)
    elif not outcomes:
        click.echo(_empty_message(reason))
    _report_failures(outcomes)


def _every_id(engine: Engine, reason: str | None) -> Iterator[int]:
    after = 0
    while True:
        with database.transaction(engine) as opened:
            rows = store.select_quarantine(opened, after=after, limit=PAGE, reason=reason)
        yield from (row["id"] for row in rows)
        if len(rows) < PAGE:
            return
        after = rows[-1]["id"]


def _outcome_text(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not in the quarantine"
    if outcome.status == "quarantined":
        return f"still quarantined: {escaped(outcome.detail)}"
    if outcome.reason == "erased":
        return "removed: its content was erased"
    return f"{outcome.status} as event {outcome.id}"


def _report_failures(outcomes: dict[int, Outcome | None]) -> None:
    """Report the number of rows that stay quarantined and of unknown ids; exit 1 if there are any."""
    unknown = sum(outcome is None for outcome in outcomes.values())
    left = sum(outcome is not None and outcome.status == "quarantined" for outcome in outcomes.values())
    if left:
        complain(f"{left:,} still quarantined; see `archiver quarantine show ID`")
    if unknown:
        complain(f"{unknown:,} not in the quarantine; see `archiver quarantine list`")
    if left or unknown:
        sys.exit(1)
