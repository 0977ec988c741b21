"""`archiver followups`: acting on what changes in the archive."""

import click

from archiver.cli.followups.tail import tail


@click.group()
def followups() -> None:
    """Act on what changes in the archive."""


followups.add_command(tail)
