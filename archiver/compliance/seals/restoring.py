"""Verify responses stored in pieces against the sealed digest of their bytes."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, text

from archiver.archive import pieces
from archiver.compliance.seals.findings import Finding

_SELECT = text(
    """
    SELECT id, session_id, salt, body IS NOT NULL AS has_body, body_digest, frame, runs FROM archiver.events
     WHERE id = ANY (:ids) AND (frame IS NOT NULL OR runs IS NOT NULL)
     ORDER BY session_id, id
    """
)


def check_in_pieces(connection: Connection, event_ids: Sequence[int]) -> Iterator[Finding]:
    """Yield events whose pieces do not reproduce the received bytes.

    Also yields events that have a frame or runs in addition to their bytes, or after their erasure.

    Memory is bounded by the pieces of one session.
    """
    rows = connection.execute(_SELECT, {"ids": list(event_ids)}).all()
    for session_id, of_session in groupby(rows, key=attrgetter("session_id")):
        contents = pieces.select_contents(connection, [session_id]).get(session_id, {})
        restored = pieces.ResponseAssembler(contents)
        for row in of_session:
            if row.has_body or row.salt is None:
                yield Finding("events", row.id, "changed")
            elif not _is_intact(row, restored):
                yield Finding("events", row.id, "not_restorable")


def _is_intact(row: Any, restored: pieces.ResponseAssembler) -> bool:
    made = sha256(row.salt)
    try:
        for part in restored.parts(row.frame, row.runs):
            made.update(part)
    except (LookupError, TypeError, ValueError):  # frame and runs may be anything
        return False
    return made.digest() == bytes(row.body_digest)
