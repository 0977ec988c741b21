"""`archiver followups pause`, `resume`, `remove` and `retry`."""

import sys
from collections.abc import Sequence

import click

from archiver import settings
from archiver.cli import complain, connection, fail, options
from archiver.cli.output import Whole
from archiver.ledger import audit_log
from archiver.outbound.followups import pruning, review, subscriptions
from archiver.outbound.followups.deliveries import parse_message_id

MAX_RETRIED = 10_000  # deliveries per command


@click.command()
@options.subscription_argument
@click.option("--reason", default=subscriptions.BY_HAND, type=options.Audited(), help="Reason, shown in the list.")
@options.actor_option
def pause(*, subscription_id: int, reason: str, actor: str | None) -> None:
    """Pause a subscription. `resume` delivers the changes since then that are still in the feed."""
    with connection.opened(settings.read()) as opened:
        subscriptions.pause(opened, subscription_id, reason)
        audit_log.insert_entry(
            opened, "followups.pause", actor or audit_log.actor(), reason, {"subscription": subscription_id}
        )
    click.echo(f"Subscription {subscription_id} is paused.")


@click.command()
@options.subscription_argument
@options.actor_option
def resume(*, subscription_id: int, actor: str | None) -> None:
    """Resume a paused subscription. Exit 1 if changes were deleted before delivery."""
    with connection.opened(settings.read()) as opened:
        lost_changes = subscriptions.resume(opened, subscription_id)
        detail = {"subscription": subscription_id, "gone": lost_changes}
        audit_log.insert_entry(opened, "followups.resume", actor or audit_log.actor(), None, detail)
    click.echo(f"Subscription {subscription_id} is active.")
    if lost_changes:
        fail(f"{lost_changes:,} changes are not delivered: they are no longer in the feed")


@click.command()
@options.subscription_argument
@options.actor_option
@options.yes_option
def remove(*, subscription_id: int, actor: str | None, yes: bool) -> None:
    """Remove a subscription with its secret and its delivery log."""
    options.confirm(f"Remove subscription {subscription_id} with all its deliveries?", yes=yes)
    configuration = settings.read()
    with connection.opened(configuration) as opened:
        subscriptions.remove(opened, subscription_id)
        audit_log.insert_entry(
            opened, "followups.remove", actor or audit_log.actor(), None, {"subscription": subscription_id}
        )
    forgotten = pruning.BATCH_SIZE
    while forgotten == pruning.BATCH_SIZE:  # in batches; a worker deletes the rest if this command is interrupted
        with connection.opened(configuration) as opened:
            forgotten = pruning.delete_of_subscription(opened, subscription_id)
    click.echo(f"Subscription {subscription_id} is removed.")


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--dead", type=Whole(1, 2**63 - 1), metavar="SUBSCRIPTION", help="All dead deliveries of this subscription."
)
@options.actor_option
def retry(*, ids: Sequence[str], dead: int | None, actor: str | None) -> None:
    """Retry deliveries now, by id (msg_...) as listed by `deliveries`."""
    if bool(ids) == (dead is not None):
        raise click.UsageError("specify delivery ids, or --dead SUBSCRIPTION")
    requested = [(each, parse_message_id(each)) for each in ids]
    if wrong := [each for each, parsed in requested if parsed is None]:
        raise click.UsageError(
            f"{wrong[0][:80]!r} is not a delivery id; list them with `archiver followups deliveries`"
        )
    became: list[tuple[str, review.Retried]] = []
    with connection.opened(settings.read()) as opened:
        if dead is not None:
            subscriptions.select_one(opened, dead)
            retried = review.retry_dead(opened, dead, MAX_RETRIED)
        else:
            became = [(each, review.retry(opened, *parsed)) for each, parsed in requested if parsed is not None]
            retried = sum(how == "retried" for _, how in became)
        detail = {"subscription": dead} if dead is not None else {"deliveries": list(ids)}
        audit_log.insert_entry(
            opened, "followups.retry", actor or audit_log.actor(), None, detail | {"retried": retried}
        )
    click.echo(f"{retried:,} scheduled for retry.")
    if retried == MAX_RETRIED:
        click.echo("More deliveries may be left; run the command again.", err=True)
    for each, how in became:
        if how != "retried":
            message = "already delivered" if how == "delivered" else "no such delivery"
            complain(f"{each}: {message}")
    if retried < len(became):
        sys.exit(1)
