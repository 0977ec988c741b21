"""Exports in Parquet: what pyarrow reads from their files, and what the views contain."""

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from pyarrow import parquet
from sqlalchemy import Engine

from archiver.compliance import export
from archiver.compliance.export import CompletedExport, ExportRequest, Selection
from tests.support.feeds import publish

TABLES = ("conversations", "chats", "messages")
REQUEST = ExportRequest(Selection(is_all=True), (export.PARQUET,), "anna@desk", "case 7")

# The views as the files have them: with a day, unassigned turns without a position.
_VIEWS = {
    "conversations": (
        "(v.started_at AT TIME ZONE 'UTC')::date",
        "(SELECT v.*, k.reason FROM analytics.conversations v JOIN analytics.coverage k USING (session_id))",
    ),
    "chats": ("(v.began_at AT TIME ZONE 'UTC')::date", "analytics.chats"),
    "messages": ("(v.began_at AT TIME ZONE 'UTC')::date", "analytics.messages"),
}


def update(engine: Engine, folder: Path, *, publishes: bool = True, **options: Any) -> CompletedExport:
    """Bring the folder up to date, usually after all changes were published."""
    if publishes:
        publish(engine)
    return export.update(engine, folder, REQUEST, **options)


def contained(folder: Path, tables: Sequence[str] = TABLES) -> dict[str, list[Any]]:
    """The rows of each table, each with the day of its folder."""
    return {
        table: sorted(
            [
                [path.parent.name.removeprefix("day="), *map(_plain, row.items())]
                for path in (folder / table).glob("day=*/*.parquet")
                for row in parquet.ParquetFile(path).read().to_pylist()
            ],
            key=str,
        )
        for table in tables
    }


def viewed(engine: Engine) -> dict[str, list[Any]]:
    """The same of the views."""
    result = {}
    for table, (day, view) in _VIEWS.items():
        with engine.connect() as connection:
            found = connection.exec_driver_sql(f"SELECT {day} AS day, v.* FROM {view} v").mappings().all()
        result[table] = sorted(
            [
                [str(row["day"]), *(_plain(item) for item in _unassigned(dict(row)).items() if item[0] != "day")]
                for row in found
            ],
            key=str,
        )
    return result


def _unassigned(row: dict[str, Any]) -> dict[str, Any]:
    return row | ({"position": None} if row["session_id"] == "" and "position" in row else {})


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    name, value = item
    if isinstance(value, Decimal):
        return name, str(value.quantize(Decimal("1e-18")))
    if name == "variables" and isinstance(value, str):
        return name, json.loads(value)
    return name, value.timestamp() if hasattr(value, "timestamp") else value


def days(engine: Engine) -> set[str]:
    """The days of all rows."""
    return {row[0] for table in viewed(engine).values() for row in table}


def written(folder: Path) -> list[str]:
    """The days that the latest run wrote."""
    return json.loads((folder / "manifest.json").read_bytes())["parquet"]["written"]  # type: ignore[no-any-return]


def inodes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*.parquet")}
