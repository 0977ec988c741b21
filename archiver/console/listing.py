"""Lists: a page of rows with the address of the next page, as HTML, JSON or CSV."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection

from archiver.compliance import export
from archiver.console.filters import Filter
from archiver.console.permissions import Permission

ROWS = 50  # of a page
MAX_ROWS = 1_000  # of a twin

Kind = Literal["text", "id", "code", "time", "number", "state", "snippet"]


class Column(msgspec.Struct, frozen=True):
    """A column: the name in rows and twins, the heading, and how its values are shown.

    `is_optional`: only shown if the user chooses it. `is_sparse`: a page leaves it out if no row has a value.
    """

    name: str
    heading: str
    kind: Kind = "text"
    is_content: bool = False
    is_optional: bool = False
    is_sparse: bool = False


class Query(msgspec.Struct, frozen=True):
    """A request for rows of a list: parameters of the address, the key before the first row, and the number of rows.

    `may_read`: whether the role shows content, and so may search it. `suggests`: whether terms are to be suggested.
    """

    parameters: Mapping[str, str]
    may_read: bool
    after: str = ""
    limit: int = ROWS
    suggests: bool = False


class Page(msgspec.Struct, frozen=True):
    """Rows in order. `after`: the key of the next page; empty if there is none. `note`: how far it was examined.

    `suggestions`: terms for the filter.
    """

    rows: Sequence[Mapping[str, Any]]
    after: str = ""
    note: str = ""
    suggestions: Sequence[str] = ()


class Listing(msgspec.Struct, frozen=True):
    """A list of the console. `path`: below /console. `link` returns the address of a row, relative to /console/,
    for roles with `link_permission`.

    `parameters`: the names of the parameters that it uses. `empty`: a sentence for a list without rows.
    `parse`: parses its filter `q`. `examples`: of the terms of that filter. `links`: paths and names of pages about
    the same. `actions`: pages of actions, each with its path, its name and the permission that it needs. `command`:
    the command that does the same.
    """

    path: str
    title: str
    permission: Permission
    columns: Sequence[Column]
    select: Callable[[Connection, Query], Page]
    empty: str
    link: Callable[[Mapping[str, Any]], str] | None = None
    link_permission: Permission = "content"
    parameters: Sequence[str] = ()
    parse: Callable[[str], Filter] | None = None
    examples: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()
    actions: Sequence[tuple[str, str, Permission]] = ()
    command: str = ""


def encode_json(columns: Sequence[Column], page: Page) -> bytes:
    """Return the rows as JSON, with the key of the next page or null."""
    rows = [{column.name: row[column.name] for column in columns} for row in page.rows]
    return msgspec.json.encode({"rows": rows, "after": page.after or None, "note": page.note or None})


def encode_csv(columns: Sequence[Column], page: Page) -> bytes:
    """Return the rows as CSV (RFC 4180) that no spreadsheet runs; see docs/export.md for the form of such cells."""
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerow([column.name for column in columns])
    for row in page.rows:
        writer.writerow([_cell(row[column.name], column.kind) for column in columns])
    return written.getvalue().encode()


def _cell(value: Any, kind: Kind) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if kind == "number" else export.neutralise_cell(str(value))
