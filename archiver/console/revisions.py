"""Find what later deliveries of a turn and the readings of a history changed, in bounded work."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby, pairwise
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver import events
from archiver.archive import pieces
from archiver.console.word_diff import Part, compare
from archiver.events import EMPTY_CHAT, Chat, Event, Message, responses

MOST_REVISIONS = 50  # deliveries of turns that were delivered more than once
MOST_READINGS = 20
MOST_BYTES = 262_144  # of a delivery, of a reading, and of the pieces of all readings


class Revision(msgspec.Struct, frozen=True):
    """A later delivery of a turn, compared with the one before it. `fields`: name, value before and after."""

    event_id: int
    chat_id: str
    received_at: datetime
    parts: Sequence[Part]
    fields: Sequence[tuple[str, str, str]]


class ReadingChange(msgspec.Struct, frozen=True):
    """A reading of the history. `is_compared`: whether `added` and `removed` compare it with the previous one."""

    event_id: int
    type: str
    received_at: datetime
    is_compared: bool
    messages: int = 0
    added: int = 0
    removed: int = 0


_REVISIONS = text(
    """
    SELECT e.id, e.chat_id, e.received_at, e.body
      FROM archiver.events e
     WHERE e.session_id = :id AND e.type = 'chat.created' AND octet_length(e.body) <= :bytes
       AND e.chat_id IN (SELECT f.chat_id FROM archiver.events f
                          WHERE f.session_id = :id AND f.type = 'chat.created' GROUP BY f.chat_id HAVING count(*) > 1)
     ORDER BY e.id DESC LIMIT :most
    """
)


def select_revisions(connection: Connection, session_id: str) -> Sequence[Revision]:
    """Return the newest revisions of the turns of a conversation, in the order of their arrival."""
    values = {"id": session_id, "bytes": MOST_BYTES, "most": MOST_REVISIONS}
    rows = sorted(connection.execute(_REVISIONS, values).mappings(), key=lambda row: (row["chat_id"], row["id"]))
    by_turn = (list(turn) for _, turn in groupby(rows, key=lambda row: row["chat_id"]))
    found = [_revision(before, after) for turn in by_turn for before, after in pairwise(turn)]
    return sorted(found, key=lambda revision: revision.event_id)


def _revision(before: RowMapping, after: RowMapping) -> Revision:
    old, new = _chat(before), _chat(after)
    fields = [(name, _shown(getattr(old, name)), _shown(getattr(new, name))) for name in _FIELDS]
    return Revision(
        after["id"],
        after["chat_id"],
        after["received_at"],
        compare(_text(old), _text(new)),
        [field for field in fields if field[1] != field[2]],
    )


_FIELDS = ("status", "cost", "variables", "assistant_id", "external_id")


def _chat(row: RowMapping) -> Chat:
    content = events.parse(bytes(row["body"]))
    return content.chat or EMPTY_CHAT if isinstance(content, Event) else EMPTY_CHAT


def _text(chat: Chat) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in (*chat.input, *chat.output))


def _shown(value: Any) -> str:
    return "" if value is None else str(value) if not isinstance(value, dict) else msgspec.json.encode(value).decode()


_READINGS = text(
    """
    SELECT e.id, e.type, e.received_at, e.runs,
           CASE WHEN octet_length(e.body) <= :bytes THEN e.body END AS body, e.frame
      FROM archiver.events e
     WHERE e.session_id = :id AND e.source = 'history' ORDER BY e.id DESC LIMIT :most
    """
)
_SIZE = text("SELECT coalesce(sum(octet_length(content)), 0) FROM archiver.pieces WHERE session_id = :id")


def select_readings(connection: Connection, session_id: str) -> Sequence[ReadingChange]:
    """Return the newest distinct readings of a conversation's history, each with what it changed, oldest first."""
    values = {"id": session_id, "bytes": MOST_BYTES, "most": MOST_READINGS + 1}
    rows = [*connection.execute(_READINGS, values).mappings()][::-1]
    contents = _select_pieces(connection, session_id) if any(row["frame"] is not None for row in rows) else {}
    return list(_changes(session_id, rows, contents))[-MOST_READINGS:]


def _select_pieces(connection: Connection, session_id: str) -> Mapping[int, bytes]:
    if int(connection.scalar(_SIZE, {"id": session_id}) or 0) > MOST_BYTES:
        return {}
    return pieces.select_contents(connection, [session_id]).get(session_id, {})


def _changes(session_id: str, rows: Sequence[RowMapping], contents: Mapping[int, bytes]) -> Iterator[ReadingChange]:
    assembler = pieces.ResponseAssembler(contents)
    before: Counter[Message] | None = Counter()
    for row in rows:
        messages = _messages(session_id, row, assembler)
        if messages is None or before is None:
            yield ReadingChange(row["id"], row["type"], row["received_at"], is_compared=False)
        else:
            shown = Counter(messages)
            yield ReadingChange(
                row["id"],
                row["type"],
                row["received_at"],
                is_compared=True,
                messages=len(messages),
                added=(shown - before).total(),
                removed=(before - shown).total(),
            )
        if row["type"] in (responses.READ, responses.REDACTED):
            before = None if messages is None else Counter(messages)


def _messages(session_id: str, row: RowMapping, assembler: pieces.ResponseAssembler) -> Sequence[Message] | None:
    """Return the messages of a reading; None if they are not counted: erased, too large, or not a list."""
    if row["type"] not in (responses.READ, responses.REDACTED):
        return None
    body = row["body"]
    if row["frame"] is not None:
        try:
            body = b"".join(assembler.parts([bytes(each) for each in row["frame"]], row["runs"]))
        except LookupError:
            return None
    return None if body is None else responses.parse_snapshot(row["type"], session_id, bytes(body)).messages or ()
