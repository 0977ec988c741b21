"""`archiver followups`: what changes in the archive, told to others."""

import click

from archiver.cli.followups import changing, listing, subscribing
from archiver.cli.followups.tail import tail


@click.group()
def followups() -> None:
    """Act on what changes in the archive: follow the feed, or have it sent to receivers."""


for _command in (
    *(tail, subscribing.add, listing.list_, listing.show, changing.pause, changing.resume, changing.remove),
    *(subscribing.rotate, subscribing.test, listing.deliveries, changing.retry),
):
    followups.add_command(_command)
