"""Verify a range of the chain: each seal against its predecessor, and rows against their seals."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from hashlib import sha256

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, text

from archiver.compliance.seals import chain, merkle
from archiver.compliance.seals.bounds import is_bounded
from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.comparing import Checked, compare
from archiver.compliance.seals.findings import Finding


class Signing(msgspec.Struct, frozen=True):
    """The keys that may have signed seals, by id, and the seal from which on all seals must be signed."""

    keys: Mapping[str, Ed25519PublicKey]
    since: int


class VerificationContext(msgspec.Struct, frozen=True):
    """The evidence for verifying seals. `heads`: hashes of exported seals; `through`: the last sealed event.

    `unbounded`: seals that claim ids beyond all rows that ever existed.
    """

    signing: Signing
    heads: Mapping[int, bytes]
    through: int
    unbounded: frozenset[int] = frozenset()


class Range(msgspec.Struct, frozen=True):
    """The seals after `after`, in windows that are each verified as a whole: the last seal of each window."""

    after: int
    windows: Sequence[int]


def windows_after(
    connection: Connection, after: int, leaves: int, known: Container[int]
) -> tuple[list[int], int, set[int]]:
    """Return the seals after this one in windows of about `leaves` leaves: the last seal of each window.

    Also return the total number of leaves, and the seals that are among `known`.
    """
    windows: list[int] = []
    there: set[int] = set()
    total = size = 0
    last = after
    while rows := connection.execute(_SIZES, {"after": last}).all():
        for number, entries in rows:
            size += entries // chain.ENTRY_SIZE
            if size >= leaves:
                windows.append(number)
                total, size = total + size, 0
        there.update(number for number, _ in rows if number in known)
        last = rows[-1][0]
    if last != after and windows[-1:] != [last]:
        windows.append(last)
    return windows, total + size, there


_SIZES = text("SELECT id, octet_length(entries) FROM archiver.seals WHERE id > :after ORDER BY id LIMIT 10000")


def verify_range(
    connection: Connection,
    seal_range: Range,
    context: VerificationContext,
    checked: Checked,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[Finding]:
    """Yield each difference of these seals and their rows from the sealed state."""
    before = seal_before(connection, seal_range.after)
    for last in seal_range.windows:
        start, window, forged = before, list(chain.select_seals(connection, before.id, last)), set[int]()
        for seal, entries in window:
            result = list(_check_seal(seal, entries, before, context))
            forged |= {finding.id for finding in result if finding.fault == "out_of_bounds"}
            yield from result
            before = seal
            checked.seals += 1
        yield from compare(connection, window, start, context.through, checked, forged=forged)
        on_progress()


def seal_before(connection: Connection, number: int) -> Seal:
    """Return the seal with this number; the beginning of the chain if there is none."""
    if number == 0:
        return chain.FIRST
    return next((seal for seal, _ in chain.select_seals(connection, number - 1, number)), chain.FIRST)


def _check_seal(seal: Seal, entries: bytes, before: Seal, context: VerificationContext) -> Iterator[Finding]:
    first, last = before.id + 1, seal.id - 1
    if first <= last:  # one finding for any number of seals: a forged number may be arbitrarily high
        yield Finding("seals", first, "missing", through=last if last > first else None)
    if seal.hash != sha256(seal.statement).digest():
        yield Finding("seals", seal.id, "altered")
    if len(entries) % chain.ENTRY_SIZE or merkle.root(chain.hashes(entries)) != seal.root:
        yield Finding("seals", seal.id, "altered_leaves")
    if seal.previous != before.hash:
        yield Finding("seals", seal.id, "out_of_chain")
    is_as_made = seal.hash == sha256(seal.statement).digest()
    if is_as_made and (seal.id in context.unbounded or not is_bounded(seal, entries, before)):
        yield Finding("seals", seal.id, "out_of_bounds")
    yield from check_signature(seal, before, context.signing)
    yield from compare_known(seal, context.heads)


def check_signature(seal: Seal, before: Seal, signing: Signing) -> Iterator[Finding]:
    """Yield a finding if the seal is not signed as required, given the previous one."""
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


def compare_known(seal: Seal, heads: Mapping[int, bytes]) -> Iterator[Finding]:
    """Yield a finding if the seal differs from the one exported earlier."""
    if heads.get(seal.id, seal.hash) != seal.hash:
        yield Finding("seals", seal.id, "not_the_known_one")
