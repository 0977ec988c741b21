"""Seal the ledger: hash the settled rows into a tree, and chain the tree to the earlier trees."""

import time
from collections.abc import Callable

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, text

from archiver.archive.outbox import Change, insert_changes
from archiver.compliance.seals import bounds, chain
from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.leaves import KINDS, pack, select_leaves
from archiver.compliance.seals.settling import Settled, Settling
from archiver.database import Lock, run
from archiver.errors import ArchiverError

log = structlog.get_logger(__name__)

SETTLE_ATTEMPTS, SETTLE_PAUSE_SECONDS = 20, 0.25  # waits for writers, if the caller does not retry later

_SETTLED = ("events", "acts", "erasures", "removals")


class LedgerBusyError(ArchiverError):
    """Some transactions that write to the ledger are still open."""

    message = "some transactions that write to the ledger are still open. Retry in a moment."


def seal(
    engine: Engine,
    key: Ed25519PrivateKey | None = None,
    limit: int | None = None,
    settling: Settling | None = None,
    beat: Callable[[], None] = lambda: None,
) -> list[Seal]:
    """Seal all settled rows in at most `limit` seals; return the new seals, of which there may be none.

    `settling` carries state from call to call, so that no call waits for long writing transactions. `beat` is called
    after each seal. Raises `LedgerBusyError`, `BoundsError` if the newest seal was forged, and `SequenceError` if a
    sequence was set back.
    """
    run(engine, bounds.require_sequences)
    settled = settling.settle(engine) if settling is not None else _settle(engine)
    if settled is None:
        raise LedgerBusyError
    made: list[Seal] = []
    while limit is None or len(made) < limit:
        new = _seal_once(engine, settled, key)
        if new is None:
            return made
        log.info("seal created", seal=new.id, leaves=new.size, hash=new.hash.hex(), key_id=new.key_id)
        made.append(new)
        beat()
        # Concurrent redeliveries are left for the next seal, because they may never end.
        if new.size < bounds.LEAVES and all(new.through[name] >= settled[f"{name}_through"] for name in _SETTLED):
            return made
    return made


def _seal_once(engine: Engine, settled: dict[str, int], key: Ed25519PrivateKey | None) -> Seal | None:
    def work(connection: Connection) -> Seal | None:
        Lock.SEALING.take(connection, exclusive=True)
        return _seal_next(connection, settled, key)

    return run(engine, work, statement_seconds=60)


def _settle(engine: Engine) -> Settled | None:
    settling = Settling()
    for _ in range(SETTLE_ATTEMPTS):
        if (settled := settling.settle(engine)) is not None or not settling.is_waiting:
            return settled
        time.sleep(SETTLE_PAUSE_SECONDS)
    return None


def _seal_next(connection: Connection, settled: dict[str, int], key: Ed25519PrivateKey | None) -> Seal | None:
    before = chain.select_newest(connection)
    bounds.require_bounded(connection, before)
    sealed = before.through
    through = {kind.table: settled.get(kind.through, 0) for kind in KINDS}
    through["events"] = _at_most(connection, "events", sealed["events"], through["events"])
    through["recounts"] = _recount(connection, sealed["events"], through["events"])
    for name in ("recounts", *_SETTLED[1:]):
        through[name] = _at_most(connection, name, sealed[name], through[name])
    # Another sealer may have advanced further.
    through = {name: max(number, sealed[name]) for name, number in through.items()}
    entries = b"".join(
        pack(kind.letter, select_leaves(connection, kind, sealed[kind.table], through[kind.table])) for kind in KINDS
    )
    if not entries:
        return None
    new = chain.make(before, entries, through, key)
    chain.insert_seal(connection, new, entries)
    insert_changes(connection, [Change("seal.created", seal_id=new.id)])
    return new


def _at_most(connection: Connection, table: str, after: int, through: int) -> int:
    """Return the id up to which the new rows fit into one seal."""
    query = f"SELECT id FROM archiver.{table} WHERE id > :after AND id <= :through ORDER BY id OFFSET :most LIMIT 1"  # noqa: S608  # only a constant name is inserted, never input
    beyond = connection.scalar(text(query), {"after": after, "through": through, "most": bounds.LEAVES})
    return through if beyond is None else int(beyond) - 1


# Events delivered several times before their seal, and events redelivered since.
_CLEAR_NEW = text(
    """
    UPDATE archiver.events SET is_recounted = false
     WHERE id > :after AND id <= :through AND delivery_count > 1
    RETURNING id, delivery_count, last_received_at, earliest_at
    """
)
_CLEAR = text(
    """
    UPDATE archiver.events SET is_recounted = false
     WHERE is_recounted
       AND id <= coalesce((SELECT max(id) FROM (SELECT id FROM archiver.events WHERE is_recounted AND id <= :after
                           ORDER BY id LIMIT :most) AS page), 0)
    RETURNING id, delivery_count, last_received_at, earliest_at
    """
)
_RECOUNT = text(
    "INSERT INTO archiver.recounts (event_id, delivery_count, last_received_at, earliest_at)"
    " VALUES (:id, :delivery_count, :last_received_at, :earliest_at)"
)


def _recount(connection: Connection, after: int, through: int) -> int:
    """Record the counters of redelivered events; return the id of the last record."""
    # A concurrent redelivery waits for this transaction, or marks the event again.
    cleared = [
        *connection.execute(_CLEAR_NEW, {"after": after, "through": through}).mappings(),
        *connection.execute(_CLEAR, {"after": after, "most": bounds.LEAVES}).mappings(),
    ]
    if cleared:
        connection.execute(_RECOUNT, [dict(row) for row in sorted(cleared, key=lambda row: int(row["id"]))])
    return int(connection.scalar(text("SELECT coalesce(max(id), 0) FROM archiver.recounts")) or 0)
