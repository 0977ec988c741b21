"""`archiver followups`: manage the receivers of changes, and print the change feed."""

import click

from archiver.cli.followups import changing, listing, subscribing
from archiver.cli.followups.tail import tail


@click.group()
def followups() -> None:
    """Manage receivers of changes, or print the change feed."""


for _command in (
    *(tail, subscribing.add, listing.list_, listing.show, changing.pause, changing.resume, changing.remove),
    *(subscribing.rotate, subscribing.test, listing.deliveries, changing.retry),
):
    followups.add_command(_command)
