"""Verification: everything computed again from the rows, in one pass and bounded memory, and each fault named."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from hashlib import sha256

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, text

from archiver.seals import chain, merkle
from archiver.seals.chain import Entry, Seal
from archiver.seals.consistency import check_acts, check_content, check_counters, check_recounts
from archiver.seals.findings import Finding
from archiver.seals.leaves import BY_LETTER, EVENTS, KINDS, Leaf, select_checked_leaves

WINDOW = 20_000  # leaves that are looked at together

Sealed = tuple[Seal, bytes]  # with its packed entries


class Signing(msgspec.Struct, frozen=True):
    """Which keys may have signed, by their ids, and since which seal all are signed."""

    keys: Mapping[str, Ed25519PublicKey]
    since: int


class Checked(msgspec.Struct):
    """How far a verification has come."""

    seals: int = 0
    events: int = 0
    unsealed: int = 0  # events that are not sealed yet
    compared: int = 0  # seals that were exported, and were compared with those here
    head: Seal = chain.FIRST


def verify(
    connection: Connection,
    *,
    after_seal: int = 0,
    keys: Mapping[str, Ed25519PublicKey] | None = None,
    signed_since: int = 1,
    heads: Mapping[int, bytes] | None = None,
    checked: Checked | None = None,
    on_progress: Callable[[Checked], None] = lambda _: None,
) -> Generator[Finding]:
    """Everything that is not as it was sealed, in the order of seals. To be read to the end, or closed.

    `after_seal`: begin after this seal; 0: from the first. `keys`, by their ids: each seal from `signed_since` on
    must be signed by one of them. `heads`: hashes of seals, by number, as they were exported; all are compared,
    wherever it begins. The connection shows one snapshot (REPEATABLE READ): an archive in use can be verified.
    """
    checked = Checked() if checked is None else checked
    known = dict(heads or {})
    checked.compared = len(known)
    signing = Signing(keys or {}, signed_since)
    before = _seal_before(connection, after_seal)
    if before.id != after_seal:
        yield Finding("seals", after_seal, "missing")
        after_seal = 0
    elif before.id:
        if before.hash != sha256(before.statement).digest():
            yield Finding("seals", before.id, "altered")
        yield from _check_signature(before, before, signing)
    yield from _compare_known(before, known)
    yield from _compare_earlier(connection, before, known)
    for number in connection.scalars(text("SELECT id FROM archiver.seals WHERE id < 1 ORDER BY id")):
        yield Finding("seals", number, "inserted")
    start = before
    for window in _windows(connection, after_seal):
        for seal, entries in window:
            yield from _check_seal(seal, entries, before, signing)
            yield from _compare_known(seal, known)
            before = seal
            checked.seals += 1
        yield from _compare(connection, window, start, checked)
        start = checked.head = before
        on_progress(checked)
    for number in sorted(known):
        yield Finding("seals", number, "missing")
    yield from _compare_unsealed(connection, before, checked)
    for check in (check_counters, check_recounts, check_content, check_acts):
        yield from check(connection, before)
    on_progress(checked)


def _seal_before(connection: Connection, number: int) -> Seal:
    if number == 0:
        return chain.FIRST
    return next((seal for seal, _ in chain.select_seals(connection, number - 1, number)), chain.FIRST)


def _windows(connection: Connection, after: int) -> Iterator[list[Sealed]]:
    window: list[Sealed] = []
    size = 0
    for seal, entries in chain.select_seals(connection, after):
        window.append((seal, entries))
        size += seal.size
        if size >= WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window


def _check_seal(seal: Seal, entries: bytes, before: Seal, signing: Signing) -> Iterator[Finding]:
    first, last = before.id + 1, seal.id - 1
    if first <= last:  # one finding of however many: a number may be anything
        yield Finding("seals", first, "missing", through=last if last > first else None)
    if seal.hash != sha256(seal.statement).digest():
        yield Finding("seals", seal.id, "altered")
    if len(entries) % chain.ENTRY_SIZE or merkle.root(chain.hashes(entries)) != seal.root:
        yield Finding("seals", seal.id, "altered_leaves")
    if seal.previous != before.hash:
        yield Finding("seals", seal.id, "out_of_chain")
    yield from _check_signature(seal, before, signing)


def _check_signature(seal: Seal, before: Seal, signing: Signing) -> Iterator[Finding]:
    is_due = bool(signing.keys) and seal.id >= signing.since
    if (seal.signature is None) != (seal.key_id is None):
        yield Finding("seals", seal.id, "wrong_signature")
    elif seal.signature is None or seal.key_id is None:
        if is_due or before.signature is not None:
            yield Finding("seals", seal.id, "unsigned")
    elif signing.keys:
        key = signing.keys.get(seal.key_id)
        if key is None:
            yield Finding("seals", seal.id, "unknown_key")
        elif not chain.is_signed_by(seal, key):
            yield Finding("seals", seal.id, "wrong_signature")


def _compare_known(seal: Seal, known: dict[int, bytes]) -> Iterator[Finding]:
    """Against what was exported; what is left of `known` in the end is missing."""
    if known.pop(seal.id, seal.hash) != seal.hash:
        yield Finding("seals", seal.id, "not_the_known_one")


def _compare_earlier(connection: Connection, before: Seal, known: dict[int, bytes]) -> Iterator[Finding]:
    """Those that this verification does not begin with, too: by their hashes alone."""
    numbers = [number for number in known if number < before.id]
    for start in range(0, len(numbers), WINDOW):
        query = text("SELECT id, hash FROM archiver.seals WHERE id = ANY (:numbers) ORDER BY id")
        for row in connection.execute(query, {"numbers": numbers[start : start + WINDOW]}):
            if known.pop(row.id) != bytes(row.hash):
                yield Finding("seals", row.id, "not_the_known_one")


def _compare(connection: Connection, window: Sequence[Sealed], start: Seal, checked: Checked) -> Iterator[Finding]:
    """The rows as they are against what these seals list."""
    found: list[bytearray] = [bytearray() for _ in window]
    for kind in KINDS:
        # Nothing of ours has an id below 1, but what somebody else put there may.
        after = start.through[kind.table] if start.id else None
        bounds = [seal.through[kind.table] for seal, _ in window]
        place = 0
        run: list[Leaf] = []
        with closing(select_checked_leaves(connection, kind, after, max(bounds))) as leaves:
            for leaf in leaves:
                while leaf[0] > bounds[place]:
                    found[place] += chain.pack(kind.letter, run)
                    place, run = place + 1, []
                run.append(leaf)
                if not leaf[2]:
                    yield Finding(kind.table, leaf[0], "body_changed", window[place][0].id)
        found[place] += chain.pack(kind.letter, run)
        if kind is EVENTS:
            checked.events += sum(len(rows) for rows in found) // chain.ENTRY_SIZE
    for (seal, entries), rows in zip(window, found, strict=True):
        if rows != entries:
            yield from _differences(connection, seal, chain.unpack(entries), chain.unpack(bytes(rows)))


def _differences(
    connection: Connection, seal: Seal, entries: Sequence[Entry], rows: Sequence[Entry]
) -> Iterator[Finding]:
    """What one seal lists and the rows of its range are not the same: which."""
    listed = {(entry.letter, entry.id): entry.hash for entry in entries}
    gone = _removed(connection, [entry.id for entry in entries if entry.letter == EVENTS.letter])
    for row in rows:
        known = listed.pop((row.letter, row.id), None)
        if known != row.hash:
            fault = "inserted" if known is None else "changed"
            yield Finding(BY_LETTER[row.letter].table, row.id, fault, None if known is None else seal.id)
    for letter, row_id in listed:
        if letter not in BY_LETTER:
            yield Finding("seals", seal.id, "altered_leaves")
        elif letter != EVENTS.letter or row_id not in gone:
            yield Finding(BY_LETTER[letter].table, row_id, "missing", seal.id)


def _removed(connection: Connection, event_ids: Sequence[int]) -> set[int]:
    """Those of these events that retention removed."""
    query = text("SELECT event_id FROM archiver.removals WHERE event_id = ANY (:event_ids)")
    return set(connection.scalars(query, {"event_ids": list(event_ids)}))


def _compare_unsealed(connection: Connection, head: Seal, checked: Checked) -> Iterator[Finding]:
    with closing(select_checked_leaves(connection, EVENTS, head.through["events"], 2**63 - 1)) as leaves:
        for row_id, _, is_intact in leaves:
            checked.unsealed += 1
            if not is_intact:
                yield Finding("events", row_id, "body_changed")
