"""The database as the commands about follow-ups open it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Connection

from archiver.cli import connection
from archiver.cli.output import Whole
from archiver.followups.subscriptions import BeyondError, NoSuchError, TooManyError
from archiver.settings import Settings

ID = click.argument("subscription_id", metavar="ID", type=Whole(1, 2**63 - 1))


@contextmanager
def in_transaction(configuration: Settings) -> Iterator[Connection]:
    """Exit 1 where there is no such subscription, no room for another, or no such cursor."""
    try:
        with connection.opened(configuration) as opened:
            yield opened
    except (NoSuchError, TooManyError, BeyondError) as error:
        click.echo(f"archiver: {error}", err=True)
        sys.exit(1)
