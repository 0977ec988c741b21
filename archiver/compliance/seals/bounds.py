"""Check the limits of a seal: it may not claim ids beyond its listed rows or beyond the existing rows."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from archiver.compliance.seals import chain
from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.leaves import EVENTS, KINDS
from archiver.database import sequences, tables
from archiver.errors import ArchiverError

# Removed events are known from `removals`; rows of the other tables are never removed.
_SELECT_UNBOUNDED = text(
    f"""
    WITH newest AS MATERIALIZED (
        SELECT greatest((SELECT max(id) FROM archiver.events),
                        (SELECT max(event_id) FROM archiver.removals)) AS events,
               {", ".join(f"(SELECT max(id) FROM archiver.{kind.table}) AS {kind.table}" for kind in KINDS[1:])}
    )
    SELECT s.id FROM archiver.seals s CROSS JOIN newest n
     WHERE s.id > :after
       AND ({" OR ".join(f"s.{kind.through} > coalesce(n.{kind.table}, 0)" for kind in KINDS)})
     ORDER BY s.id
    """  # noqa: S608  # names of tables
)
_SELECT_RANGE = text(
    f"SELECT {', '.join(f'(SELECT max(id) FROM archiver.{kind.table}) AS {kind.table}' for kind in KINDS)}"  # noqa: S608  # names of tables
)
LEAVES = 10_000  # per table and seal


class BoundsError(ArchiverError):
    """The newest seal claims rows that do not exist, so no seal can follow it; the message names the remedy."""


class SequenceError(ArchiverError):
    """A sequence was set back, so new rows would get ids that are sealed; the message names the remedy."""


def require_sequences(connection: Connection) -> None:
    """Raise `SequenceError` if new rows of a sealed table would get ids in use: no seal would contain them."""
    sealed = {f"{tables.SCHEMA}.{kind.table}" for kind in KINDS}
    behind = sequences.select_behind(connection, [tables.SCHEMA], of=sealed)
    if behind:
        found = "; ".join(f"{each.name} {each}" for each in behind)
        remedies = " ".join(f"{each.remedy};" for each in behind)
        raise SequenceError(
            f"sequences were set back: {found}. No seal would contain new rows. Run `archiver migrate --repair`, or"
            f" as the owner: {remedies}"
        )


def select_unbounded(connection: Connection, after: int = 0) -> list[int]:
    """Return the seals after this one that claim ids beyond all rows that ever existed."""
    return list(connection.scalars(_SELECT_UNBOUNDED, {"after": after}))


def is_bounded(seal: Seal, entries: bytes, before: Seal) -> bool:
    """Return whether the seal lists rows and claims no id beyond the last listed row of each table.

    If a table has more rows than fit, the seal may claim ids up to the row before the next one.
    """
    letters, place = entries[:: chain.ENTRY_SIZE], 0
    for kind in KINDS:
        count = letters.count(kind.letter)
        place += count
        last = before.through[kind.table]
        if count:
            last = int.from_bytes(entries[(place - 1) * chain.ENTRY_SIZE + 1 :][:8], "big", signed=True)
        if seal.through[kind.table] > last and count < LEAVES:
            return False
    return bool(entries)


def require_bounded(connection: Connection, newest: Seal) -> None:
    """Raise `BoundsError` if no seal can follow this one, the newest."""
    if newest.id and (newest.size == 0 or select_unbounded(connection, newest.id - 1)):
        there = dict(connection.execute(_SELECT_RANGE).mappings().one())
        claimed = ", ".join(_claims(newest, there))
        raise BoundsError(
            f"seal {newest.id} claims rows that do not exist ({claimed}). Either it was not made"
            " by `archiver seal`, or rows that it seals were removed. No new seal can follow it. First run"
            " `archiver verify` and find the cause; docs/seals.md explains how to remove a forged seal."
        )


def _claims(newest: Seal, there: dict[str, int | None]) -> Iterator[str]:
    for kind in KINDS:
        claimed, last = newest.through[kind.table], there[kind.table] or 0
        if claimed > last:
            yield f"{kind.table} up to {claimed}, but the newest is {last}"
    if newest.size == 0:
        yield f"it lists no rows and claims {EVENTS.table} up to {newest.through[EVENTS.table]}"
