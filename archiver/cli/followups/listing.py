"""`archiver followups list`, `show` and `deliveries`: subscriptions and their state, without secrets."""

from collections.abc import Mapping
from datetime import UTC
from typing import Any

import click

from archiver import settings
from archiver.cli import connection, options
from archiver.cli.output import Table, Whole, console, print_json
from archiver.outbound.followups import review, subscriptions
from archiver.outbound.followups.deliveries import DEAD, PENDING, message_id
from archiver.outbound.followups.subscriptions import SubscriptionNotFoundError


@click.command("list")
@options.json_option
def list_(*, as_json: bool) -> None:
    """List the subscriptions."""
    with connection.opened(settings.read()) as opened:
        result = review.select_subscriptions(opened)
    if as_json:
        print_json(result)
        return
    if not result:
        click.echo("No subscriptions. Add one: archiver followups add URL --event chat.created")
        return
    table = Table("id", "url", "events", "only", "state", "pending", "dead", "behind")
    for row in result:
        counts = (f"{row[name]:,}" for name in ("pending", "dead", "behind"))
        cells = (row["url"], " ".join(row["events"]), _describe_filter(row), _state(row))
        table.add_row(str(row["id"]), *cells, *counts)
    console().print(table)


def _describe_filter(row: Mapping[str, Any]) -> str:
    parts = [f"assistant {row['assistant_id']}"] if row["assistant_id"] is not None else []
    parts += [f"{row['variable']}={row['value']}"] if row["variable"] is not None else []
    parts += [f"contains {row['contains']!r}"] if row["contains"] is not None else []
    return ", ".join([*parts, *(["ordered"] if row["is_ordered"] else [])])


def _state(row: Mapping[str, Any]) -> str:
    if row["state"] == "paused":
        return f"paused: {row['pause_reason']}"
    if row["state"] != "failing":
        return str(row["state"])
    text = f"failing, {row['failures']:,} in a row"
    latest = review.latest_fault(row)
    text += f": {latest}" if latest else ""
    return text + (
        f"; circuit open until {row['open_until'].astimezone(UTC):%H:%M:%S} UTC" if row["open_until"] else ""
    )


@click.command()
@options.subscription_argument
@options.json_option
def show(*, subscription_id: int, as_json: bool) -> None:
    """Show one subscription with the number of its pending deliveries."""
    with connection.opened(settings.read()) as opened:
        result = review.select_subscriptions(opened, subscription_id)
        if not result:
            raise SubscriptionNotFoundError(subscription_id)
    if as_json:
        print_json(result[0])
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in result[0].items():
        if name == "closed_until":  # the earlier name of open_until, for programs
            continue
        shown = " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        shown = _state(result[0]) if name == "state" else shown
        table.add_row(name, shown)
    console().print(table)


@click.command()
@click.option(
    "--subscription", "subscription_id", type=Whole(1, 2**63 - 1), help="Only deliveries of this subscription."
)
@click.option("--dead", is_flag=True, help="Only dead deliveries.")
@click.option("--pending", is_flag=True, help="Only pending deliveries, including those waiting for a retry.")
@click.option("--limit", default=50, show_default=True, type=Whole(1, 10_000), help="Number of newest deliveries.")
@options.json_option
def deliveries(*, subscription_id: int | None, dead: bool, pending: bool, limit: int, as_json: bool) -> None:
    """List deliveries, newest first, each with its latest attempt."""
    if dead and pending:
        raise click.UsageError("use either --dead or --pending")
    state = review.only(dead=dead, pending=pending)
    with connection.opened(settings.read()) as opened:
        if subscription_id is not None:
            subscriptions.select_one(opened, subscription_id)
        rows = review.select_deliveries(opened, subscription_id=subscription_id, state=state, limit=limit)
        result = [_delivery_json(dict(row)) for row in rows]
    if as_json:
        print_json(result)
        return
    if not result:
        click.echo("No matching delivery.")
        return
    table = Table("id", "type", "session", "chat", "state", "attempts", "latest", "answer")
    for row in result:
        latest = " ".join(str(row[name]) for name in ("status", "fault") if row[name] is not None)
        cells = (row["id"], row["type"], row["session_id"], row["chat_id"] or "", row["state"])
        table.add_row(*cells, str(row["attempts"]), latest, repr(row["answer"]) if row["answer"] else "")
    console().print(table)
    if any(row["state"] == DEAD for row in result):
        click.echo("To retry one: archiver followups retry ID")


def _delivery_json(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = row["answer"]
    result = {
        **row,
        "id": message_id(row["subscription_id"], row["cursor"], row["changed_at"]),
        "answer": None if answer is None else bytes(answer).decode(errors="replace"),
    }
    if result["state"] != PENDING:
        del result["due_at"]
    return result
