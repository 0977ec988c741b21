"""Inclusion proofs that an event is in a seal, checkable with nothing but SHA-256."""

from typing import Any

import msgspec
from sqlalchemy import Connection, select

from archiver.compliance.seals import chain, merkle
from archiver.compliance.seals.leaves import EVENTS, select_leaf
from archiver.database import tables
from archiver.errors import ArchiverError


class NotSealedError(ArchiverError):
    """The event does not exist, is not sealed yet, or is missing from its seal; the message says which."""


class Proof(msgspec.Struct, frozen=True):
    """An inclusion proof, which docs/seals.md checks in twenty lines; byte strings in hexadecimal.

    `leaf`: the bytes that stand for the event. `path`: the hashes from this leaf, the one at `index` (from 0) of
    `leaves`, to the root. `statement`: the seal's text, which contains the root; `signature` is over it.
    """

    event: int
    leaf: str
    index: int
    leaves: int
    path: list[str]
    seal: int
    statement: str
    hash: str
    key_id: str | None
    signature: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the proof as plain values."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def prove(connection: Connection, event_id: int) -> Proof:
    """Return the proof that the ledger contained this event when it was sealed. Raises `NotSealedError`."""
    leaf = select_leaf(connection, EVENTS, event_id)
    if leaf is None:
        raise NotSealedError(f"event {event_id} does not exist")
    number = connection.scalar(
        select(tables.seals.c.id)
        .where(tables.seals.c.events_through >= event_id)
        .order_by(tables.seals.c.id)
        .limit(1)
    )
    if number is None:
        raise NotSealedError(f"event {event_id} is not sealed yet: run `archiver seal`")
    seal, entries = next(chain.select_seals(connection, number - 1, number))
    places = [
        n for n, entry in enumerate(chain.unpack(entries)) if entry.letter == EVENTS.letter and entry.id == event_id
    ]
    if len(places) != 1:
        held = "does not contain" if not places else "contains more than once"
        raise NotSealedError(f"seal {number} {held} event {event_id}: run `archiver verify`")
    (index,) = places
    return Proof(
        event=event_id,
        leaf=leaf.hex(),
        index=index,
        leaves=seal.size,
        path=[step.hex() for step in merkle.path(chain.hashes(entries), index)],
        seal=seal.id,
        statement=seal.statement.decode(),
        hash=seal.hash.hex(),
        key_id=seal.key_id,
        signature=None if seal.signature is None else seal.signature.hex(),
    )
