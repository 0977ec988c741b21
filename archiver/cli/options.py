"""Options and arguments that several commands share, and functions that parse their values."""

import sys
from collections.abc import Iterable
from datetime import UTC, datetime

import click

from archiver import events
from archiver.cli import fail
from archiver.cli.output import Whole
from archiver.ledger import audit_log

since_option = click.option(
    "--since", metavar="TIME", help="Sessions with a turn at or after this time: 2024-01-15 or 2024-01-15T09:30:00Z."
)
until_option = click.option("--until", metavar="TIME", help="Sessions with a turn before this time.")


class Audited(click.ParamType[str]):
    """A parameter type: text for the audit log, at most `audit_log.MAX_TEXT` characters."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value; fail with a usage error if it is too long."""
        if len(value) > audit_log.MAX_TEXT:
            self.fail(f"{len(value):,} characters; at most {audit_log.MAX_TEXT:,} are recorded", param, ctx)
        return value


reason_option = click.option("--reason", required=True, type=Audited(), help="Reason for the audit log.")
subscription_argument = click.argument("subscription_id", metavar="ID", type=Whole(1, 2**63 - 1))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

actor_option = click.option(
    "--actor",
    metavar="NAME",
    type=Audited(),
    help="Name of the person or program, for the audit log.  [default: your user and machine]",
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation, unless `yes`; exit 1 if it is refused. Without a terminal, read the answer from stdin."""
    try:
        is_confirmed = yes or click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        fail("no answer on stdin; nothing was changed. To answer in advance, add --yes")
    if not is_confirmed:
        fail("cancelled; nothing was changed")


def moment(text: str | None, option: str) -> datetime | None:
    """Parse the time that an option gives, in UTC unless it names a zone; return None for None."""
    if text is None:
        return None
    try:
        result = datetime.fromisoformat(text.upper())
        return (result if result.tzinfo else result.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter("expected 2024-01-15 or 2024-01-15T09:30:00Z", param_hint=option) from None


def period(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """Parse `--since` and `--until`; fail with a usage error if the period is empty."""
    first, end = moment(since, "--since"), moment(until, "--until")
    if first is not None and end is not None and first >= end:
        raise click.UsageError("--since is not before --until")
    return first, end


def check_ids(ids: Iterable[str], what: str) -> None:
    """Fail with a usage error if an id is invalid; `what` names the kind of id."""
    for each in ids:
        try:
            result = events.identifier(each)
        except events.UnreadableError as error:
            raise click.UsageError(f"invalid {what} id {each[:80]!r}: {events.REASONS[str(error)]}") from None
        if result is None:
            raise click.UsageError(f"invalid {what} id: empty")


def name_and_value(text: str, option: str) -> tuple[str, str]:
    """Return name and value of NAME=VALUE; fail with a usage error for any other form."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise click.BadParameter("expected NAME=VALUE", param_hint=option)
    return name.strip(), value
