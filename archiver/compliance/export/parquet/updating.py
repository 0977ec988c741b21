"""Update an export in Parquet: record it, read one snapshot, and replace the files of the days that changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, text

from archiver import __version__, database
from archiver.compliance.export import manifest, queries
from archiver.compliance.export.manifest import Counts, File, Manifest, Parquet
from archiver.compliance.export.parquet import days, files, staging
from archiver.compliance.export.parquet.days import Plan
from archiver.compliance.export.parquet.files import FileColumn, Writer
from archiver.compliance.export.parquet.staging import Staging
from archiver.compliance.export.writing import (
    ACT,
    DONE,
    PROGRESS_EVERY,
    READ_SECONDS,
    CompletedExport,
    ExportRequest,
    Progress,
    select_recorded_settings,
)
from archiver.compliance.seals import key_id
from archiver.database import copy_out
from archiver.ledger import audit_log


def update(
    engine: Engine,
    output: Path,
    request: ExportRequest,
    *,
    since: int | None = None,
    key: Ed25519PrivateKey | None = None,
    on_progress: Progress = lambda *_: None,
) -> CompletedExport:
    """Bring the folder `output` up to date, signed if there is a key; if it is new, write everything.

    `since`: write the days of the sessions that changed after this cursor of the feed; without it, after the cursor
    in the folder's manifest. The audit log records the export before anything is read, and again at the end.
    Raises `FolderError`, `MissingLibraryError` and `WrongCursorError`.
    """
    files.require()
    with staging.opened(output) as folder:
        detail = {**request.description(), "formats": list(request.formats)}
        detail |= {} if since is None else {"since_cursor": since}
        with database.transaction(engine) as connection:
            act = audit_log.insert_entry(connection, ACT, request.actor, request.reason, detail)
        with database.snapshot(engine, statement_seconds=READ_SECONDS) as connection:
            described = {table: files.columns(connection, table) for table in queries.TRANSCRIPTS}
            types = {table: {each.name: each.arrow for each in result} for table, result in described.items()}
            plan = days.plan(connection, folder, since, types)
            written = _write(connection, folder, plan, described, on_progress)
            state = Parquet(
                cursor=plan.cursor,
                epoch=plan.epoch,
                since=plan.since,
                why=plan.why,
                written=_days_with_files(folder, plan, written),
                erased=[each.isoformat() for each in plan.erased],
                columns=types,
            )
            new = _manifest(connection, request, act, written=written, state=state, key=key)
        digest = folder.commit(new, key)
    counts = {name: getattr(new.counts, name) for name in queries.TRANSCRIPTS}
    with database.transaction(engine) as connection:
        detail = {"act": act, "manifest_sha256": digest, "cursor": plan.cursor, **counts}
        audit_log.insert_entry(connection, DONE, request.actor, request.reason, detail)
    return CompletedExport(new, digest)


def _days_with_files(folder: Staging, plan: Plan, written: Mapping[str, File]) -> list[str]:
    """Return the written days that have files now or had files before."""
    former = {} if folder.former is None else folder.former.files
    found = {files.table_and_day(name)[1] for name in (*former, *written)}
    return [each.isoformat() for each in plan.days if each in found]


def _write(
    connection: Connection,
    folder: Staging,
    plan: Plan,
    described: Mapping[str, Sequence[FileColumn]],
    on_progress: Progress,
) -> dict[str, File]:
    """Write the files of these days. Return the entries of all files, those that are kept included."""
    former = {} if folder.former is None else folder.former.files
    replaced = set(plan.days)
    result = {name: file for name, file in former.items() if files.table_and_day(name)[1] not in replaced}
    for table, columns in described.items():
        writer, name = None, ""
        try:
            for day, row in _rows(connection, plan, table, columns):
                if writer is None or name != files.file_name(table, day):
                    if writer is not None:
                        result[name] = writer.complete()
                    name = files.file_name(table, day)
                    writer = Writer(folder.path(name), columns)
                writer.write(row)
                if not writer.rows % PROGRESS_EVERY:
                    on_progress(name, writer.rows)
            if writer is not None:
                result[name] = writer.complete()
        finally:
            if writer is not None:
                writer.close()
    return dict(sorted(result.items()))


def _rows(
    connection: Connection, plan: Plan, table: str, columns: Sequence[FileColumn]
) -> Iterator[tuple[date, Sequence[Any]]]:
    """Yield the rows of a table with their days, sorted by day."""
    types = ["date", *(each.postgres for each in columns)]
    for query in days.rows_of(plan, table, columns):
        with closing(copy_out.records(connection, query, types)) as records:
            for day, *row in records:
                yield day, row


def _manifest(
    connection: Connection,
    request: ExportRequest,
    act: int,
    *,
    written: dict[str, File],
    state: Parquet,
    key: Ed25519PrivateKey | None,
) -> Manifest:
    counts = Counts(quarantined=connection.scalar(text("SELECT count(*) FROM archiver.quarantine")) or 0)
    for name, file in written.items():
        table = files.table_and_day(name)[0]
        setattr(counts, table, getattr(counts, table) + file.rows)
    return Manifest(
        version=manifest.VERSION,
        archiver=__version__,
        made_at=datetime.now(UTC),
        act=act,
        actor=request.actor,
        reason=request.reason,
        asked=request.description(),
        formats=list(request.formats),
        settings={"here": dict(request.settings), "recorded": select_recorded_settings(connection)},
        counts=counts,
        coverage={},
        complete_through=connection.scalars(text("SELECT analytics.complete_through()")).one(),
        head=None,
        signed_by=None if key is None else key_id(key.public_key()),
        files=written,
        parquet=state,
    )
