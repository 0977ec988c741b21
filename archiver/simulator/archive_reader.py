"""Read the archive as analysts do, through the views, and the ledger and the quarantine as auditors do."""

from collections.abc import Collection
from dataclasses import dataclass

import psycopg

from archiver.simulator.comparison import Archive, ArchivedMessage, ChatRow, ConversationRow, TranscriptMessage


@dataclass(frozen=True, slots=True)
class Holdings:
    """The content of one database."""

    archive: Archive
    facts: int  # rows of the ledger
    deliveries: int  # of all those facts together
    quarantined: frozenset[bytes]
    positions_ok: bool  # 1, 2, 3 … in every session


def read(url: str) -> Holdings:
    """Return the content of the database in one snapshot."""
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        messages = connection.execute(
            "SELECT session_id, position, chat_id, role, content, deleted_at IS NOT NULL"
            " FROM analytics.messages ORDER BY session_id, position"
        ).fetchall()
        chats = connection.execute(
            "SELECT session_id, chat_id, deleted_at IS NOT NULL, cost, variables FROM analytics.chats"
        ).fetchall()
        conversations = connection.execute(
            "SELECT session_id, chats, messages, user_messages, assistant_messages, cost, deleted_chats"
            " FROM analytics.conversations"
        ).fetchall()
        ledger = connection.execute(
            "SELECT count(*), coalesce(sum(delivery_count), 0) FROM archiver.events"
        ).fetchone()
        quarantined = connection.execute("SELECT body FROM archiver.quarantine").fetchall()
    archive = Archive(
        chats=[ChatRow(*row) for row in chats], conversations=[ConversationRow(*row) for row in conversations]
    )
    positions: dict[str, list[int]] = {}
    for session_id, position, *values in messages:
        archive.messages.setdefault(session_id, []).append(TranscriptMessage(*values))
        positions.setdefault(session_id, []).append(position)
    facts, deliveries = ledger or (0, 0)
    return Holdings(
        archive=archive,
        facts=facts,
        deliveries=int(deliveries),
        quarantined=frozenset(bytes(row[0]) for row in quarantined),
        positions_ok=_counted(positions.values()),
    )


def read_lines(url: str) -> dict[str, list[ArchivedMessage]]:
    """Return the messages by session, in order."""
    lines: dict[str, list[ArchivedMessage]] = {}
    with psycopg.connect(url) as connection:
        for session_id, *line in connection.execute(
            "SELECT session_id, chat_id, role, content, source, in_history"
            " FROM analytics.messages ORDER BY session_id, position"
        ):
            lines.setdefault(session_id, []).append(ArchivedMessage(*line))
    return lines


def _counted(sequences: Collection[list[int]]) -> bool:
    return all(positions == list(range(1, len(positions) + 1)) for positions in sequences)
