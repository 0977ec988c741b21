"""`archiver seal`, `verify`, `prove` and `seals`: prove that the ledger has not been edited."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import click
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.progress import TextColumn, TimeElapsedColumn
from rich.text import Text
from sqlalchemy import Connection

from archiver import database, settings, telemetry
from archiver.cli import complain, connection, escaped, options, verify_options
from archiver.cli.output import (
    MAX_SHOWN_FINDINGS,
    Table,
    Whole,
    console,
    count_findings,
    counted,
    print_json,
    progress,
)
from archiver.compliance import seals
from archiver.compliance.seals import Checked, Finding, Seal
from archiver.database import identity

READ_SECONDS = 24 * 3600  # for one statement of a verification


@click.command()
@options.json_option
def seal(as_json: bool) -> None:
    """Seal all settled rows now. A worker does so every ARCHIVER_SEAL_EVERY seconds."""
    configuration = settings.read()
    telemetry.configure_logs("warning", configuration.log_format)  # its messages are printed below
    key = seals.signing_key(configuration)
    with connection.ready(configuration) as engine:
        if reason := connection.report_identity(configuration, engine):
            raise settings.SettingsError(f"nothing was sealed: {reason}.\n{identity.ADVICE}")
        made = seals.seal(engine, key)
    if as_json:
        print_json([_seal_json(each) for each in made])
        return
    for each in made:
        click.echo(f"seal {each.id}: {counted(each.size, 'leaf', 'leaves')}, {each.hash.hex()}")
    if not made:
        click.echo("No new rows since the last seal.")


@click.command()
@click.option(
    "--since",
    "after_seal",
    type=Whole(1),
    metavar="SEAL",
    help="Start after this seal; rows sealed up to it are not checked against their seals.",
)
@verify_options.key_option(default="[default: that of ARCHIVER_SEAL_KEY]")
@verify_options.signed_since_option
@verify_options.against_option
@click.option(
    "--jobs",
    type=Whole(1, 64),
    metavar="N",
    help="Number of processes, each with its own connection."
    f"  [default: one per processor, at most {seals.MAX_JOBS}]",
)
@options.json_option
def verify(
    *,
    after_seal: int | None,
    key_files: tuple[Path, ...],
    signed_since: int,
    against: IO[bytes] | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Check seals and ledger: each row against its seal, each body against its digest, each seal against its chain.

    Names each event and seal that differs from its sealed state, and exits 1 if there is any. Changes of unsealed
    rows cannot be detected; the number of these rows is printed.
    """
    configuration = settings.read()
    keys = _checking_keys(configuration, key_files)
    heads = None if against is None else verify_options.read_known_seals(against)[0]
    checked = Checked()
    findings: list[Finding] = []
    with connection.ready(configuration) as engine:
        with database.transaction(engine) as opened:
            reason = connection.identity_fault(configuration, engine, opened)
            wrong_database = _of_identity(opened, reason)
            verify_options.check_seal_exists(
                seals.select_newest(opened), after_seal=after_seal, signed_since=signed_since
            )
        with (
            database.snapshot(engine, statement_seconds=READ_SECONDS) as opened,
            progress(TextColumn("Verifying {task.fields[progress]}"), TimeElapsedColumn()) as bar,
        ):
            task = bar.add_task("", total=None, progress="")

            def show_progress(so_far: Checked) -> None:
                bar.update(task, progress=f"{counted(so_far.events, 'event')}, {counted(so_far.seals, 'seal')}")

            verification = seals.verify(
                opened,
                after_seal=after_seal or 0,
                keys=keys,
                signed_since=signed_since,
                heads=heads,
                checked=checked,
                on_progress=show_progress,
                effort=seals.Parallelism(jobs or seals.usual_jobs()),
            )
            with closing(verification) as item:
                for finding in item:
                    findings.append(finding)
                    if not as_json and len(findings) <= MAX_SHOWN_FINDINGS:
                        bar.console.print(Text(escaped(finding), "bold"), soft_wrap=True)
    if reason:
        complain(f"{reason}\n{identity.ADVICE}")
    if as_json:
        _report_as_json(checked, wrong_database + findings, has_key=bool(keys), reason=reason)
    else:
        _report(checked, has_key=bool(keys), is_compared=heads is not None)
    if findings:
        complain(count_findings(len(findings), "docs/seals.md", are_shown=not as_json))
    if findings or reason:
        sys.exit(1)


def _of_identity(opened: Connection, reason: str) -> list[Finding]:
    """Return one finding if the database is not the one served before, else none."""
    epoch = identity.select_epoch(opened) if reason else None
    return [Finding("epochs", epoch.id, "not_the_one_served")] if epoch else []


def _checking_keys(configuration: settings.Settings, key_files: tuple[Path, ...]) -> dict[str, Ed25519PublicKey]:
    own = seals.signing_key(configuration)
    if not key_files and own is not None:
        return {seals.key_id(own.public_key()): own.public_key()}
    return verify_options.public_keys(key_files)


def _report_as_json(checked: Checked, findings: list[Finding], *, has_key: bool, reason: str) -> None:
    head = checked.head
    print_json(
        {
            "ok": not findings and not reason,
            "seals": checked.seals,
            "events": checked.events,
            "unsealed": checked.unsealed,
            "compared": checked.compared,
            "head": {"id": head.id, "hash": head.hash.hex(), "key_id": head.key_id},
            "signatures_checked": has_key,
            "identity": reason or None,
            "findings": [msgspec.structs.asdict(each) | {"detail": str(each)} for each in findings],
        }
    )


def _report(checked: Checked, *, has_key: bool, is_compared: bool) -> None:
    head = checked.head
    click.echo(
        f"{counted(checked.events, 'event')} in {counted(checked.seals, 'seal')};"
        f" {counted(checked.unsealed, 'event')} not yet sealed."
    )
    if head.id:
        click.echo(f"Newest seal: {head.id}, {head.hash.hex()}{_signed(head, has_key=has_key)}")
    if is_compared:
        click.echo(f"Compared with {counted(checked.compared, 'seal')} exported earlier.")


def _signed(head: Seal, *, has_key: bool) -> str:
    if head.key_id is None:
        return ", not signed"
    return f", signed by {escaped(head.key_id)}" + ("" if has_key else " (not checked: give --key)")


@click.command()
@click.argument("event", metavar="EVENT", type=Whole(1, 2**63 - 1))
def prove(event: int) -> None:
    """Print the proof, as JSON, that EVENT (an id of archiver.events) is in its seal.

    docs/seals.md contains a script that checks such a proof without this program.
    """
    with connection.opened(settings.read()) as opened:
        proof = seals.prove(opened, event)
    print_json(proof.as_json())


@click.group("seals")
def group() -> None:
    """List or export the chain of seals."""


@group.command("list")
@click.option("--limit", default=20, show_default=True, type=Whole(1, 10_000), help="Number of newest seals.")
@options.json_option
def list_(limit: int, as_json: bool) -> None:
    """List the newest seals."""
    with connection.opened(settings.read()) as opened:
        first = seals.select_newest(opened).id - limit
        result = [each for each, _ in seals.select_seals(opened, max(first, 0))]
    if as_json:
        print_json([_seal_json(each) for each in result])
        return
    table = Table("seal", "sealed", "leaves", "events through", "key", "hash")
    for each in result:
        sealed_at = f"{each.sealed_at:%Y-%m-%d %H:%M:%S}"
        events = f"{each.through['events']:,}"
        table.add_row(str(each.id), sealed_at, f"{each.size:,}", events, each.key_id or "-", each.hash.hex())
    if result:
        console().print(table)
    else:
        click.echo("There are no seals yet. Create one: archiver seal")


@group.command()
@click.option(
    "--since", "after", default=0, type=Whole(0, 2**63 - 1), metavar="SEAL", help="Only seals after this one."
)
def export(after: int) -> None:
    """Print the seals as JSON lines. Keep them where the owner of the database cannot write.

    `archiver verify --against FILE` later compares the ledger with them.
    """
    with (
        connection.ready(settings.read()) as engine,
        database.snapshot(engine, statement_seconds=READ_SECONDS) as opened,
    ):
        for line in _lines(seals.select_seals(opened, after)):
            click.echo(line)


def _lines(found: Iterator[tuple[Seal, Any]]) -> Iterator[str]:
    return (json.dumps(_seal_json(each)) for each, _ in found)


def _seal_json(each: Seal) -> dict[str, Any]:
    return {
        "id": each.id,
        "sealed_at": each.sealed_at.isoformat(),
        "leaves": each.size,
        "events_through": each.through["events"],
        "hash": each.hash.hex(),
        "statement": each.statement.decode(),
        "key_id": each.key_id,
        "signature": None if each.signature is None else each.signature.hex(),
    }
