"""The database as the commands about follow-ups open it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Connection

from archiver.cli import connection
from archiver.cli.output import Whole
from archiver.outbound.followups.subscriptions import (
    CursorBeyondFeedError,
    SubscriptionLimitError,
    SubscriptionNotFoundError,
)
from archiver.settings import Settings

ID = click.argument("subscription_id", metavar="ID", type=Whole(1, 2**63 - 1))


@contextmanager
def in_transaction(configuration: Settings) -> Iterator[Connection]:
    """Yield a transaction. Exit 1 for an unknown subscription, the subscription limit, or an invalid cursor."""
    try:
        with connection.opened(configuration) as opened:
            yield opened
    except (SubscriptionNotFoundError, SubscriptionLimitError, CursorBeyondFeedError) as error:
        click.echo(f"archiver: {error}", err=True)
        sys.exit(1)
