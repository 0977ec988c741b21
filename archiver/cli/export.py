"""`archiver export`: export conversations with their proofs, or check an export."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click
import msgspec
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from archiver import settings
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
from archiver.compliance import export
from archiver.compliance.erasure import Criteria
from archiver.compliance.export import Checked, CompletedExport, ExportRequest, Finding, Manifest, Selection
from archiver.compliance.seals import signing_key
from archiver.ledger import audit_log


@click.command("export")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to create; if it exists, it must be empty, or, with --format parquet, an export to update.",
)
@click.option("--session", "session_ids", multiple=True, metavar="ID", help="One session; may be repeated.")
@options.since_option
@options.until_option
@click.option(
    "--hold",
    "hold_ids",
    multiple=True,
    type=Whole(1, 2**63 - 1),
    help="All sessions that this hold covers or covered.",
)
@click.option("--all", "is_all", is_flag=True, help="Everything.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice([*export.FORMATS, export.PARQUET]),
    help="Format of the transcripts; may be repeated, except for parquet.  [default: jsonl]",
)
@click.option(
    "--since-cursor",
    type=Whole(0, 2**63 - 1),
    metavar="N",
    help="With --format parquet: update the export with the changes after this cursor of the change feed, instead of"
    " those after the cursor in its manifest.",
)
@click.option(
    "--raw-csv",
    is_flag=True,
    help="Do not neutralise CSV cells that a spreadsheet would run as a formula.",
)
@click.option("--reason", type=options.Audited(), help="Reason for the audit log.")
@options.actor_option
@click.option(
    "--check",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Check the export in this folder instead; needs no database. Accepts --key, --signed-since, --against,"
    " --manifest and --unsigned.",
)
@verify_options.key_option()
@verify_options.signed_since_option
@verify_options.against_option
@click.option(
    "--manifest",
    "digest",
    metavar="SHA256",
    help="SHA-256 of the manifest according to `archiver audit`, for an unsigned export.",
)
@click.option(
    "--unsigned",
    "accepts_unsigned",
    is_flag=True,
    help="With --check: accept an unsigned export without --manifest.",
)
@options.json_option
def command(
    *,
    output: Path | None,
    session_ids: tuple[str, ...],
    since: str | None,
    until: str | None,
    hold_ids: tuple[int, ...],
    is_all: bool,
    formats: tuple[str, ...],
    since_cursor: int | None,
    raw_csv: bool,
    reason: str | None,
    actor: str | None,
    folder: Path | None,
    key_files: tuple[Path, ...],
    signed_since: int,
    against: IO[bytes] | None,
    digest: str | None,
    accepts_unsigned: bool,
    as_json: bool,
) -> None:
    """Export conversations with proofs of their origin, or check such an export.

    The folder contains transcripts, the ledger's events, their seals and a manifest. The audit log records each
    export. --check names each difference from the exported or sealed state, and exits 1 if there is any. It also
    exits 1 if the export is not signed, unless --manifest gives its SHA-256 or --unsigned accepts it.
    """
    chosen = _Chosen(session_ids, since, until, hold_ids, is_all)
    if folder is not None:
        if output is not None:
            raise click.UsageError("use either --output (export) or --check (check an export), not both")
        if chosen.count or formats or raw_csv or since_cursor is not None:
            raise click.UsageError("--check checks a whole export and accepts no selection or format")
        known = None if against is None else verify_options.read_known_seals(against)
        keys = export.Keys(verify_options.public_keys(key_files), signed_since)
        digest = None if digest is None else digest.lower()
        _check(folder, keys, known, digest, accepts_unsigned=accepts_unsigned, as_json=as_json)
        return
    if output is None:
        raise click.UsageError("specify --output DIR to export, or --check DIR to check an export")
    if any(map(verify_options.is_on_command_line, _CHECK_PARAMETERS)):
        raise click.UsageError("--key, --signed-since, --against, --manifest and --unsigned require --check")
    if raw_csv and "csv" not in formats:
        raise click.UsageError("--raw-csv requires --format csv")
    is_parquet = _is_parquet(formats, since_cursor, chosen)
    request = ExportRequest(
        Selection(is_all=True) if is_parquet else chosen.selection(),
        tuple(dict.fromkeys(formats)) or ("jsonl",),
        actor or audit_log.actor(),
        reason,
        sorted({*hold_ids}),
        raw_csv=raw_csv,
    )
    _export(output, request, since_cursor, as_json=as_json)


_CHECK_PARAMETERS = ("key_files", "signed_since", "against", "digest", "accepts_unsigned")


class _Chosen(msgspec.Struct, frozen=True):
    """The options that select what to export."""

    session_ids: tuple[str, ...]
    since: str | None
    until: str | None
    hold_ids: tuple[int, ...]
    is_all: bool

    @property
    def count(self) -> int:
        """Return how many kinds of selection are given; `--since` and `--until` are one."""
        return sum(map(bool, (self.session_ids, self.since or self.until, self.hold_ids, self.is_all)))

    def selection(self) -> Selection:
        """Return the selected sessions, except those of holds; fail with a usage error unless one kind is given."""
        if self.count > 1:
            raise click.UsageError("use only one of --session, --since/--until, --hold and --all")
        if not self.count:
            raise click.UsageError("specify what to export: --session, --since and --until, --hold, or --all")
        options.check_ids(self.session_ids, "session")
        first, end = options.period(self.since, self.until)
        times = Criteria(since=first, until=end)
        return Selection(sorted({*self.session_ids}), [] if times.is_empty else [times], self.is_all)


def _is_parquet(formats: tuple[str, ...], since_cursor: int | None, chosen: _Chosen) -> bool:
    """Return whether an export in Parquet is requested; fail with a usage error if other options exclude it."""
    if export.PARQUET not in formats and since_cursor is None:
        return False
    is_selected = chosen.count > chosen.is_all
    if set(formats) != {export.PARQUET} or is_selected or not (chosen.is_all or since_cursor is not None):
        raise click.UsageError(
            "--format parquet requires --all or --since-cursor, and accepts no other selection or format;"
            " --since-cursor requires --format parquet"
        )
    return True


def _export(output: Path, request: ExportRequest, since_cursor: int | None = None, *, as_json: bool) -> None:
    configuration = settings.read()
    key = signing_key(configuration)
    request = msgspec.structs.replace(request, settings=_recorded_settings(configuration))
    _stop_once()
    try:
        with (
            connection.ready(configuration) as engine,
            progress(SpinnerColumn(), TextColumn("Exporting {task.fields[progress]}"), TimeElapsedColumn()) as bar,
        ):
            task = bar.add_task("", total=None, progress="")

            def show_progress(name: str, rows: int) -> None:
                bar.update(task, progress=f"{name}: {rows:,}")

            if export.PARQUET in request.formats:
                completed = export.update(
                    engine, output, request, since=since_cursor, key=key, on_progress=show_progress
                )
            else:
                completed = export.make(engine, output, request, key, show_progress)
    except DBAPIError:
        if (output / "manifest.json").exists():  # otherwise the export has not begun
            complain(f"the export in {output} is complete, but its completion could not be recorded in the audit log")
        raise
    try:
        _report(output, completed, as_json=as_json)
        sys.stdout.flush()
    except OSError:
        complain(f"the export in {output} is complete; only this report could not be written")
        raise


def _stop_once() -> None:
    """Treat the first termination signal as Ctrl-C; ignore later ones, while the partial export is removed."""
    signals = [each for each in _ENDING if signal.getsignal(each) != signal.SIG_IGN]

    def stop(_number: int, _frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, stop)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _recorded_settings(configuration: settings.Settings) -> dict[str, Any]:
    """Return the settings that determine what an archive contains and for how long; none is secret."""
    return {
        "on_delete": configuration.on_delete,
        "erase_after": configuration.erase_after,
        "retention_days": configuration.retention_days,
        "retention_by_assistant": configuration.retention_of_assistants,
        "retention_metadata_days": configuration.retention_metadata_days,
        "session_lifetime": configuration.session_lifetime,
        "reconcile_after": configuration.reconcile_after,
        "seal_every": configuration.seal_every,
    }


def _report(output: Path, completed: CompletedExport, *, as_json: bool) -> None:
    if as_json:
        print_json(completed.manifest)
        return
    if completed.manifest.parquet is not None:
        _report_parquet(output, completed.manifest, completed.manifest.parquet)
    else:
        _report_files(output, completed.manifest)
    if quarantined := completed.manifest.counts.quarantined:
        deliveries = counted(quarantined, "delivery", "deliveries")
        click.echo(f"The quarantine contains {deliveries}. Quarantined deliveries are not exported.")
    click.echo(f"SHA-256 of the manifest: {completed.digest}")


def _report_parquet(output: Path, manifest: Manifest, state: export.Parquet) -> None:
    totals = manifest.counts
    click.echo(
        f"{output} contains {counted(totals.conversations, 'conversation')}, {counted(totals.chats, 'turn')} and"
        f" {counted(totals.messages, 'message')}, up to cursor {state.cursor}."
    )
    days = counted(len(state.written), "day")
    if state.since is None:
        click.echo(f"Wrote all of {days}: {state.why}.")
    else:
        click.echo(f"Wrote {days} again for the changes after cursor {state.since}.")
    if state.erased:
        click.echo(f"Removed erased content from {counted(len(state.erased), 'day')}: {', '.join(state.erased)}.")


def _report_files(output: Path, manifest: Manifest) -> None:
    table = Table("file", "rows", "bytes", "SHA-256")
    for name, file in manifest.files.items():
        table.add_row(name, f"{file.rows:,}", f"{file.bytes:,}", file.sha256)
    console().print(table)
    counts = manifest.counts
    click.echo(f"Exported {_event_counts(counts.events, counts.erased, counts.unsealed)} to {output}.")


def _event_counts(events: int, erased: int, unsealed: int) -> str:
    return f"{counted(events, 'event')} ({erased:,} erased, {unsealed:,} not yet sealed)"


def _check(
    folder: Path,
    keys: export.Keys,
    known: tuple[dict[int, bytes], dict[str, int]] | None,
    digest: str | None,
    *,
    accepts_unsigned: bool,
    as_json: bool,
) -> None:
    checked, findings = Checked(), []
    heads, through = known or (None, None)
    with progress(TextColumn("Checking {task.fields[progress]}"), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=None, progress="")

        def show_progress(so_far: Checked) -> None:
            bar.update(task, progress=f"{counted(so_far.events, 'event')}, {counted(so_far.seals, 'seal')}")

        for finding in export.check(
            folder, keys=keys, heads=heads, through=through, digest=digest, checked=checked, on_progress=show_progress
        ):
            if accepts_unsigned and finding.fault == "unsigned":
                continue
            findings.append(finding)
            if not as_json and len(findings) <= MAX_SHOWN_FINDINGS:
                bar.console.print(Text(escaped(finding), "bold"), soft_wrap=True)
    vouching = _vouching(checked, keys, is_digest_given=digest is not None)
    is_accepted = accepts_unsigned or not _is_unsigned(checked, is_digest_given=digest is not None)
    if as_json:
        _print_checked(checked, findings, keys, is_ok=not findings and is_accepted)
    elif checked.manifest is not None:
        _report_check(checked, checked.manifest, keys, is_compared=heads is not None)
    if findings:
        complain(count_findings(len(findings), "docs/export.md", are_shown=not as_json))
    if vouching and not as_json:
        click.echo(f"{'archiver: ' if not is_accepted else ''}{vouching}", err=not is_accepted)
    if findings or not is_accepted:
        sys.exit(1)


def _is_unsigned(checked: Checked, *, is_digest_given: bool) -> bool:
    """Return whether neither a signature nor a given digest vouches for the export."""
    return checked.manifest is not None and checked.manifest.signed_by is None and not is_digest_given


def _vouching(checked: Checked, keys: export.Keys, *, is_digest_given: bool) -> str:
    """Describe what the check cannot vouch for, and the option that helps; empty if a key or digest vouches."""
    if checked.manifest is None or checked.is_signed or is_digest_given:
        return ""
    if checked.manifest.signed_by is not None and keys.by_id:
        return ""  # a wrong signature is a finding
    doubt = "transcripts, counts and unsealed rows may have been changed by anyone who could write to this folder"
    if checked.manifest.signed_by is not None:
        return f"The signature was not checked: {doubt}. Give the public key: --key FILE."
    return (
        f"The export is not signed: {doubt}. Give the SHA-256 of the manifest, as in the audit log, with --manifest"
        " SHA256, or accept the export with --unsigned."
    )


def _print_checked(checked: Checked, findings: list[Finding], keys: export.Keys, *, is_ok: bool) -> None:
    result = {
        "ok": is_ok,
        "events": checked.events,
        "seals": checked.seals,
        "unsealed": checked.unsealed.get("events"),
        "unsealed_erasures": checked.unsealed.get("erasures"),
        "unsealed_acts": checked.unsealed.get("acts"),
        "compared": checked.compared,
        "manifest_sha256": checked.digest,
        "manifest_signed_by": None if checked.manifest is None else checked.manifest.signed_by,
        "signatures_checked": bool(keys.by_id),
        "manifest_signature_checked": checked.is_signed,
        "findings": [msgspec.structs.asdict(each) | {"detail": str(each)} for each in findings],
    }
    print_json(result)


def _report_check(checked: Checked, manifest: Manifest, keys: export.Keys, *, is_compared: bool) -> None:
    if manifest.parquet is not None:
        click.echo(f"{counted(len(manifest.files), 'file')} in Parquet, up to cursor {manifest.parquet.cursor}.")
    else:
        loose = ", ".join(f"{count:,} {table}" for table, count in checked.unsealed.items())
        seen = f"{counted(checked.events, 'event')} in {counted(checked.seals, 'seal')}"
        click.echo(f"{seen}; not yet sealed: {loose}.")
    if is_compared:
        click.echo(f"Compared with {counted(checked.compared, 'seal')} exported earlier.")
    click.echo(f"SHA-256 of the manifest: {checked.digest}{_signed(checked, keys)}")
    click.echo(
        f'The audit log records this export in the entry of kind export.done with detail "act": {manifest.act}:'
        " archiver audit --kind export.done"
    )


def _signed(checked: Checked, keys: export.Keys) -> str:
    if checked.manifest is None or checked.manifest.signed_by is None:
        return ", not signed"
    signer = escaped(checked.manifest.signed_by)
    if checked.is_signed:
        return f", signed by {signer}"
    return f", signed by {signer}" + (" (invalid signature)" if keys.by_id else " (not checked: give --key)")
