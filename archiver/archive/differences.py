"""Compute changes for the feed by comparing the archive rows before and after a transaction. Pure.

A turn has changed if its upstream content differs, or the history's wording of one of its messages. A difference in
any other visible value, such as a position, a source or an arrival time, is published as `session.rewritten`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from archiver.archive.facts import Key
from archiver.archive.outbox import REWRITTEN, Change, ChangeType
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
    "session_name",
    "session_status",
)

_TIMES = ("answered_at", "occurred_at", "first_received_at", "deleted_at")

MessageText = tuple[str, str, str | None]  # role and content of a message, and the history's wording of it


class TurnState(NamedTuple):
    """The state of a turn, to be compared with a later one.

    A difference in `times` alone is published as `session.rewritten`.
    """

    content: Any
    is_deleted: bool
    texts: Sequence[MessageText] = ()
    times: Any = None


def message_text(row: Mapping[str, Any]) -> MessageText:
    """Return the role and the texts of a row of `messages`."""
    return row["role"], row["content"], row["history_content"]


def turn_state(row: Mapping[str, Any], texts: Sequence[MessageText]) -> TurnState:
    """Return the published state of a turn from its row of `chats` and its messages in order."""
    variables = row["variables"]
    # Postgres stores the keys of JSON in its own order.
    variables = msgspec.json.decode(variables) if isinstance(variables, str) else variables
    content, times = ([row[name] for name in _FIELDS], variables), [row[name] for name in _TIMES]
    return TurnState(content, row["deleted_at"] is not None, list(texts), times)


def reassigned_turn_state(*, is_deleted: bool) -> TurnState:
    """Return the state of a formerly unassigned turn, which is published again with its session."""
    return TurnState(None, is_deleted)


def turn_changes(turns: Mapping[Key, Turn], before: Mapping[Key, TurnState]) -> list[Change]:
    """Return the changes of written turns, in order of `began_at`, then those of their sessions."""
    if before:
        return _compare(turns, before, {key: _state_of(key, turn) for key, turn in turns.items()})
    result = [
        Change("chat.created" if turn.deleted_at is None else "chat.deleted", *key, is_alone=True)
        for key, turn in turns.items()
    ]
    _sort(result, turns)
    return result


def amendment_changes(turns: Mapping[Key, Turn], before: Mapping[Key, TurnState]) -> list[Change]:
    """Return the changes of turns whose messages stay the same, as `turn_changes` does."""
    unknown = TurnState(None, is_deleted=False)
    after = {key: turn_state(chat_row(*key, turn), before.get(key, unknown).texts) for key, turn in turns.items()}
    return _compare(turns, before, after)


def _compare(
    turns: Mapping[Key, Turn], before: Mapping[Key, TurnState], after: Mapping[Key, TurnState]
) -> list[Change]:
    kinds = {key: _kind(before.get(key), state) for key, state in after.items()}
    result = [Change(kind, *key, is_alone=True) for key, kind in kinds.items() if kind is not None]
    _sort(result, turns)
    rewritten = {key[0] for key, was in before.items() if key in after and was.times != after[key].times}
    return result + [Change(REWRITTEN, session_id) for session_id in sorted(rewritten) if session_id]


def _sort(changes: list[Change], turns: Mapping[Key, Turn]) -> None:
    changes.sort(key=lambda change: turns[change.session_id, change.chat_id or ""].began_at)


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


def session_changes(
    before: PreviousRows, derived: Sequence[Rows], read: Collection[str], rewritten: Iterable[str]
) -> list[Change]:
    """Return the changes of rebuilt sessions.

    `read`: the sessions with a new reading. `rewritten`: the sessions whose visible rows differ.
    """
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
    return result + [Change(REWRITTEN, session_id) for session_id in sorted(rewritten)]


def without_events(changes: Iterable[Change]) -> list[Change]:
    """Return the changes of sessions that were derived again from known facts, as changes of coverage and rows.

    Changes that state an upstream event are replaced, because nothing happened upstream.
    """
    return [each if each.type == COVERAGE else Change(REWRITTEN, each.session_id) for each in changes]


COVERAGE: ChangeType = "session.coverage"
_COVERAGE = ("coverage", "reason", "repaired_messages")
_UNKNOWN: Row = {"coverage": "open", "reason": "awaiting_history", "repaired_messages": 0}


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
    if any(before[name] != after[name] for name in _COVERAGE):
        result.append(Change(COVERAGE, session_id))
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
