"""Select the records related to a conversation: holds, erasures, and follow-ups sent."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.compliance import erasure
from archiver.compliance.erasure import Target

MOST = 50  # erasures, and follow-ups


class Related(msgspec.Struct, frozen=True):
    """The ids of the holds that cover a conversation, its newest erasures, and its newest follow-ups."""

    holds: Sequence[int]
    erasures: Sequence[RowMapping]
    followups: Sequence[RowMapping]


_ERASURES = text(
    """
    SELECT id, chat_id, erased_at, rule FROM archiver.erasures
     WHERE session_id = :id ORDER BY id DESC LIMIT :most
    """
)
_FOLLOWUPS = text(
    """
    SELECT d.subscription_id, d.cursor, d.type, d.changed_at, d.state, d.attempts
      FROM archiver.deliveries d WHERE d.session_id = :id ORDER BY d.cursor DESC LIMIT :most
    """
)


def select_related(connection: Connection, session_id: str) -> Related:
    """Return the records related to a conversation."""
    target, values = Target(session_id), {"id": session_id, "most": MOST}
    return Related(
        erasure.covering(connection, [target]).get(target, []),
        connection.execute(_ERASURES, values).mappings().all(),
        connection.execute(_FOLLOWUPS, values).mappings().all(),
    )
