"""Verify all seals and rows in one pass and bounded memory, and name each fault."""

from collections.abc import Callable, Generator, Iterator, Mapping
from hashlib import sha256

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, text

from archiver.compliance.seals import parallel
from archiver.compliance.seals.bounds import select_unbounded
from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.comparing import Checked, compare_unsealed
from archiver.compliance.seals.consistency import (
    check_audit_entries,
    check_before,
    check_recounted,
    check_recounts,
)
from archiver.compliance.seals.findings import Finding
from archiver.compliance.seals.holds import check_holds
from archiver.compliance.seals.ranges import (
    Range,
    Signing,
    VerificationContext,
    check_signature,
    compare_known,
    seal_before,
    verify_range,
    windows_after,
)

PAGE = 20_000  # seal numbers per query


class Parallelism(msgspec.Struct, frozen=True):
    """The number of processes of a verification, including this one; below `min_leaves` leaves, one is used.

    `window`: number of leaves that each process examines at a time.
    """

    jobs: int = 1
    min_leaves: int = 100_000
    window: int = 20_000


def verify(
    connection: Connection,
    *,
    after_seal: int = 0,
    keys: Mapping[str, Ed25519PublicKey] | None = None,
    signed_since: int = 1,
    heads: Mapping[int, bytes] | None = None,
    checked: Checked | None = None,
    on_progress: Callable[[Checked], None] = lambda _: None,
    effort: Parallelism | None = None,
) -> Generator[Finding]:
    """Yield every difference from the sealed state, in the order of the seals. Exhaust or close the generator.

    `after_seal`: begin after this seal; 0: from the first. `keys`, by their ids: each seal from `signed_since` on
    must be signed by one of them. `heads`: hashes of seals, by number, as they were exported; all are compared,
    wherever the verification begins. The connection must have one snapshot (REPEATABLE READ), so that an archive in
    use can be verified. Raises `parallel.HelperLostError` if another process was killed.
    """
    checked = Checked() if checked is None else checked
    effort = effort or Parallelism()
    known = dict(heads or {})
    checked.compared = len(known)
    signing = Signing(keys or {}, signed_since)
    before = seal_before(connection, after_seal)
    if before.id != after_seal:
        yield Finding("seals", after_seal, "missing")
    elif before.id:
        if before.hash != sha256(before.statement).digest():
            yield Finding("seals", before.id, "altered")
        yield from check_signature(before, before, signing)
    yield from compare_known(before, known)
    yield from _compare_earlier(connection, before, known)
    for number in connection.scalars(text("SELECT id FROM archiver.seals WHERE id < 1 ORDER BY id")):
        yield Finding("seals", number, "inserted")
    windows, leaves, there = windows_after(connection, before.id, effort.window, known)
    head = checked.head = seal_before(connection, windows[-1]) if windows else before
    unbounded = frozenset(select_unbounded(connection))
    sealed = _newest_but(connection, unbounded, head)
    context = VerificationContext(signing, known, sealed.through["events"], unbounded)
    seal_range = Range(before.id, windows)
    if effort.jobs > 1 and leaves >= effort.min_leaves and parallel.is_possible(connection):
        done = yield from parallel.verify(connection, seal_range, context, effort.jobs, on_progress)
        checked.seals, checked.events = done.seals, done.events
    else:
        yield from verify_range(connection, seal_range, context, checked, lambda: on_progress(checked))
    for number in sorted(known.keys() - there - {before.id}):
        yield Finding("seals", number, "missing")
    yield from compare_unsealed(connection, head, checked)
    if before.id:
        yield from check_before(connection, before.through["events"], sealed.through["events"])
    for check in (check_recounted, check_recounts, check_audit_entries, check_holds):
        yield from check(connection, sealed)
    on_progress(checked)


def _newest_but(connection: Connection, unbounded: frozenset[int], head: Seal) -> Seal:
    """Return the newest seal that claims no ids beyond the existing rows."""
    number = head.id
    while number in unbounded:
        number -= 1
    return head if number == head.id else seal_before(connection, number)


def _compare_earlier(connection: Connection, before: Seal, known: dict[int, bytes]) -> Iterator[Finding]:
    """Compare the seals before the start of this verification too, but only their hashes."""
    numbers = [number for number in known if number < before.id]
    for start in range(0, len(numbers), PAGE):
        query = text("SELECT id, hash FROM archiver.seals WHERE id = ANY (:numbers) ORDER BY id")
        for row in connection.execute(query, {"numbers": numbers[start : start + PAGE]}):
            if known.pop(row.id) != bytes(row.hash):
                yield Finding("seals", row.id, "not_the_known_one")
