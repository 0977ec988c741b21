"""Write and search Parquet files. The only module that uses `pyarrow`, which is imported when it is needed."""

import os
from collections.abc import Sequence
from datetime import date
from hashlib import file_digest
from pathlib import Path
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import Connection

from archiver.compliance.export import queries
from archiver.compliance.export.manifest import File
from archiver.errors import ArchiverError

GROUP_ROWS, GROUP_BYTES = 50_000, 16 * 1024 * 1024  # limits of a row group, which is kept in memory
COST_DIGITS = 18  # after the decimal point; 20 remain before it


class MissingLibraryError(ArchiverError):
    """The optional library that writes Parquet is not installed."""


def require() -> None:
    """Raise `MissingLibraryError` unless the library is installed."""
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415  # an extra, and slow to import
    except ImportError:
        raise MissingLibraryError(
            "Parquet needs pyarrow, which is not installed: pip install 'callhq-archiver[parquet]'"
        ) from None


class FileColumn(msgspec.Struct, frozen=True):
    """A column: its name, the SQL of its value, and the names of its types in Postgres and in Arrow."""

    name: str
    value: sql.Composable
    postgres: str
    arrow: str


# By oid in pg_type: SQL of the value, type in Postgres, type in Arrow. All others, such as jsonb, are text.
_TYPES = {
    16: ("{}", "bool", "bool"),
    20: ("{}", "int8", "int64"),
    23: ("{}", "int4", "int32"),
    1184: ("{}", "timestamptz", "timestamp[us, tz=UTC]"),
    1700: (f"round({{}}, {COST_DIGITS})", "numeric", f"decimal128(38, {COST_DIGITS})"),
}
_TEXT = ("{}::text", "text", "string")


def columns(connection: Connection, table: str) -> list[FileColumn]:
    """Return the columns of this table's files: those of its view."""
    driver: Any = connection.connection.driver_connection
    described = connection.exec_driver_sql(queries.columns(table).as_string(driver)).cursor.description
    return [_column(name, oid) for name, oid, *_ in described]


def _column(name: str, oid: Any) -> FileColumn:
    value, postgres, arrow = _TYPES.get(oid, _TEXT)
    # Unassigned turns are in no transcript.
    form = "CASE WHEN v.session_id <> '' THEN {} END" if name == "position" else "{}"
    column = sql.SQL("v.{}").format(sql.Identifier(name))
    return FileColumn(name, sql.SQL(form.format(value)).format(column), postgres, arrow)


def file_name(table: str, day: date) -> str:
    """Return the name of a file in the export, with the folder of its day as Hive names it."""
    return f"{table}/day={day.isoformat()}/{table}.parquet"


def table_and_day(name: str) -> tuple[str, date]:
    """Return the table and the day of a file of the export."""
    table, folder, _ = name.split("/")
    return table, date.fromisoformat(folder.removeprefix("day="))


class Writer:
    """A file written row by row. Only ids, numbers and times have statistics, so no content is in its footer."""

    def __init__(self, path: Path, described: Sequence[FileColumn]) -> None:
        import pyarrow as pa  # noqa: PLC0415  # an extra, and slow to import
        from pyarrow import parquet  # noqa: PLC0415

        types = {
            "bool": pa.bool_(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "string": pa.string(),
            "timestamp[us, tz=UTC]": pa.timestamp("us", "UTC"),
            f"decimal128(38, {COST_DIGITS})": pa.decimal128(38, COST_DIGITS),
        }
        self._pa = pa
        self._schema = pa.schema([(each.name, types[each.arrow]) for each in described])
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._parquet = parquet.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            write_statistics=[each.name for each in described if each.arrow != "string" or each.name.endswith("_id")],
        )
        self._waiting: list[Sequence[Any]] = []
        self._size = 0
        self.rows = 0

    def write(self, row: Sequence[Any]) -> None:
        """Write one row, with the values in the order of the columns."""
        self._waiting.append(row)
        self._size += sum(len(value) for value in row if isinstance(value, str))
        self.rows += 1
        if len(self._waiting) >= GROUP_ROWS or self._size >= GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        arrays = [
            self._pa.array(values, field.type)
            for values, field in zip(zip(*self._waiting, strict=True), self._schema, strict=True)
        ]
        self._parquet.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting.clear()
        self._size = 0

    def complete(self) -> File:
        """Write the rest and the footer, sync the file, and return its entry for the manifest."""
        if self._waiting:
            self._write_group()
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self._path.open("rb") as written:
            digest = file_digest(written, "sha256").hexdigest()
        return File(self._path.stat().st_size, self.rows, digest)

    def close(self) -> None:
        """Close the file; does nothing after `complete`."""
        self._file.close()


class ChangedRows(msgspec.Struct):
    """The rows to find: all rows of these sessions, and these unassigned turns."""

    session_ids: set[str] = msgspec.field(default_factory=set)
    chat_ids: set[str] = msgspec.field(default_factory=set)

    def __bool__(self) -> bool:
        """Return whether there are any rows to find."""
        return bool(self.session_ids or self.chat_ids)


class Search:
    """A search for rows in files."""

    def __init__(self, rows: ChangedRows) -> None:
        import pyarrow as pa  # noqa: PLC0415  # an extra, and slow to import

        self._is_any = bool(rows)
        self._sessions = pa.array(sorted(rows.session_ids), pa.string())
        self._chats = pa.array(sorted(rows.chat_ids), pa.string())

    def is_in(self, path: Path) -> bool:
        """Return whether the file contains any of the rows, or cannot be read.

        Reads two columns at most, a row group at a time.
        """
        if not self._is_any:
            return False
        try:
            return self._is_in(path)
        except (OSError, ValueError):  # Arrow also raises ValueError
            return True

    def _is_in(self, path: Path) -> bool:
        from pyarrow import compute, parquet  # noqa: PLC0415  # an extra, and slow to import

        with parquet.ParquetFile(path) as file:
            has_unassigned = "chat_id" in file.schema_arrow.names and len(self._chats)
            names = ["session_id", "chat_id"] if has_unassigned else ["session_id"]
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, columns=names)
                found = compute.is_in(group["session_id"], self._sessions)
                if has_unassigned:
                    unassigned = compute.equal(group["session_id"], "")
                    chats = compute.is_in(group["chat_id"], self._chats)
                    found = compute.or_(found, compute.and_(unassigned, chats))
                if compute.any(found).as_py():
                    return True
        return False
