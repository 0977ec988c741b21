"""Compare rows of the sealed tables with the lists of their seals."""

from collections.abc import Container, Iterator, Sequence

import msgspec
from sqlalchemy import Connection, text

from archiver.compliance.seals import chain
from archiver.compliance.seals.chain import Entry, Seal
from archiver.compliance.seals.consistency import check_unusual
from archiver.compliance.seals.findings import Finding
from archiver.compliance.seals.leaves import BY_LETTER, EVENTS, KINDS, read_runs

Sealed = tuple[Seal, bytes]  # a seal and its packed entries


class Checked(msgspec.Struct):
    """The progress of a verification."""

    seals: int = 0
    events: int = 0
    unsealed: int = 0  # events
    compared: int = 0  # seals compared with those exported earlier
    head: Seal = chain.FIRST


def compare(
    connection: Connection,
    window: Sequence[Sealed],
    start: Seal,
    through: int,
    checked: Checked,
    *,
    forged: Container[int] = (),
) -> Iterator[Finding]:
    """Compare the lists of these seals, which follow `start`, with the rows; events are sealed up to `through`.

    If only a forged seal covers a row, the seal is reported but the row is not.
    """
    result: list[list[bytes]] = [[] for _ in window]
    unusual: list[int] = []
    for kind in KINDS:
        # The archiver's rows have ids from 1; rows inserted by others may have lower ids.
        after = start.through[kind.table] if start.id else None
        runs = read_runs(connection, kind, after, [seal.through[kind.table] for seal, _ in window])
        for (seal, _), rows, run in zip(window, result, runs, strict=True):
            rows.extend(run.entries)
            unusual += run.unusual
            for event_id in run.bodies:
                yield Finding(kind.table, event_id, "body_changed", seal.id)
        if kind is EVENTS:
            for (seal, _), run in zip(window, runs, strict=True):
                if seal.id in forged:
                    checked.unsealed += len(run.entries)
                else:
                    checked.events += len(run.entries)
    for (seal, entries), packed in zip(window, map(b"".join, result), strict=True):
        if packed != entries:
            differences = _differences(connection, seal, chain.unpack(entries), chain.unpack(packed))
            yield from (each for each in differences if seal.id not in forged or each.fault != "inserted")
    yield from check_unusual(connection, unusual, through)


def _differences(
    connection: Connection, seal: Seal, entries: Sequence[Entry], rows: Sequence[Entry]
) -> Iterator[Finding]:
    """Yield each difference between the list of one seal and the rows of its range."""
    listed = {(entry.letter, entry.id): entry.hash for entry in entries}
    removed = _removed(connection, [entry.id for entry in entries if entry.letter == EVENTS.letter])
    for row in rows:
        known = listed.pop((row.letter, row.id), None)
        if known != row.hash:
            fault = "inserted" if known is None else "changed"
            yield Finding(BY_LETTER[row.letter].table, row.id, fault, None if known is None else seal.id)
    for letter, row_id in listed:
        if letter not in BY_LETTER:
            yield Finding("seals", seal.id, "altered_leaves")
        elif letter != EVENTS.letter or row_id not in removed:
            yield Finding(BY_LETTER[letter].table, row_id, "missing", seal.id)


def _removed(connection: Connection, event_ids: Sequence[int]) -> set[int]:
    """Return the events among these that retention removed."""
    query = text("SELECT event_id FROM archiver.removals WHERE event_id = ANY (:event_ids)")
    return set(connection.scalars(query, {"event_ids": list(event_ids)}))


PAGE = 20_000  # unsealed events per query
_BEYOND = text("SELECT id FROM archiver.events WHERE id > :after ORDER BY id OFFSET :most LIMIT 1")


def compare_unsealed(connection: Connection, head: Seal, checked: Checked) -> Iterator[Finding]:
    """Check the events after the newest seal individually."""
    through, lowest, highest = head.through["events"], -(2**63), 2**63 - 1
    after, bound = (through if head.id else None), lowest
    while bound < highest:
        following = {"after": lowest if after is None else after, "most": PAGE}
        bound = int(connection.scalar(_BEYOND, following) or highest)
        (run,) = read_runs(connection, EVENTS, after, [bound])
        checked.unsealed += len(run.entries)
        for event_id in run.bodies:
            yield Finding("events", event_id, "body_changed")
        yield from check_unusual(connection, run.unusual, through)
        after = bound
