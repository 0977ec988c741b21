"""Export seals with the hashes that lead from exported rows to their roots."""

import struct
import tempfile
from array import array
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, text

from archiver.compliance.export.folder import Sink
from archiver.compliance.seals import chain, merkle
from archiver.compliance.seals.chain import Seal

EXPORTED: Mapping[str, bytes] = {"events": b"E", "acts": b"A", "erasures": b"X"}  # in the order of a seal's leaves
_PAGE = 1_000
_ENTRY = struct.Struct(">cq32s")


class SealRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of seals.jsonl.

    `places`: the leaves of the seal that are exported rows, as runs of (first index, length). `entries`: those leaves
    as listed by the seal, 41 bytes each (letter, id in 8 bytes, hash), in base64. `cover`: the fewest hashes of other
    leaves and nodes that are needed to compute the root.
    """

    id: int
    statement: str
    hash: str
    key_id: str | None
    signature: str | None
    places: list[tuple[int, int]]
    entries: str
    cover: list[str]


class Ids:
    """The ascending ids of exported rows, kept on disk because their number is not limited."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed below
        self._waiting = array("q")
        self._iterator = iter(())  # type: Iterator[int]
        self._next: int | None = None
        self.last = 0

    def append(self, row_id: int) -> None:
        self._waiting.append(row_id)
        if len(self._waiting) >= _PAGE:
            self._flush()

    def _flush(self) -> None:
        self._file.write(self._waiting.tobytes())
        del self._waiting[:]

    def rewind(self) -> None:
        """Start reading from the first id, after all ids have been added."""
        self._flush()
        self._file.seek(0)
        self._iterator = self._read()
        self._next = next(self._iterator, None)

    def _read(self) -> Iterator[int]:
        while block := self._file.read(80_000):
            page = array("q")
            page.frombytes(block)
            yield from page

    def through(self, row_id: int) -> Iterator[int]:
        """Yield the unread ids up to and including this one."""
        while self._next is not None and self._next <= row_id:
            yield self._next
            self._next = next(self._iterator, None)

    def count_rest(self) -> int:
        """Return the number of unread ids."""
        return sum(1 for _ in self.through(2**63 - 1))

    def close(self) -> None:
        self._file.close()


def write_seals(connection: Connection, sink: Sink, exported: Mapping[str, Ids], *, is_all: bool) -> Seal:
    """Write each seal that covers an exported row, and the newest seal, which is returned; all seals if `is_all`."""
    for ids in exported.values():
        ids.rewind()
    newest = chain.select_newest(connection)
    for number, throughs in _bounds(connection):
        held = {
            letter: set(exported[table].through(throughs[f"{table}_through"])) for table, letter in EXPORTED.items()
        }
        if is_all or number == newest.id or any(held.values()):
            for seal, entries in chain.select_seals(connection, number - 1, number):
                sink.write(msgspec.json.encode(line_of(seal, entries, held)), b"\n")
    return newest


_BOUNDS = text(
    "SELECT id, events_through, acts_through, erasures_through FROM archiver.seals WHERE id > :after"
    " ORDER BY id LIMIT :most"
)


def _bounds(connection: Connection) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    after = 0
    while rows := connection.execute(_BOUNDS, {"after": after, "most": _PAGE}).mappings().all():
        for row in rows:
            yield row["id"], row
        after = rows[-1]["id"]


def line_of(seal: Seal, entries: bytes, held: Mapping[bytes, set[int]]) -> SealRecord:
    """Return the record of a seal whose exported rows have these ids, by letter of their table."""
    whole = entries[: len(entries) - len(entries) % chain.ENTRY_SIZE]
    places = [
        place for place, (letter, row_id, _) in enumerate(_ENTRY.iter_unpack(whole)) if row_id in held.get(letter, ())
    ]
    size = chain.ENTRY_SIZE
    listed = whole if len(places) == seal.size else b"".join([whole[n * size : (n + 1) * size] for n in places])
    # If all leaves are exported, the cover is empty and nothing needs to be hashed.
    cover = [] if len(places) == seal.size else merkle.cover(chain.hashes(whole), places)
    return SealRecord(
        id=seal.id,
        statement=seal.statement.decode(),
        hash=seal.hash.hex(),
        key_id=seal.key_id,
        signature=None if seal.signature is None else seal.signature.hex(),
        places=_runs(places),
        entries=b64encode(listed).decode(),
        cover=[each.hex() for each in cover],
    )


def _runs(places: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs
