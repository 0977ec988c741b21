"""What changed in the archive, as the feed tells it: rows before and after, compared. Pure.

Times of arrival, places and sources are ours and no change; what upstream told of a turn is, and so is the wording
that history has for one of its messages.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from archiver.events import OURS
from archiver.outbox import Change, ChangeType
from archiver.projection.facts import Key
from archiver.projection.sessions import Row, Rows, chat_row
from archiver.projection.turns import Turn

SETTLED = frozenset({"complete", "repaired", "ambiguous"})  # a session whose history agrees with the archive
LOST = "lost"

_FIELDS = (
    "session_id",
    "assistant_id",
    "external_id",
    "status",
    "cost",
    "created_at",
    "updated_at",
    "session_name",
    "session_status",
)

Said = tuple[str, str, str | None]  # role and content of a message, and history's own wording of it


class Shown(NamedTuple):
    """What the archive shows of a turn; `told` is only compared."""

    told: Any
    is_deleted: bool


def said_in(row: Mapping[str, Any]) -> Said:
    """What a row of `messages` says."""
    return row["role"], row["content"], row["history_content"]


def shown(row: Mapping[str, Any], said: Sequence[Said]) -> Shown:
    """Of a row of `chats`, and of its messages in order."""
    variables = row["variables"]
    # Postgres keeps JSON in an order of its own.
    variables = msgspec.json.decode(variables) if isinstance(variables, str) else variables
    return Shown(([row[name] for name in _FIELDS], variables, list(said)), row["deleted_at"] is not None)


def shown_elsewhere(*, is_deleted: bool) -> Shown:
    """Of a turn that stood without a session: whatever it is now, it is told where it belongs."""
    return Shown(None, is_deleted)


def of_turns(turns: Mapping[Key, Turn], before: Mapping[Key, Shown]) -> list[Change]:
    """What became of turns that were written, in the order in which they began; new ones were not shown before."""
    if not before:  # as nearly always
        found = [
            Change("chat.created" if turn.deleted_at is None else "chat.deleted", *key) for key, turn in turns.items()
        ]
    else:
        found = [
            Change(kind, *key)
            for key, turn in turns.items()
            if (kind := _kind(before.get(key), _shown_of(key, turn))) is not None
        ]
    found.sort(key=lambda change: turns[change.session_id, change.chat_id or ""].began_at)
    return found


def _shown_of(key: Key, turn: Turn) -> Shown:
    return shown(chat_row(*key, turn), [(message.role, message.content, None) for message in turn.messages])


def _kind(before: Shown | None, after: Shown) -> ChangeType | None:
    if after.is_deleted and (before is None or not before.is_deleted):
        return "chat.deleted"
    if before is None:
        return "chat.created"
    return "chat.updated" if before.told != after.told else None


class Before(NamedTuple):
    """The rows of some sessions before they were made anew; and which turns without a session went into them."""

    sessions: Mapping[str, Row]
    chats: Mapping[Key, Row]
    messages: Iterable[Row]
    unplaced: Mapping[str, Shown]  # by chat id


def of_sessions(before: Before, derived: Sequence[Rows], read: Collection[str]) -> list[Change]:
    """What became of sessions that were made anew; of those in `read` a reading has just been recorded."""
    messages: dict[str, list[Row]] = defaultdict(list)
    for row in before.messages:
        messages[row["session_id"]].append(row)
    found: list[Change] = []
    for rows in derived:
        session_id = rows.session["session_id"]
        was_said, is_said = _by_chat(messages[session_id]), _by_chat(rows.messages)
        for row in sorted(rows.chats, key=_began_at):
            chat_id = row["chat_id"]
            if chat_id.startswith(OURS):
                continue  # only history knows it: that messages were supplied is what is told
            old = before.chats.get((session_id, chat_id))
            was = before.unplaced.get(chat_id) if old is None else shown(old, was_said[chat_id])
            kind = _kind(was, shown(row, is_said[chat_id]))
            found += [Change(kind, session_id, chat_id)] if kind is not None else []
        is_read = session_id in read
        is_new = is_read and _in_order(messages[session_id]) != _in_order(rows.messages)
        found += _of_session(before.sessions.get(session_id, _UNKNOWN), rows.session, is_read=is_read, is_new=is_new)
    return found


_UNKNOWN: Row = {"coverage": "open", "repaired_messages": 0}


def _of_session(before: Row, after: Row, *, is_read: bool, is_new: bool) -> list[Change]:
    """`is_new`: a reading has just told something that the archive did not hold."""
    session_id, was, now = after["session_id"], before["coverage"], after["coverage"]
    found: list[Change] = []
    if is_read and after["repaired_messages"] > before["repaired_messages"]:
        found.append(Change("session.repaired", session_id))
    if now in SETTLED and (was not in SETTLED or is_new):
        found.append(Change("session.settled", session_id))
    if now == LOST and was != LOST:
        found.append(Change("session.lost", session_id))
    return found


def _by_chat(messages: Iterable[Row]) -> Mapping[str, Sequence[Said]]:
    found: dict[str, list[Said]] = defaultdict(list)
    for row in sorted(messages, key=itemgetter("ordinal")):
        found[row["chat_id"]].append(said_in(row))
    return found


def _in_order(messages: Iterable[Row]) -> Sequence[tuple[str, str]]:
    """The transcript of a session, whoever told it; none of it before history was read."""
    placed = [row for row in messages if row["place"] is not None]
    return [(row["role"], row["content"]) for row in sorted(placed, key=itemgetter("place"))]


def _began_at(row: Row) -> Any:
    return row["created_at"] or row["occurred_at"] or row["first_received_at"]
