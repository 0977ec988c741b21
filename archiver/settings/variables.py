"""Variables of turns that are columns of `analytics.sessions`, and the names of those columns."""

import re
from collections.abc import Iterator
from typing import Literal, get_args

import msgspec

VariableType = Literal["text", "number", "boolean", "time"]
_TYPES = get_args(VariableType)

MAX_COLUMNS = 50
MAX_BYTES = 63  # of a name in Postgres

# The view has these columns, or Postgres reserves them for each table.
RESERVED = frozenset(
    (
        *("session_id", "assistant_id", "started_at", "last_message_at", "turns", "messages", "user_messages"),
        *("assistant_messages", "cost", "deleted_chats", "repaired_messages", "coverage", "reason"),
        *("first_question", "first_answer", "answer_seconds", "variables", "changed_cursor"),
        *("ctid", "xmin", "xmax", "cmin", "cmax", "tableoid", "oid"),
    )
)


class Variable(msgspec.Struct, frozen=True):
    """A variable that is a column: its name in `variableValues`, the name of its column, and its type."""

    name: str
    column: str
    type: VariableType = "text"


def parse(value: str) -> tuple[Variable, ...]:
    """Return the variables in a comma-separated list of NAME or NAME:TYPE. Raises `ValueError`."""
    result = tuple(_variables(value))
    if len(result) > MAX_COLUMNS:
        raise ValueError(f"names {len(result)} variables; the limit is {MAX_COLUMNS}")
    by_column: dict[str, str] = {}
    for each in result:
        other = by_column.setdefault(each.column, each.name)
        if other != each.name:
            raise ValueError(f"{other} and {each.name} would both be the column {each.column}")
    if len(by_column) < len(result):
        raise ValueError("names a variable twice: keep one entry")
    return result


def _variables(value: str) -> Iterator[Variable]:
    for part in filter(None, (each.strip() for each in value.split(","))):
        name, colon, kind = (each.strip() for each in part.partition(":"))
        if colon and kind not in _TYPES:
            raise ValueError(f"{part}: write NAME or NAME:TYPE; types are {', '.join(_TYPES)}")
        yield Variable(name, column_name(name), kind or "text")  # type: ignore[arg-type]  # one of the types


def column_name(name: str) -> str:
    """Return the column of a variable: its name in lower case, with `_` between words. Raises `ValueError`.

    `customerTier`, `CustomerTier`, `customer-tier` and `customer tier` become `customer_tier`; `APIKey` becomes
    `api_key`.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    column = re.sub(r"[ ._/-]+", "_", words).strip("_").lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", column) or len(column) > MAX_BYTES:
        raise ValueError(
            f"{name}: cannot be a column: write a letter a to z, then letters, digits and . _ - /, at most"
            f" {MAX_BYTES} characters"
        )
    if column in RESERVED:
        raise ValueError(f"{name}: {column} already is a column of analytics.sessions")
    return column
