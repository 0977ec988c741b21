"""Create an export: record it, read one snapshot, move it into place."""

import struct
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from psycopg import sql
from sqlalchemy import Connection, Engine, text

from archiver import __version__, database
from archiver.compliance.export import folder, manifest, proofs, queries
from archiver.compliance.export.folder import Sink, write_small
from archiver.compliance.export.manifest import Counts, Covered, File, Head, Manifest
from archiver.compliance.export.proofs import Ids
from archiver.compliance.export.selection import Selection, UnknownSelectionError, check_known, select_held
from archiver.compliance.export.spreadsheet import neutralise_line
from archiver.compliance.seals import key_id
from archiver.database import copy_out
from archiver.ledger import audit_log

ACT, DONE = "export", "export.done"
READ_SECONDS = 24 * 3600  # for one statement
PROGRESS_EVERY = 5_000  # rows between two progress reports

Progress = Callable[[str, int], None]  # a file's name, and the rows written so far


class ExportRequest(msgspec.Struct, frozen=True):
    """An export request: selection, formats, actor and reason.

    `hold_ids`: export the sessions and turns that these holds cover. `raw_csv`: CSV cells keep their exact
    text, even if a spreadsheet would run it as a formula.
    """

    selection: Selection
    formats: Sequence[str]
    actor: str
    reason: str | None = None
    hold_ids: Sequence[int] = ()
    settings: Mapping[str, Any] = {}
    raw_csv: bool = False

    def description(self) -> dict[str, Any]:
        """Return the selection for the manifest; for a hold, only its id, because its value may be personal."""
        described: dict[str, Any] = {"all": True} if self.selection.is_all else {}
        if self.selection.session_ids:
            described["sessions"] = list(self.selection.session_ids)
        if self.hold_ids:
            return described | {"holds": list(self.hold_ids)}
        for each in self.selection.criteria:
            described |= {
                n: t.isoformat() for n, t in (("since", each.since), ("until", each.until)) if t is not None
            }
        return described


class CompletedExport(msgspec.Struct, frozen=True):
    """A completed export. `digest`: SHA-256 of its manifest."""

    manifest: Manifest
    digest: str


def make(
    engine: Engine,
    output: Path,
    request: ExportRequest,
    key: Ed25519PrivateKey | None = None,
    on_progress: Progress = lambda *_: None,
) -> CompletedExport:
    """Write the export to the folder `output`, signed if there is a key.

    The audit log records it before anything is read, and again at the end. Raises `FolderError`, and
    `UnknownSelectionError` if a selected session or hold is unknown, or nothing matches the selection.
    """
    folder.check(output)
    detail = {**request.description(), "formats": list(request.formats)}
    with database.transaction(engine) as connection:
        act = audit_log.insert_entry(connection, ACT, request.actor, request.reason, detail)
    with folder.made(output) as partial:
        with database.snapshot(engine, statement_seconds=READ_SECONDS) as connection:
            connection.execute(text("SELECT set_config('DateStyle', 'ISO', true)"))
            exported_manifest = _Export(connection, partial, _resolved(connection, request), key, on_progress).write(
                act
            )
        _require_some(exported_manifest)
        encoded = manifest.encode(exported_manifest)
        digest = sha256(encoded).hexdigest()
        write_small(partial / manifest.DIGEST, f"{digest}  {manifest.MANIFEST}\n".encode())
        if key is not None:
            write_small(partial / manifest.SIGNATURE, key.sign(encoded))
        write_small(partial / manifest.MANIFEST, encoded)
    counts = {
        name: count
        for name, count in msgspec.structs.asdict(exported_manifest.counts).items()
        if name != "quarantined"
    }
    with database.transaction(engine) as connection:
        audit_log.insert_entry(
            connection, DONE, request.actor, request.reason, {"act": act, "manifest_sha256": digest, **counts}
        )
    return CompletedExport(exported_manifest, digest)


def _resolved(connection: Connection, request: ExportRequest) -> ExportRequest:
    check_known(connection, request.selection.session_ids)
    if not request.hold_ids:
        return request
    held = Selection(criteria=select_held(connection, request.hold_ids))
    held.prepare(connection)
    return msgspec.structs.replace(request, selection=held)


def _require_some(exported_manifest: Manifest) -> None:
    """Raise `UnknownSelectionError` for an empty export, which could be mistaken for one of another selection."""
    counts, erasures = exported_manifest.counts, exported_manifest.files[manifest.ERASURES]
    if not (counts.conversations or counts.chats or counts.events or erasures.rows):
        raise UnknownSelectionError("nothing archived matches the selection; nothing was exported")


class _Export:
    """A writer of the files of one export, from one snapshot."""

    def __init__(
        self,
        connection: Connection,
        partial: Path,
        request: ExportRequest,
        key: Ed25519PrivateKey | None,
        on_progress: Progress,
    ) -> None:
        self._connection = connection
        self._partial = partial
        self._request = request
        self._selection = request.selection
        self._key = key
        self._on_progress = on_progress
        self._files: dict[str, File] = {}
        self._counts = Counts()

    def write(self, act: int) -> Manifest:
        """Write the transcripts and the evidence. Return the manifest; the caller writes and signs it."""
        self._write_transcripts()
        head = self._write_evidence()
        complete_through = self._connection.scalar(text("SELECT analytics.complete_through()"))
        self._counts.quarantined = self._count(sql.SQL("SELECT id FROM archiver.quarantine"))
        return Manifest(
            version=manifest.VERSION,
            archiver=__version__,
            made_at=datetime.now(UTC),
            act=act,
            actor=self._request.actor,
            reason=self._request.reason,
            asked=self._request.description(),
            formats=list(self._request.formats),
            settings={"here": dict(self._request.settings), "recorded": select_recorded_settings(self._connection)},
            counts=self._counts,
            coverage=self._coverage(),
            complete_through=complete_through,
            head=head,
            signed_by=None if self._key is None else key_id(self._key.public_key()),
            files=self._files,
            csv=self._csv_cells(),
        )

    def _write_transcripts(self) -> None:
        names = [manifest.CONVERSATIONS]
        names += [name for each in self._request.formats for name in manifest.BY_FORMAT[each]]
        for name in names:
            kind, _, extension = name.partition(".")
            with Sink(self._partial / name) as sink:
                if kind == "openai":
                    self._write_json(name, sink, queries.as_openai(self._selection))
                elif extension == "csv":
                    self._write_csv(name, sink, kind)
                else:
                    for query in queries.as_json(self._selection, kind):
                        self._write_json(name, sink, query)
            self._files[name] = sink.description()
        for kind in queries.TRANSCRIPTS:
            written = next((name for name in names if name.startswith(f"{kind}.")), None)
            count = self._files[written].rows if written else sum(map(self._count, self._rows_of(kind)))
            setattr(self._counts, kind, count)

    def _rows_of(self, kind: str) -> list[sql.Composable]:
        return list(queries.rows_of(self._selection, kind, sql.SQL("1")))

    def _count(self, query: sql.Composable) -> int:
        driver: Any = self._connection.connection.driver_connection
        whole = sql.SQL("SELECT count(*) FROM ({}) AS counted").format(query).as_string(driver)
        return int(self._connection.exec_driver_sql(whole).scalar_one())

    def _write_json(self, name: str, sink: Sink, query: sql.Composable) -> None:
        with closing(copy_out.rows(self._connection, query)) as rows:
            for row in rows:
                sink.write(row[6:], b"\n")
                if not sink.rows % PROGRESS_EVERY:
                    self._on_progress(name, sink.rows)

    def _write_csv(self, name: str, sink: Sink, kind: str) -> None:
        numbers = self._numeric_columns(kind)
        for query in queries.as_csv(self._selection, kind):
            with closing(copy_out.lines(self._connection, query)) as lines:
                for line in lines:
                    sink.write(line if self._request.raw_csv else neutralise_line(bytes(line), numbers))
                    if not sink.rows % PROGRESS_EVERY:
                        self._on_progress(name, sink.rows)
        sink.rows -= 1  # the header

    def _numeric_columns(self, kind: str) -> set[int]:
        """Return the indexes of numeric columns, whose values a spreadsheet cannot run as formulas."""
        driver: Any = self._connection.connection.driver_connection
        query = queries.columns(kind).as_string(driver)
        described = self._connection.exec_driver_sql(query).cursor.description
        return {index for index, column in enumerate(described) if column[1] in _NUMERIC_TYPES}

    def _csv_cells(self) -> manifest.CsvCells | None:
        if "csv" not in self._request.formats:
            return None
        return "raw" if self._request.raw_csv else "neutralised"

    def _write_evidence(self) -> Head | None:
        with ExitStack() as stack:
            exported = {name: stack.enter_context(closing(Ids(self._partial))) for name in proofs.EXPORTED}
            with Sink(self._partial / manifest.EVENTS) as sink:
                self._counts.erased = self._write_events(sink, exported["events"])
            self._files[manifest.EVENTS] = sink.description()
            self._counts.events = sink.rows
            for name, query in (("erasures", queries.erasures), ("acts", queries.acts)):
                with Sink(self._partial / f"{name}.jsonl") as sink:
                    self._write_numbered(sink, query(self._selection), exported[name])
                self._files[f"{name}.jsonl"] = sink.description()
            with Sink(self._partial / manifest.SEALS) as sink:
                newest = proofs.write_seals(self._connection, sink, exported, is_all=self._selection.is_all)
            self._files[manifest.SEALS] = sink.description()
            self._counts.unsealed = exported["events"].count_rest()
        return Head(newest.id, newest.hash.hex()) if newest.id else None

    def _write_numbered(self, sink: Sink, query: sql.Composable, ids: Ids) -> None:
        with closing(copy_out.rows(self._connection, query)) as rows:
            for row in rows:
                ids.append(int.from_bytes(row[6:14], "big", signed=True))
                sink.write(row[18:], b"\n")

    def _write_events(self, sink: Sink, ids: Ids) -> int:
        """Write each event with its body: text if it is UTF-8, otherwise base64. Return the number without a body."""
        erased = 0
        encode = msgspec.json.encode
        with closing(copy_out.rows(self._connection, queries.events(self._selection))) as rows:
            for row in rows:
                ids.append(int.from_bytes(row[6:14], "big", signed=True))
                end = 18 + int.from_bytes(row[14:18], "big")
                bytes_of_it, body = _bytes_of(row, end)
                head = row[18 : end - 1]  # without the closing brace
                if body is None:
                    erased += 1
                    sink.write(head, bytes_of_it, b',"body":null}\n')
                else:
                    try:
                        sink.write(head, bytes_of_it, b',"body":', encode(str(body, "utf-8")), b"}\n")
                    except UnicodeDecodeError:
                        sink.write(head, bytes_of_it, b',"body":null,"body_base64":"', b64encode(body), b'"}\n')
                if not sink.rows % PROGRESS_EVERY:
                    self._on_progress(manifest.EVENTS, sink.rows)
        return erased

    def _coverage(self) -> dict[str, int]:
        result: Counter[str] = Counter()
        decode = msgspec.json.Decoder(Covered).decode
        with (self._partial / manifest.CONVERSATIONS).open("rb") as file:
            result.update(decode(line).coverage for line in file)
        return dict(sorted(result.items()))


def select_recorded_settings(connection: Connection) -> dict[str, Any]:
    """Return the settings of the latest starts of `serve` and `worker`, from the audit log."""
    return {row.part: row.detail | {"since": row.at} for row in connection.execute(_LATEST_SETTINGS)}


_NUMERIC_TYPES = {20, 21, 23, 700, 701, 1700}  # their oids in pg_type: int8, int2, int4, float4, float8, numeric
_USUAL = struct.Struct(">i32si32si16si").unpack_from


def _bytes_of(row: memoryview, place: int) -> tuple[bytes, memoryview | None]:
    """Return the byte fields of an event as part of its line, and the body. The fields begin at `place`."""
    try:
        one, digest, two, key, three, salt, size = _USUAL(row, place)
    except struct.error:
        return _unusual_bytes_of(row, place)
    if (one, two, three) != (32, 32, 16) or size < 0:
        return _unusual_bytes_of(row, place)
    columns = f',"body_digest":"{digest.hex()}","dedupe_key":"{key.hex()}","salt":"{salt.hex()}"'
    return columns.encode(), row[len(row) - size :]


def _unusual_bytes_of(row: memoryview, place: int) -> tuple[bytes, memoryview | None]:
    """Return the result of `_bytes_of` for an erased or modified event."""
    values: list[memoryview | None] = []
    for _ in range(4):
        size = int.from_bytes(row[place : place + 4], "big", signed=True)
        values.append(None if size < 0 else row[place + 4 : place + 4 + size])
        place += 4 + max(size, 0)
    columns = zip(("body_digest", "dedupe_key", "salt"), values, strict=False)
    lines = [f',"{name}":' + ("null" if value is None else f'"{value.hex()}"') for name, value in columns]
    return "".join(lines).encode(), values[3]


_LATEST_SETTINGS = text(
    f"SELECT DISTINCT ON (detail ->> 'part') detail ->> 'part' AS part, detail, at FROM archiver.acts"  # noqa: S608  # only a constant name is inserted, never input
    f" WHERE kind = '{audit_log.SETTINGS_CHANGED}' ORDER BY detail ->> 'part', id DESC"
)
