"""`archiver followups`: what changes in the archive, told to others."""

import click

from archiver.cli.followups import changing, listing, subscribing


@click.group("followups")
def group() -> None:
    """Act on conversations, exactly as archived: subscriptions and their deliveries."""


for _command in (
    *(subscribing.add, listing.list_, listing.show, changing.pause, changing.resume, changing.remove),
    *(subscribing.rotate, subscribing.test, listing.deliveries, changing.retry),
):
    group.add_command(_command)
