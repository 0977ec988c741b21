"""Changes of the archive, written in the transaction that makes them (I11) and published by `feed`."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, get_args

import msgspec
from sqlalchemy import Connection

from archiver.database import RawStatement, as_json, defer

ChangeType = Literal[
    "chat.created",
    "chat.updated",
    "chat.deleted",
    "chat.erased",
    "session.settled",
    "session.repaired",
    "session.lost",
    "session.coverage",
    "session.rewritten",
    "session.erased",
    "seal.created",
]
TYPES: tuple[str, ...] = get_args(ChangeType)
REWRITTEN: ChangeType = "session.rewritten"
ERASURES = frozenset[ChangeType]({"chat.erased", "session.erased"})
# Changes after which a reader of the transcript reads it again, so that `session.rewritten` would add nothing.
_OF_TRANSCRIPT = ERASURES | {"chat.created", "chat.updated", "chat.deleted", "session.settled", "session.repaired"}


class Change(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A change of the archive: its type, and the ids of its turn, session or seal. Contains no content.

    `is_alone`: no row of another turn changed with this turn. The view of the feed does not show it.
    """

    type: ChangeType
    session_id: str = ""
    chat_id: str | None = None
    seal_id: int | None = None
    is_alone: bool = False


# One narrow row per transaction, for any number of changes: ingest pays for each row and for each index entry.
_INSERT = RawStatement("INSERT INTO archiver.outbox (changed_at, changes) VALUES ($1, $2)")


def insert_changes(connection: Connection, changes: Sequence[Change]) -> None:
    """Add these changes to the outbox; they are published if, and only if, this transaction commits.

    `session.rewritten` is added once per session, and only if no other change concerns the session's transcript.
    """
    if any(each.type == REWRITTEN for each in changes):
        changes = _without_redundant(changes)
    if changes:
        changes_json = as_json(changes)
        defer(connection, _INSERT.bind(datetime.now(UTC).isoformat(), changes_json))


def _without_redundant(changes: Sequence[Change]) -> list[Change]:
    known = {each.session_id for each in changes if each.type in _OF_TRANSCRIPT}
    rewritten = {each.session_id: each for each in changes if each.type == REWRITTEN and each.session_id not in known}
    return [*(each for each in changes if each.type != REWRITTEN), *rewritten.values()]
