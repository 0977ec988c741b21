"""`archiver followups add`, `rotate` and `test`: to whom, signed with what, and whether it arrives."""

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from archiver import acts, outbox, settings
from archiver.cli import connection
from archiver.cli.followups.opening import ID, in_transaction
from archiver.cli.output import Whole
from archiver.followups import guard, sending, signing, subscriptions
from archiver.followups.contents import encode
from archiver.followups.sending import Attempt
from archiver.followups.subscriptions import Filter, Subscription

secret_file_option = click.option(
    "--secret-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Take the secret from this file; - is stdin.  [default: make one, and print it once]",
)


@click.command()
@click.argument("url")
@click.option("--event", "events", multiple=True, required=True, metavar="TYPE", help="; ".join(outbox.TYPES))
@click.option("--assistant", "assistant_id", metavar="ID", help="Only conversations of this assistant.")
@click.option("--variable", metavar="NAME=VALUE", help="Only conversations in which this variable has this value.")
@click.option("--contains", metavar="TEXT", help="Only where a message holds this text, in whatever case.")
@click.option("--ordered", "is_ordered", is_flag=True, help="Tell each session in order, one delivery at a time.")
@click.option(
    "--concurrency",
    default=subscriptions.CONCURRENCY,
    show_default=True,
    type=Whole(1, subscriptions.MOST_CONCURRENCY),
    help="Deliveries under way at a time.",
)
@click.option(
    "--from",
    "after",
    type=Whole(0, 2**63 - 1),
    metavar="CURSOR",
    help="Tell what the feed holds after this cursor, too.",
)
@secret_file_option
@connection.actor_option
@connection.json_option
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
    """Tell URL of changes from now on, by signed POSTs (Standard Webhooks)."""
    configuration = settings.read()
    for option, given in (("--assistant", assistant_id), ("--contains", contains)):
        if given == "":
            raise click.BadParameter("it is empty; leave it out to tell of any", param_hint=option)
    name, value = connection.name_and_value(variable, "--variable") if variable is not None else (None, None)
    only = Filter(assistant_id, name, value, contains)
    _check_events(events, only)
    endpoint = _check_url(url, allow_private=configuration.followups_allow_private)
    secret = _read_secret(secret_file) if secret_file else signing.make_secret()
    values = {
        **msgspec.structs.asdict(only),
        "url": url,
        "events": sorted(set(events), key=outbox.TYPES.index),
        "is_ordered": is_ordered,
        "concurrency": concurrency,
        "secret": secret,
    }
    with in_transaction(configuration) as opened:
        subscription_id = subscriptions.insert_subscription(opened, values, after)
        detail = {"subscription": subscription_id, "receiver": endpoint.place, "events": values["events"]}
        acts.insert_act(opened, "followups.add", actor or acts.actor(), None, detail | {"from": after})
    told = {} if secret_file else {"secret": secret}
    if as_json:
        click.echo(msgspec.json.encode({"id": subscription_id} | told).decode())
        return
    click.echo(f"Subscription {subscription_id} is told of {', '.join(values['events'])}.")
    _show_secret(told.get("secret"))
    click.echo(f"Try it: archiver followups test {subscription_id}", err=True)


def _check_events(events: Sequence[str], only: Filter) -> None:
    for each in events:
        if each not in outbox.TYPES:
            known = ", ".join(outbox.TYPES)
            raise click.BadParameter(f"there is no {each!r}; there are {known}", param_hint="--event")
    if subscriptions.SEAL in events and not only.is_empty:
        raise click.UsageError("Seals belong to no conversation: add seal.created apart, without a filter.")


def _check_url(url: str, *, allow_private: bool) -> guard.Endpoint:
    try:
        endpoint = guard.endpoint(url)
    except guard.RefusedError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    try:
        _check_addresses(endpoint, allow_private=allow_private)
    except (guard.RefusedError, guard.UnresolvedError) as error:
        click.echo(f"archiver: {error}", err=True)
        sys.exit(1)
    return endpoint


def _check_addresses(endpoint: guard.Endpoint, *, allow_private: bool) -> None:
    found = guard.resolve(endpoint.host, endpoint.port)
    guard.check(found, is_encrypted=endpoint.is_encrypted, allow_private=allow_private)


def _read_secret(path: Path) -> str:
    try:
        with click.open_file(str(path), encoding="ascii") as file:
            told = str(file.read(1_000)).strip()
        signing.key(told)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain text"
        raise click.BadParameter(f"cannot read {path}: {reason}", param_hint="--secret-file") from None
    except signing.SecretError as error:
        raise click.BadParameter(str(error), param_hint="--secret-file") from None
    return told


def _show_secret(secret: str | None) -> None:
    if secret is not None:
        click.echo(f"Its secret, which is not shown again: {secret}")


@click.command()
@ID
@secret_file_option
@connection.actor_option
@connection.json_option
def rotate(*, subscription_id: int, secret_file: Path | None, actor: str | None, as_json: bool) -> None:
    """Sign with a new secret; for 24 hours with the one before as well."""
    secret = _read_secret(secret_file) if secret_file else signing.make_secret()
    with in_transaction(settings.read()) as opened:
        until = subscriptions.rotate(opened, subscription_id, secret)
        acts.insert_act(opened, "followups.rotate", actor or acts.actor(), None, {"subscription": subscription_id})
    told = {} if secret_file else {"secret": secret}
    if as_json:
        click.echo(msgspec.json.encode({"id": subscription_id, "both_until": until} | told).decode())
        return
    click.echo(f"Both secrets of subscription {subscription_id} sign until {until:%Y-%m-%d %H:%M} UTC.")
    _show_secret(told.get("secret"))


@click.command()
@ID
@connection.json_option
def test(*, subscription_id: int, as_json: bool) -> None:
    """Send a `followups.test` message now, and tell the answer. Exit 1 if it is not taken.

    If it is, the receiver is left alone no longer.
    """
    configuration = settings.read()
    with in_transaction(configuration) as opened:
        row = subscriptions.select_one(opened, subscription_id)
        subscription = subscriptions.of_row(row)
    attempt = asyncio.run(_send(subscription, allow_private=configuration.followups_allow_private))
    if attempt.fault is None:
        with in_transaction(configuration) as opened:
            subscriptions.close_circuit(opened, subscription_id)
    if as_json:
        told = {name: getattr(attempt, name) for name in ("status", "fault", "seconds")}
        click.echo(msgspec.json.encode(told | {"answer": attempt.answer.decode(errors="replace")}).decode())
    else:
        answer = repr(attempt.answer.decode(errors="replace")) if attempt.answer else "nothing"
        status = f"answered {attempt.status}" if attempt.status else "did not answer"
        fault = f" ({attempt.fault})" if attempt.fault else ""
        click.echo(f"The receiver {status}{fault} after {attempt.seconds:.2f} s; it said {answer}.")
    if attempt.fault == "refused_address":
        _explain_refusal(subscription.url, allow_private=configuration.followups_allow_private)
    if attempt.fault is not None:
        sys.exit(1)
    if row["paused_at"] is not None:
        click.echo(f"It is paused: archiver followups resume {subscription_id}", err=True)


def _explain_refusal(url: str, *, allow_private: bool) -> None:
    """Say what refused it; nothing where by now nothing does."""
    with contextlib.suppress(guard.UnresolvedError):
        try:
            _check_addresses(guard.endpoint(url), allow_private=allow_private)
        except guard.RefusedError as error:
            click.echo(f"archiver: {error}", err=True)


async def _send(subscription: Subscription, *, allow_private: bool) -> Attempt:
    body = encode("followups.test", datetime.now(UTC), {"subscription": subscription.id})
    message_id = f"msg_{subscription.id}_test_{secrets.token_hex(8)}"
    try:
        where = guard.endpoint(subscription.url)
    except guard.RefusedError:
        return Attempt.refused()
    async with sending.Transport(where, concurrency=1, allow_private=allow_private) as transport:
        return await transport.send(subscription, message_id, body)
