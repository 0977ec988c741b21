"""`archiver followups pause`, `resume`, `remove` and `retry`."""

import sys
from collections.abc import Sequence

import click

from archiver import acts, settings
from archiver.cli import connection
from archiver.cli.followups.opening import ID, in_transaction
from archiver.cli.output import Whole
from archiver.followups import forgetting, review, subscriptions
from archiver.followups.deliveries import parse_message_id

RETRIED = 10_000  # at once


@click.command()
@ID
@click.option("--reason", default=subscriptions.BY_HAND, help="Why, for whoever looks.")
@connection.actor_option
def pause(*, subscription_id: int, reason: str, actor: str | None) -> None:
    """Send nothing until `resume`; what happens meanwhile is told then, as far back as the feed goes."""
    with in_transaction(settings.read()) as opened:
        subscriptions.pause(opened, subscription_id, reason)
        acts.insert_act(opened, "followups.pause", actor or acts.actor(), reason, {"subscription": subscription_id})
    click.echo(f"Subscription {subscription_id} is paused.")


@click.command()
@ID
@connection.actor_option
def resume(*, subscription_id: int, actor: str | None) -> None:
    """Go on where it was paused. Exit 1 if changes are gone that were not told."""
    with in_transaction(settings.read()) as opened:
        gone = subscriptions.resume(opened, subscription_id)
        detail = {"subscription": subscription_id, "gone": gone}
        acts.insert_act(opened, "followups.resume", actor or acts.actor(), None, detail)
    click.echo(f"Subscription {subscription_id} is at work.")
    if gone:
        click.echo(f"archiver: {gone:,} changes are not told: the feed does not hold them any more", err=True)
        sys.exit(1)


@click.command()
@ID
@connection.actor_option
@connection.yes_option
def remove(*, subscription_id: int, actor: str | None, yes: bool) -> None:
    """Remove a subscription, its secret and what is known of its deliveries."""
    connection.confirm(f"Remove subscription {subscription_id} with all its deliveries?", yes=yes)
    configuration = settings.read()
    with in_transaction(configuration) as opened:
        subscriptions.remove(opened, subscription_id)
        acts.insert_act(opened, "followups.remove", actor or acts.actor(), None, {"subscription": subscription_id})
    forgotten = forgetting.AT_ONCE
    while forgotten == forgetting.AT_ONCE:  # some at a time; what a stop here leaves, a worker forgets
        with in_transaction(configuration) as opened:
            forgotten = forgetting.forget_of(opened, subscription_id)
    click.echo(f"Subscription {subscription_id} is removed.")


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--dead", type=Whole(1, 2**63 - 1), metavar="SUBSCRIPTION", help="All of it that were given up.")
@connection.actor_option
def retry(*, ids: Sequence[str], dead: int | None, actor: str | None) -> None:
    """Try deliveries again now, by their ids (msg_…) as `deliveries` and receivers have them."""
    if bool(ids) == (dead is not None):
        raise click.UsageError("Say which: ids, or --dead SUBSCRIPTION.")
    asked = [(each, parse_message_id(each)) for each in ids]
    if wrong := [each for each, parsed in asked if parsed is None]:
        raise click.UsageError(f"{wrong[0][:80]!r} is no id of a delivery: archiver followups deliveries")
    became: list[tuple[str, review.Retried]] = []
    with in_transaction(settings.read()) as opened:
        if dead is not None:
            subscriptions.select_one(opened, dead)
            retried = review.retry_dead(opened, dead, RETRIED)
        else:
            became = [(each, review.retry(opened, *parsed)) for each, parsed in asked if parsed is not None]
            retried = sum(how == "retried" for _, how in became)
        detail = {"subscription": dead} if dead is not None else {"deliveries": list(ids)}
        acts.insert_act(opened, "followups.retry", actor or acts.actor(), None, detail | {"retried": retried})
    click.echo(f"{retried:,} {'is' if retried == 1 else 'are'} tried again.")
    if retried == RETRIED:
        click.echo("There may be more: the same command again goes on.", err=True)
    for each, how in became:
        if how != "retried":
            told = "was delivered already" if how == "delivered" else "there is no such delivery"
            click.echo(f"archiver: {each}: {told}", err=True)
    if retried < len(became):
        sys.exit(1)
