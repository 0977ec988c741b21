"""Check the rows of an export against the seals that cover them."""

from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.compliance.export import manifest
from archiver.compliance.export.findings import Finding, FindingQueue
from archiver.compliance.export.manifest import File, Head
from archiver.compliance.export.proofs import EXPORTED
from archiver.compliance.export.reading import Lines
from archiver.compliance.export.records import (
    AuditLine,
    ErasureLine,
    EventLine,
    audit_leaf,
    erasure_leaf,
    event_leaf,
)
from archiver.compliance.seals import chain, merkle
from archiver.compliance.seals.chain import Entry, Seal
from archiver.events import WEBHOOK

MAX_LEAVES = 1_000_000  # per seal: far more than the archiver ever puts into one
_SINGULAR = {"events": "event", "acts": "act", "erasures": "erasure"}
_NOUNS = {b"E": "event", b"A": "act", b"X": "erasure"}


class Keys(msgspec.Struct, frozen=True):
    """Public keys by id, and the first seal that must be signed."""

    by_id: Mapping[str, Ed25519PublicKey]
    since: int = 1


class KnownSeals(msgspec.Struct, frozen=True):
    """The seals exported earlier: their hashes by number, and the last sealed id of each table by name."""

    heads: Mapping[int, bytes] = {}
    through: Mapping[str, int] = {}


class UnparsedSealRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of seals.jsonl with unparsed lists, because invalid input may have lists of any length."""

    id: int
    statement: str
    hash: str
    key_id: str | None
    signature: str | None
    places: msgspec.Raw
    entries: str
    cover: msgspec.Raw


class Row(msgspec.Struct, frozen=True, gc=False):
    """The line number, id and leaf hash of a row."""

    line: int
    id: int
    hash: bytes


class Rows:
    """The rows of the three exported tables, read in order of their ids, as far as requested."""

    def __init__(self, folder: Path, files: Mapping[str, File], findings: FindingQueue) -> None:
        self._findings = findings
        self.erased = 0
        self._acts: set[int] = set()
        self._ordered: set[int] = set()
        self.events = Lines(folder, manifest.EVENTS, files[manifest.EVENTS], EventLine, findings)
        erasures = Lines(folder, manifest.ERASURES, files[manifest.ERASURES], ErasureLine, FindingQueue())
        self._covered: set[int] = set()  # hashes instead of ids of sessions and turns, to save memory
        for _, each in erasures:
            self._covered |= {hash((each.session_id, each.chat_id)), hash(each.session_id)}
        acts = Lines(folder, manifest.ACTS, files[manifest.ACTS], AuditLine, findings)
        erasures = Lines(folder, manifest.ERASURES, files[manifest.ERASURES], ErasureLine, findings)
        self._streams = {
            "events": self._read(self.events, self._event),
            "acts": self._read(acts, self._act),
            "erasures": self._read(erasures, self._erasure),
        }
        self._next = {table: next(stream, None) for table, stream in self._streams.items()}

    def _read(self, lines: Lines[Any], leaf_of: Callable[[int, Any], bytes]) -> Iterator[Row]:
        last: int | None = None
        for number, record in lines:
            try:
                hashed = leaf_of(number, record)
            except (ValueError, OverflowError):
                self._findings.append(Finding(lines.name, "damaged", number))
                continue
            if last is not None and record.id <= last:
                self._findings.append(Finding(lines.name, "out_of_order", number))
            last = record.id
            yield Row(number, record.id, hashed)

    def _event(self, number: int, event: EventLine) -> bytes:
        body = event.content()
        hashed, is_intact = event_leaf(event, body)
        if body is None:
            self.erased += 1
            if not self._is_covered(event):
                self._findings.append(Finding(manifest.EVENTS, "erased_without_record", number, f"event {event.id}"))
        if not is_intact:
            self._findings.append(Finding(manifest.EVENTS, "body_changed", number, f"event {event.id}"))
        return hashed

    def _is_covered(self, event: EventLine) -> bool:
        """Return whether an erasure covers the event; a history response contains all turns of its session."""
        if any(hash((event.session_id, chat_id)) in self._covered for chat_id in ("", event.chat_id or "")):
            return True
        return event.source != WEBHOOK and hash(event.session_id) in self._covered

    def _act(self, _: int, act: AuditLine) -> bytes:
        self._acts.add(act.id)
        return audit_leaf(act)

    def _erasure(self, _: int, erasure: ErasureLine) -> bytes:
        self._ordered.add(erasure.act_id)
        return erasure_leaf(erasure)

    def through(self, table: str, row_id: int) -> Iterator[Row]:
        """Yield the unread rows up to and including this id."""
        while (row := self._next[table]) is not None and row.id <= row_id:
            yield row
            self._next[table] = next(self._streams[table], None)

    def missing_acts(self) -> set[int]:
        """Return the missing audit entries to which erasures refer. Call it after reading all rows."""
        return self._ordered - self._acts


class SealCheck:
    """A check of the seals of an export, one after another."""

    def __init__(self, rows: Rows, keys: Keys, known: KnownSeals, findings: FindingQueue) -> None:
        self._rows, self._keys, self._known, self._findings = rows, keys, known, findings
        self._before: Seal | None = None
        self.seals = 0
        self.compared = 0  # with seals exported earlier
        self.unsealed = dict.fromkeys(EXPORTED, 0)

    @property
    def head(self) -> Head | None:
        """Return number and hash of the last seal checked; None if there is none."""
        return None if self._before is None else Head(self._before.id, self._before.hash.hex())

    def check(self, number: int, line: UnparsedSealRecord) -> None:
        """Check one line of seals.jsonl and the rows that its seal covers."""
        self.seals += 1
        try:
            seal, places, entries, cover = _parsed(line)
        except (ValueError, OverflowError):
            self._findings.append(Finding(manifest.SEALS, "damaged", number))
            return
        for fault in (*self._statement_faults(seal), *self._signature_faults(seal)):
            self._findings.append(Finding(manifest.SEALS, fault, number, f"seal {seal.id}"))
        self._compare(seal, entries)
        result = merkle.root_of_cover([each.hash for each in entries], places, seal.size, cover)
        if result != seal.root or len(places) != len(entries):
            self._findings.append(Finding(manifest.SEALS, "altered_leaves", number, f"seal {seal.id}"))
        self._before = seal

    def _statement_faults(self, seal: Seal) -> Iterator[str]:
        if seal.hash != sha256(seal.statement).digest():
            yield "altered"
        before = chain.FIRST if seal.id == 1 else self._before
        if before is not None and before.id == seal.id - 1 and seal.previous != before.hash:
            yield "out_of_chain"
        elif self._before is not None and seal.id <= self._before.id:
            yield "out_of_order"
        self.compared += seal.id in self._known.heads
        if self._known.heads.get(seal.id, seal.hash) != seal.hash:
            yield "not_the_known_one"

    def _signature_faults(self, seal: Seal) -> Iterator[str]:
        keys = self._keys
        if (seal.signature is None) != (seal.key_id is None):
            yield "wrong_signature"
        elif seal.key_id is None:
            if keys.by_id and seal.id >= keys.since:
                yield "unsigned"
        elif keys.by_id:
            key = keys.by_id.get(seal.key_id)
            if key is None:
                yield "unknown_key"
            elif not chain.is_signed_by(seal, key):
                yield "wrong_signature"

    def _compare(self, seal: Seal, entries: list[Entry]) -> None:
        """Compare the list of the seal with the rows of its range."""
        listed = {(entry.letter, entry.id): entry.hash for entry in entries}
        for table, letter in EXPORTED.items():
            for row in self._rows.through(table, seal.through[table]):
                known = listed.pop((letter, row.id), None)
                if known != row.hash:
                    fault = "not_sealed" if known is None else "changed"
                    what = f"{_SINGULAR[table]} {row.id}, sealed by {seal.id}"
                    self._findings.append(Finding(f"{table}.jsonl", fault, row.line, what))
        for letter, row_id in listed:
            what = f"{_NOUNS.get(letter, 'row')} {row_id}, sealed by {seal.id}"
            self._findings.append(Finding(manifest.SEALS, "missing_row", None, what))

    def finish(self) -> None:
        """Report the rows that no seal of the export covers, and missing seals and audit entries."""
        for table in EXPORTED:
            for row in self._rows.through(table, 2**63 - 1):
                self.unsealed[table] += 1
                if row.id <= self._known.through.get(table, 0):
                    what = f"{_SINGULAR[table]} {row.id}"
                    self._findings.append(Finding(f"{table}.jsonl", "seal_left_out", row.line, what))
        if self._known.heads and not self.compared:
            self._findings.append(Finding(manifest.SEALS, "none_known"))
        for act_id in sorted(self._rows.missing_acts()):
            self._findings.append(Finding(manifest.ACTS, "without_act", None, f"act {act_id}"))


_read_places = msgspec.json.Decoder(list[tuple[int, int]]).decode
_read_cover = msgspec.json.Decoder(list[str]).decode
_MAX_COVER = 64  # maximum number of hashes between two listed leaves


def _parsed(line: UnparsedSealRecord) -> tuple[Seal, list[int], list[Entry], list[bytes]]:
    """Parse a line of seals.jsonl. Raises `ValueError` for a line that no export writes."""
    signature = None if line.signature is None else bytes.fromhex(line.signature)
    seal = chain.seal_from_statement(line.statement, bytes.fromhex(line.hash), line.key_id, signature)
    packed = b64decode(line.entries, validate=True)
    if seal.id != line.id or len(packed) % chain.ENTRY_SIZE:
        raise ValueError("not exactly one seal")
    limit = len(packed) // chain.ENTRY_SIZE
    if _count(line.places, b"[") > limit + 1 or _count(line.cover, b'"') > 2 * _MAX_COVER * (limit + 1):
        raise ValueError("more hashes than its entries need")
    places: list[int] = []
    end = 0
    for start, length in _read_places(line.places):
        if start < end or length < 1 or start + length > seal.size or len(places) + length > MAX_LEAVES:
            raise ValueError("invalid places of leaves")
        end = start + length
        places += range(start, end)
    return seal, places, chain.unpack(packed), [bytes.fromhex(each) for each in _read_cover(line.cover)]


def _count(items: msgspec.Raw, mark: bytes) -> int:
    return bytes(items).count(mark)
