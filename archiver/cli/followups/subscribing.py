"""`archiver followups add`, `rotate` and `test`: create and test subscriptions."""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from archiver import settings
from archiver.archive import outbox
from archiver.cli import complain, connection, options
from archiver.cli.output import Whole
from archiver.inbound.signatures import standard_webhooks
from archiver.ledger import audit_log
from archiver.outbound.followups import guard, subscriptions
from archiver.outbound.followups.subscriptions import Filter
from archiver.outbound.followups.testing import send_test

secret_file_option = click.option(
    "--secret-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Read the secret from this file; - reads stdin.  [default: generate one and print it once]",
)


_EVENT_HELP = f"Type of change; may be repeated: {', '.join(outbox.TYPES)}."


@click.command()
@click.argument("url")
@click.option("--event", "events", multiple=True, required=True, metavar="TYPE", help=_EVENT_HELP)
@click.option("--assistant", "assistant_id", metavar="ID", help="Only conversations of this assistant.")
@click.option("--variable", metavar="NAME=VALUE", help="Only conversations with this variable value.")
@click.option(
    "--contains", metavar="TEXT", help="Only conversations with a message that contains this text, ignoring case."
)
@click.option(
    "--ordered", "is_ordered", is_flag=True, help="Deliver the changes of each session in order, one at a time."
)
@click.option(
    "--concurrency",
    default=subscriptions.CONCURRENCY,
    show_default=True,
    type=Whole(1, subscriptions.MAX_CONCURRENCY),
    help="Maximum concurrent deliveries.",
)
@click.option(
    "--from",
    "after",
    type=Whole(0, 2**63 - 1),
    metavar="CURSOR",
    help="Also deliver the changes that are in the feed after this cursor.",
)
@secret_file_option
@options.actor_option
@options.json_option
def add(
    *,
    url: str,
    events: Sequence[str],
    assistant_id: str | None,
    variable: str | None,
    contains: str | None,
    is_ordered: bool,
    concurrency: int,
    after: int | None,
    secret_file: Path | None,
    actor: str | None,
    as_json: bool,
) -> None:
    """Send changes to URL from now on, as signed POST requests (Standard Webhooks)."""
    configuration = settings.read()
    for option, given in (("--assistant", assistant_id), ("--contains", contains)):
        if given == "":
            raise click.BadParameter("empty; omit the option to match every conversation", param_hint=option)
    name, value = options.name_and_value(variable, "--variable") if variable is not None else (None, None)
    only = Filter(assistant_id, name, value, contains)
    _check_events(events, only)
    endpoint = _check_url(url, allow_private=configuration.followups_allow_private)
    secret = _read_secret(secret_file) if secret_file else standard_webhooks.make_secret()
    values = {
        **msgspec.structs.asdict(only),
        "url": url,
        "events": sorted(set(events), key=outbox.TYPES.index),
        "is_ordered": is_ordered,
        "concurrency": concurrency,
        "secret": secret,
    }
    with connection.opened(configuration) as opened:
        subscription_id = subscriptions.insert_subscription(opened, values, after)
        detail = {"subscription": subscription_id, "receiver": endpoint.origin, "events": values["events"]}
        audit_log.insert_entry(opened, "followups.add", actor or audit_log.actor(), None, detail | {"from": after})
    output = {} if secret_file else {"secret": secret}
    if as_json:
        click.echo(msgspec.json.encode({"id": subscription_id} | output).decode())
        return
    click.echo(f"Subscription {subscription_id} receives {', '.join(values['events'])}.")
    _show_secret(output.get("secret"))
    click.echo(f"Test it: archiver followups test {subscription_id}", err=True)


def _check_events(events: Sequence[str], only: Filter) -> None:
    for each in events:
        if each not in outbox.TYPES:
            known = ", ".join(outbox.TYPES)
            raise click.BadParameter(f"unknown event type {each!r}; use one of {known}", param_hint="--event")
    if only.is_empty:
        return
    if subscriptions.SEAL in events:
        raise click.UsageError(
            "seal.created belongs to no conversation: add a separate subscription without a filter"
        )
    if erasures := sorted(outbox.ERASURES.intersection(events)):
        which = " and ".join(erasures)
        raise click.UsageError(
            f"erased content matches no filter: add a separate subscription to {which} without a filter"
        )


def _check_url(url: str, *, allow_private: bool) -> guard.Endpoint:
    try:
        endpoint = guard.endpoint(url)
    except guard.AddressRefusedError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    _check_addresses(endpoint, allow_private=allow_private)
    return endpoint


def _check_addresses(endpoint: guard.Endpoint, *, allow_private: bool) -> None:
    result = guard.resolve(endpoint.host, endpoint.port)
    guard.check(result, is_encrypted=endpoint.is_encrypted, allow_private=allow_private)


def _read_secret(path: Path) -> str:
    try:
        with click.open_file(str(path), encoding="ascii") as file:
            secret = str(file.read(1_000)).strip()
        standard_webhooks.key(secret)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain text"
        raise click.BadParameter(f"cannot read {path}: {reason}", param_hint="--secret-file") from None
    except standard_webhooks.SecretError as error:
        raise click.BadParameter(str(error), param_hint="--secret-file") from None
    return secret


def _show_secret(secret: str | None) -> None:
    if secret is not None:
        click.echo(f"Secret (not shown again): {secret}")


@click.command()
@options.subscription_argument
@secret_file_option
@options.actor_option
@options.json_option
def rotate(*, subscription_id: int, secret_file: Path | None, actor: str | None, as_json: bool) -> None:
    """Sign with a new secret, and for 24 hours also with the previous one."""
    secret = _read_secret(secret_file) if secret_file else standard_webhooks.make_secret()
    with connection.opened(settings.read()) as opened:
        until = subscriptions.rotate(opened, subscription_id, secret)
        audit_log.insert_entry(
            opened, "followups.rotate", actor or audit_log.actor(), None, {"subscription": subscription_id}
        )
    output = {} if secret_file else {"secret": secret}
    if as_json:
        click.echo(msgspec.json.encode({"id": subscription_id, "both_until": until} | output).decode())
        return
    click.echo(f"Both secrets of subscription {subscription_id} sign deliveries until {until:%Y-%m-%d %H:%M} UTC.")
    _show_secret(output.get("secret"))


@click.command()
@options.subscription_argument
@options.json_option
def test(*, subscription_id: int, as_json: bool) -> None:
    """Send a `followups.test` message now and print the response. Exit 1 if it is not accepted.

    If it is accepted, the circuit of this receiver is closed, and deliveries continue.
    """
    configuration = settings.read()
    with connection.opened(configuration) as opened:
        row = subscriptions.select_one(opened, subscription_id)
        subscription = subscriptions.subscription_from_row(row)
    attempt = asyncio.run(send_test(subscription, allow_private=configuration.followups_allow_private))
    if attempt.fault is None:
        with connection.opened(configuration) as opened:
            subscriptions.reset_circuit(opened, subscription_id)
    if as_json:
        output = {name: getattr(attempt, name) for name in ("status", "fault", "seconds")}
        click.echo(msgspec.json.encode(output | {"answer": attempt.answer.decode(errors="replace")}).decode())
    else:
        answer = repr(attempt.answer.decode(errors="replace")) if attempt.answer else "nothing"
        status = f"returned {attempt.status}" if attempt.status else "did not respond"
        fault = f" ({attempt.fault})" if attempt.fault else ""
        click.echo(f"The receiver {status}{fault} after {attempt.seconds:.2f} s; response: {answer}")
    if attempt.fault == "refused_address":
        _explain_refusal(subscription.url, allow_private=configuration.followups_allow_private)
    if attempt.fault is not None:
        sys.exit(1)
    if row["paused_at"] is not None:
        click.echo(f"The subscription is paused: archiver followups resume {subscription_id}", err=True)


def _explain_refusal(url: str, *, allow_private: bool) -> None:
    """Print why the address is refused; print nothing if it is accepted now."""
    with contextlib.suppress(guard.HostNotFoundError):
        try:
            _check_addresses(guard.endpoint(url), allow_private=allow_private)
        except guard.AddressRefusedError as error:
            complain(f"{error}")
