"""Serialise sealed rows of the append-only tables as reproducible bytes.

A leaf is a letter for its table and then the row's fields, in the order given here, each as its length in 4 bytes
(big endian; -1 for null) and its bytes: whole numbers in 8 (counts in 4) bytes, times in microseconds since
2000-01-01T00:00:00Z in 8 bytes, text in UTF-8. That is how Postgres writes them in `COPY ... (FORMAT BINARY)`, so
that a row is hashed as it arrives. Source: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
"""

import struct
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from hashlib import sha256
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import Connection

from archiver.compliance.seals.merkle import leaf_hash
from archiver.database import copy_out

_COUNT = 2  # bytes before each row: number of its fields

# An event's fields are preceded by the length of the salt and body after them; -1 if these are erased. If the row
# differs from that of a single delivery, the value is -2 minus this length, so that the row is checked again.
_BEFORE = """
    CASE WHEN octet_length(salt) = 16 AND octet_length(dedupe_key) = 32 AND body IS NOT NULL AND delivery_count = 1
              AND last_received_at = received_at AND earliest_at IS NULL AND NOT is_recounted
              AND frame IS NULL AND runs IS NULL
         THEN 16 + octet_length(body)
         ELSE -2 - coalesce(octet_length(salt) + octet_length(body), -1) END
"""
_AFTER = "salt || body"
_EVENT = struct.Struct(">6xi4xq").unpack_from  # the length and the id
_LEAF = _COUNT + 4 + 4  # where an event's leaf begins
_ID_BYTES = slice(_LEAF + 4, _LEAF + 12)
_DIGEST = slice(_LEAF + 12 + 12 + 4, _LEAF + 12 + 12 + 4 + 32)
_ID = struct.Struct(">6xq").unpack_from

_NULL = struct.pack(">i", -1)
_LENGTH = struct.Struct(">i").pack


def leaf(letter: bytes, fields: Iterable[bytes | None]) -> bytes:
    """Return the bytes of a leaf from its fields, for verifiers without a database."""
    return letter + b"".join([_NULL if each is None else _LENGTH(len(each)) + each for each in fields])


Leaf = tuple[int, bytes]  # a row's id and its leaf hash
ENTRY = struct.Struct(">cq32s")  # a leaf as its seal lists it: the letter of its table, its id, its hash


def pack(letter: bytes, leaves: Iterable[Leaf]) -> bytes:
    """Pack the leaves of one table as in `seals.entries`."""
    return b"".join([ENTRY.pack(letter, row_id, hashed) for row_id, hashed in leaves])


class Run(msgspec.Struct):
    """The packed leaves between two ids of a table, and the events that need attention.

    `bodies`: ids of events whose body does not match its digest. `unusual`: ids of events whose rows differ from a
    single delivery and need further checks.
    """

    entries: list[bytes] = msgspec.field(default_factory=list)
    bodies: list[int] = msgspec.field(default_factory=list)
    unusual: list[int] = msgspec.field(default_factory=list)


class Kind(msgspec.Struct, frozen=True):
    """A sealed table: `letter` marks its leaves, `fields` are the fields of a leaf.

    `later`: fields that a migration added; the last is of type text. Older rows have null in all of them, and their
    leaves end without them.
    """

    letter: bytes
    table: str
    fields: tuple[str, ...]
    later: tuple[str, ...] = ()

    @property
    def through(self) -> str:
        """Return the column of `seals` with the last sealed id of this table."""
        return f"{self.table}_through"


EVENTS = Kind(
    b"E",
    "events",
    (
        "id",
        "received_at",
        "body_digest",
        "occurred_at",
        "type",
        "source",
        "session_id",
        "chat_id",
        "key_id",
        # A commitment to the key; an erasure replaces the key with it.
        "CASE WHEN salt IS NULL THEN dedupe_key ELSE sha256(salt || dedupe_key) END",
    ),
)
KINDS = (
    EVENTS,
    Kind(b"R", "recounts", ("id", "event_id", "delivery_count", "last_received_at", "earliest_at")),
    Kind(b"A", "acts", ("id", "at", "actor", "kind", "reason", "detail::text"), ("database_user",)),
    Kind(
        b"X",
        "erasures",
        ("id", "session_id", "chat_id", "erased_at", "rule", "act_id"),
        ("recorded_at", "database_user"),
    ),
    Kind(b"D", "removals", ("id", "event_id", "act_id"), ("recorded_at", "session_id", "database_user")),
)
BY_LETTER = {kind.letter: kind for kind in KINDS}


def select_leaves(connection: Connection, kind: Kind, after: int | None, through: int) -> Generator[Leaf]:
    """Yield the leaves of rows with ids above `after` (None: all) and up to `through`, in order of their ids.

    Does not read bodies. Exhaust or close the generator before any other use of the connection, even a rollback.
    """
    rows = _copy(connection, kind, (*kind.fields, *kind.later), after, through)
    return ((_ID(row)[0], leaf_hash(kind.letter + _fields_of(kind, row))) for row in rows)


def read_runs(connection: Connection, kind: Kind, after: int | None, bounds: Sequence[int]) -> list[Run]:
    """Return runs of the rows with ids above `after` (None: all), one run up to each of `bounds`.

    A bound below a previous one has an empty run. The body of each event is compared with its digest.
    """
    runs = [Run() for _ in bounds]
    if after is None or after < max(bounds):
        (_read_events if kind is EVENTS else _read_leaves)(connection, kind, after, bounds, runs)
    return runs


def _read_leaves(
    connection: Connection, kind: Kind, after: int | None, bounds: Sequence[int], runs: Sequence[Run]
) -> None:
    place = 0
    with closing(select_leaves(connection, kind, after, max(bounds))) as leaves:
        for row_id, hashed in leaves:
            while row_id > bounds[place]:
                place += 1
            runs[place].entries.append(ENTRY.pack(kind.letter, row_id, hashed))


def _read_events(
    connection: Connection, kind: Kind, after: int | None, bounds: Sequence[int], runs: Sequence[Run]
) -> None:
    # This loop runs millions of times, so no part of it is a separate function.
    place, bound, run = 0, bounds[0], runs[0]
    leaf_of_event, empty = sha256(b"\0E").copy, sha256().copy  # a copy is cheaper than a new hash
    append = run.entries.append
    with closing(_copy(connection, kind, (_BEFORE, *kind.fields, _AFTER), after, max(bounds))) as rows:
        for row in rows:
            size, row_id = _EVENT(row)
            while row_id > bound:
                place += 1
                bound, run = bounds[place], runs[place]
                append = run.entries.append
            if size < 0:
                run.unusual.append(row_id)
                size = -2 - size
            if size < 0:
                append(b"E" + row[_ID_BYTES] + sha256(b"\0E" + row[_LEAF:-4]).digest())
            else:
                hashed = leaf_of_event()
                hashed.update(row[_LEAF : -4 - size])
                append(b"E" + row[_ID_BYTES] + hashed.digest())
                hashed = empty()
                hashed.update(row[-size:])
                if hashed.digest() != row[_DIGEST]:
                    run.bodies.append(row_id)


def select_leaf(connection: Connection, kind: Kind, row_id: int) -> bytes | None:
    """Return the bytes of one leaf; None if the row does not exist."""
    rows = _copy(connection, kind, (*kind.fields, *kind.later), row_id - 1, row_id)
    result = [kind.letter + _fields_of(kind, row) for row in rows]
    return result[0] if result else None


def _fields_of(kind: Kind, row: Any) -> Any:
    """Return the fields of a row; fields that a migration added are omitted if all are null.

    No text ends with the bytes of a null, because they are not UTF-8.
    """
    nulls = _NULL * len(kind.later)
    return row[_COUNT : -len(nulls)] if nulls and row[-len(nulls) :] == nulls else row[_COUNT:]


def _copy(
    connection: Connection, kind: Kind, expressions: Sequence[str], after: int | None, through: int
) -> Generator[Any]:
    """Yield rows in the binary format of Postgres."""
    query = sql.SQL(
        "COPY (SELECT {} FROM archiver.{} WHERE {} id <= {} ORDER BY id) TO STDOUT (FORMAT BINARY, ENCODING 'UTF8')"
    ).format(
        sql.SQL(", ".join(expressions)),
        sql.Identifier(kind.table),
        sql.SQL("" if after is None else f"id > {after} AND"),
        sql.Literal(through),
    )
    return copy_out.rows(connection, query)
