"""What is sealed: the rows of the append-only tables, each as bytes that anybody can put together again.

A leaf is a letter for its table and then the row's fields, in the order given here, each as its length in 4 bytes
(big endian; -1 for null) and its bytes: whole numbers in 8 (counts in 4) bytes, times in microseconds since
2000-01-01T00:00:00Z in 8 bytes, text in UTF-8. That is how Postgres writes them in `COPY ... (FORMAT BINARY)`, so
that a row is hashed as it arrives. Source: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
"""

import struct
from collections.abc import Generator, Iterable, Sequence
from hashlib import sha256
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import Connection

from archiver import copying
from archiver.seals.merkle import leaf_hash

_COUNT = 2  # bytes before each row: number of its fields

# Before an event's fields stands the length of what is after them, its salt and body in one; -1 where they are gone.
_BEFORE, _AFTER = "coalesce(octet_length(salt) + octet_length(body), -1)", "salt || body"
_EVENT = struct.Struct(">6xi4xq").unpack_from  # that length, and the id
_LEAF = _COUNT + 4 + 4  # where an event's leaf begins
_DIGEST = slice(_LEAF + 12 + 12 + 4, _LEAF + 12 + 12 + 4 + 32)
_ID = struct.Struct(">6xq").unpack_from

_NULL = struct.pack(">i", -1)
_LENGTH = struct.Struct(">i").pack


def leaf(letter: bytes, fields: Iterable[bytes | None]) -> bytes:
    """A leaf's bytes from those of its fields, for whoever has no database."""
    return letter + b"".join([_NULL if each is None else _LENGTH(len(each)) + each for each in fields])


Leaf = tuple[int, bytes, bool]  # a row's id, its leaf hash, and whether its body is what its digest says


class Kind(msgspec.Struct, frozen=True):
    """A sealed table: `letter` marks its leaves, `fields` are what a leaf holds."""

    letter: bytes
    table: str
    fields: tuple[str, ...]

    @property
    def through(self) -> str:
        """The column of `seals` that tells up to which id it is sealed."""
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
        # Commits to the key; an erasure leaves this in the place of the key itself.
        "CASE WHEN body IS NULL THEN dedupe_key ELSE sha256(salt || dedupe_key) END",
    ),
)
KINDS = (
    EVENTS,
    Kind(b"R", "recounts", ("id", "event_id", "delivery_count", "last_received_at", "earliest_at")),
    Kind(b"A", "acts", ("id", "at", "actor", "kind", "reason", "detail::text")),
    Kind(b"X", "erasures", ("id", "session_id", "chat_id", "erased_at", "rule", "act_id")),
    Kind(b"D", "removals", ("id", "event_id", "act_id")),
)
BY_LETTER = {kind.letter: kind for kind in KINDS}


def select_leaves(connection: Connection, kind: Kind, after: int | None, through: int) -> Generator[Leaf]:
    """The leaves of rows with ids above `after` (None: all) and up to `through`, in order of their ids.

    No body is looked at. To be read to the end, or closed, before the connection is used for anything else, even a
    rollback.
    """
    rows = _copy(connection, kind, kind.fields, after, through)
    return ((_ID(row)[0], leaf_hash(kind.letter + row[_COUNT:]), True) for row in rows)


def select_checked_leaves(connection: Connection, kind: Kind, after: int | None, through: int) -> Generator[Leaf]:
    """The same, and of an event whether its body is what its digest says."""
    return (
        _checked_events(connection, after, through)
        if kind is EVENTS
        else select_leaves(connection, kind, after, through)
    )


def _checked_events(connection: Connection, after: int | None, through: int) -> Generator[Leaf]:
    # What is done here is done a million times: hence no function of its own for anything.
    for row in _copy(connection, EVENTS, (_BEFORE, *EVENTS.fields, _AFTER), after, through):
        size, row_id = _EVENT(row)
        if size < 0:
            yield row_id, sha256(b"\0E" + row[_LEAF:-4]).digest(), True
        else:
            is_intact = sha256(row[-size:]).digest() == row[_DIGEST]
            yield row_id, sha256(b"\0E" + row[_LEAF : -4 - size]).digest(), is_intact


def select_leaf(connection: Connection, kind: Kind, row_id: int) -> bytes | None:
    """The bytes of one leaf; None where there is no such row."""
    found = [kind.letter + row[_COUNT:] for row in _copy(connection, kind, kind.fields, row_id - 1, row_id)]
    return found[0] if found else None


def _copy(
    connection: Connection, kind: Kind, expressions: Sequence[str], after: int | None, through: int
) -> Generator[Any]:
    """Rows in Postgres' binary format."""
    query = sql.SQL(
        "COPY (SELECT {} FROM archiver.{} WHERE {} id <= {} ORDER BY id) TO STDOUT (FORMAT BINARY, ENCODING 'UTF8')"
    ).format(
        sql.SQL(", ".join(expressions)),
        sql.Identifier(kind.table),
        sql.SQL("" if after is None else f"id > {after} AND"),
        sql.Literal(through),
    )
    return copying.rows(connection, query)
