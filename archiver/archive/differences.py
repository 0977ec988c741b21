"""Compute changes for the feed from archive rows before and after. Pure.

A change is a difference in the upstream content of a turn, or in the history's wording of one of its messages.
Arrival times, positions and sources are internal; a difference in them is not a change.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from archiver.archive.facts import Key
from archiver.archive.outbox import Change, ChangeType
from archiver.archive.sessions import Row, Rows, chat_row
from archiver.archive.turns import Turn
from archiver.events import INTERNAL_PREFIX

SETTLED = frozenset({"complete", "repaired", "ambiguous"})  # states in which the history agrees with the archive
LOST = "lost"

_FIELDS = (
    "session_id",
    "assistant_id",
    "external_id",
    "status",
    "cost",
    "created_at",
    "updated_at",
    "answered_at",
    "session_name",
    "session_status",
)

MessageText = tuple[str, str, str | None]  # role and content of a message, and the history's wording of it


class TurnState(NamedTuple):
    """The published state of a turn; `content` is only compared."""

    content: Any
    is_deleted: bool
    texts: Sequence[MessageText] = ()


def message_text(row: Mapping[str, Any]) -> MessageText:
    """Return the role and the texts of a row of `messages`."""
    return row["role"], row["content"], row["history_content"]


def turn_state(row: Mapping[str, Any], texts: Sequence[MessageText]) -> TurnState:
    """Return the published state of a turn from its row of `chats` and its messages in order."""
    variables = row["variables"]
    # Postgres stores the keys of JSON in its own order.
    variables = msgspec.json.decode(variables) if isinstance(variables, str) else variables
    return TurnState(([row[name] for name in _FIELDS], variables), row["deleted_at"] is not None, list(texts))


def reassigned_turn_state(*, is_deleted: bool) -> TurnState:
    """Return the state of a formerly unassigned turn, which is published again with its session."""
    return TurnState(None, is_deleted)


def turn_changes(turns: Mapping[Key, Turn], before: Mapping[Key, TurnState]) -> list[Change]:
    """Return the changes of written turns, in order of `began_at`."""
    if not before:  # the usual case
        result = [
            Change("chat.created" if turn.deleted_at is None else "chat.deleted", *key) for key, turn in turns.items()
        ]
    else:
        result = [
            Change(kind, *key)
            for key, turn in turns.items()
            if (kind := _kind(before.get(key), _state_of(key, turn))) is not None
        ]
    result.sort(key=lambda change: turns[change.session_id, change.chat_id or ""].began_at)
    return result


def amendment_changes(turns: Mapping[Key, Turn], before: Mapping[Key, TurnState]) -> list[Change]:
    """Return the changes of turns whose messages stay the same, in order of `began_at`."""
    unknown = TurnState(None, is_deleted=False)
    return [
        Change(kind, *key)
        for key, turn in sorted(turns.items(), key=lambda each: each[1].began_at)
        if (kind := _kind(before.get(key), turn_state(chat_row(*key, turn), before.get(key, unknown).texts)))
    ]


def _state_of(key: Key, turn: Turn) -> TurnState:
    return turn_state(chat_row(*key, turn), [(message.role, message.content, None) for message in turn.messages])


def _kind(before: TurnState | None, after: TurnState) -> ChangeType | None:
    if after.is_deleted and (before is None or not before.is_deleted):
        return "chat.deleted"
    if before is None:
        return "chat.created"
    return "chat.updated" if (before.content, before.texts) != (after.content, after.texts) else None


class PreviousRows(NamedTuple):
    """The rows of sessions before they were rebuilt, and the unassigned turns that were assigned."""

    sessions: Mapping[str, Row]
    chats: Mapping[Key, Row]
    messages: Iterable[Row]
    unassigned: Mapping[str, TurnState]  # by chat id


def session_changes(before: PreviousRows, derived: Sequence[Rows], read: Collection[str]) -> list[Change]:
    """Return the changes of rebuilt sessions; those in `read` have a new reading."""
    messages: dict[str, list[Row]] = defaultdict(list)
    for row in before.messages:
        messages[row["session_id"]].append(row)
    result: list[Change] = []
    for rows in derived:
        session_id = rows.session["session_id"]
        texts_before, texts_after = _by_chat(messages[session_id]), _by_chat(rows.messages)
        for row in sorted(rows.chats, key=_began_at):
            chat_id = row["chat_id"]
            if chat_id.startswith(INTERNAL_PREFIX):
                continue  # known only from history: only the repair is published
            old = before.chats.get((session_id, chat_id))
            was = before.unassigned.get(chat_id) if old is None else turn_state(old, texts_before[chat_id])
            kind = _kind(was, turn_state(row, texts_after[chat_id]))
            result += [Change(kind, session_id, chat_id)] if kind is not None else []
        is_read = session_id in read
        is_new = is_read and _in_order(messages[session_id]) != _in_order(rows.messages)
        result += _session_changes(
            before.sessions.get(session_id, _UNKNOWN), rows.session, is_read=is_read, is_new=is_new
        )
    return result


_UNKNOWN: Row = {"coverage": "open", "repaired_messages": 0}


def _session_changes(before: Row, after: Row, *, is_read: bool, is_new: bool) -> list[Change]:
    """Return the session's changes. `is_new`: a reading has just changed the transcript."""
    session_id, was, now = after["session_id"], before["coverage"], after["coverage"]
    result: list[Change] = []
    if is_read and after["repaired_messages"] > before["repaired_messages"]:
        result.append(Change("session.repaired", session_id))
    if now in SETTLED and (was not in SETTLED or is_new):
        result.append(Change("session.settled", session_id))
    if now == LOST and was != LOST:
        result.append(Change("session.lost", session_id))
    return result


def _by_chat(messages: Iterable[Row]) -> Mapping[str, Sequence[MessageText]]:
    result: dict[str, list[MessageText]] = defaultdict(list)
    for row in sorted(messages, key=itemgetter("ordinal")):
        result[row["chat_id"]].append(message_text(row))
    return result


def _in_order(messages: Iterable[Row]) -> Sequence[tuple[str, str]]:
    """Return the transcript of a session from both sources; empty before the history was read."""
    placed = [row for row in messages if row["place"] is not None]
    return [(row["role"], row["content"]) for row in sorted(placed, key=itemgetter("place"))]


def _began_at(row: Row) -> Any:
    return row["created_at"] or row["occurred_at"] or row["first_received_at"]
