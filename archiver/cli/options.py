"""Options and arguments that several commands share."""

import click

from archiver.cli.output import Whole

subscription_argument = click.argument("subscription_id", metavar="ID", type=Whole(1, 2**63 - 1))
