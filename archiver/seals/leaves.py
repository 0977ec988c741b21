"""What is sealed: the rows of the append-only tables, each as bytes that anybody can put together again.

A leaf is a letter for its table and then the row's fields, in the order given here, each as its length in 4 bytes
(big endian; -1 for null) and its bytes: whole numbers in 8 (counts in 4) bytes, times in microseconds since
2000-01-01T00:00:00Z in 8 bytes, text in UTF-8. That is how Postgres writes them in `COPY ... (FORMAT BINARY)`, so
that a row is hashed as it arrives. Source: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
"""

import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import Connection

from archiver.seals.merkle import leaf_hash

_HEADER = 19  # bytes before the first row: signature, flags, length of the extension
_COUNT = 2  # bytes before each row: number of its fields
_TRAILER = b"\xff\xff"
_INT4 = struct.Struct(">i").unpack_from
_INT8 = struct.Struct(">q").unpack_from


class Kind(msgspec.Struct, frozen=True):
    """A sealed table: `letter` marks its leaves, `fields` are what a leaf holds."""

    letter: bytes
    table: str
    fields: tuple[str, ...]

    @property
    def through(self) -> str:
        """The column of `seals` that tells up to which id it is sealed."""
        return f"{self.table}_through"


# After `key_id` comes the key commitment: SHA-256 over salt and dedupe key, which is what an erasure leaves in the
# place of the key.
EVENTS = Kind(
    b"E",
    "events",
    ("id", "received_at", "body_digest", "occurred_at", "type", "source", "session_id", "chat_id", "key_id"),
)
_CONTENT = ("salt", "dedupe_key", "body")
KINDS = (
    EVENTS,
    Kind(b"R", "recounts", ("id", "event_id", "delivery_count", "last_received_at", "earliest_at")),
    Kind(b"A", "acts", ("id", "at", "actor", "kind", "reason", "detail::text")),
    Kind(b"X", "erasures", ("id", "session_id", "chat_id", "erased_at", "rule", "act_id")),
    Kind(b"D", "removals", ("id", "event_id", "act_id")),
)
BY_LETTER = {kind.letter: kind for kind in KINDS}

_FIXED = 12 + 12  # bytes of an event's first two fields
_DIGEST = 28  # where its third begins, after its length


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """One sealed row: its id and leaf hash, and whether its body is what its digest says (of an event)."""

    id: int
    hash: bytes
    is_intact: bool = True


def select_leaves(connection: Connection, kind: Kind, after: int, through: int) -> Iterator[Leaf]:
    """The leaves of rows with ids above `after` and up to `through`, in order of their ids.

    To be read to the end before the connection is used for anything else.
    """
    if kind is EVENTS:
        for row in _copy(connection, kind, after, through, _CONTENT):
            leaf, digest, salt, body = _event(row)
            yield Leaf(_INT8(row, 6)[0], leaf_hash(leaf), body is None or sha256(salt + body).digest() == digest)
    else:
        for row in _copy(connection, kind, after, through):
            yield Leaf(_INT8(row, 6)[0], leaf_hash(kind.letter + row[_COUNT:]))


def select_leaf(connection: Connection, kind: Kind, row_id: int) -> bytes | None:
    """The bytes of one leaf; None where there is no such row."""
    for row in _copy(connection, kind, row_id - 1, row_id, _CONTENT if kind is EVENTS else ()):
        return _event(row)[0] if kind is EVENTS else kind.letter + row[_COUNT:]
    return None


def _event(row: bytes) -> tuple[bytes, bytes, bytes, bytes | None]:
    """Leaf, body digest, salt and body of an event."""
    place = start = _COUNT
    place += _FIXED
    for _ in range(7):  # body_digest to key_id
        (size,) = _INT4(row, place)
        place += 4 + size if size > 0 else 4
    told, digest = row[start:place], row[_COUNT + _DIGEST : _COUNT + _DIGEST + 32]
    (size,) = _INT4(row, place)
    salt = b"" if size < 0 else row[place + 4 : place + 4 + size]
    place += 4 + max(size, 0)
    (size,) = _INT4(row, place)
    key = row[place + 4 : place + 4 + size]
    place += 4 + size
    (size,) = _INT4(row, place)
    body = None if size < 0 else row[place + 4 :]
    commitment = key if body is None else sha256(salt + key).digest()
    return EVENTS.letter + told + len(commitment).to_bytes(4, "big") + commitment, digest, salt, body


def _copy(
    connection: Connection, kind: Kind, after: int, through: int, more: tuple[str, ...] = ()
) -> Iterator[bytes]:
    """Rows in Postgres' binary format: the number of fields, then the fields."""
    query = sql.SQL(
        "COPY (SELECT {} FROM archiver.{} WHERE id > {} AND id <= {} ORDER BY id) TO STDOUT (FORMAT BINARY)"
    ).format(
        sql.SQL(", ".join((*kind.fields, *more))),
        sql.Identifier(kind.table),
        sql.Literal(after),
        sql.Literal(through),
    )
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(query) as copy:
        is_first = True
        while block := copy.read():
            row = bytes(block)
            if is_first:
                row, is_first = row[_HEADER:], False
            if row and row != _TRAILER:
                yield row
