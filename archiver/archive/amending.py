"""Write turns of a session whose history was read, if its transcript stays the same: a deletion, a status, a cost.

The rows are those that `sessions.derive` would return for the whole session. Its transcript is a function of the
turns as `sessions.aligned` returns them, so a turn that `aligned` returns unchanged changes no line. Only the time of
its newest revision may differ. It decides two things: the order of turns that began at the same time, and whether the
answer of a webhook or a different answer in the history is newer.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from archiver.archive import coverage, differences, rows
from archiver.archive.coverage import Timing
from archiver.archive.facts import Key
from archiver.archive.outbox import Change
from archiver.archive.sessions import aligned
from archiver.archive.transcript import TurnMessages
from archiver.archive.turns import Fact, Turn, fold
from archiver.database import RawStatement

_SELECT_LINES = RawStatement(
    """
    SELECT m.role, m.content, m.source, m.in_history FROM archiver.messages m
     WHERE m.session_id = $1 AND m.chat_id = $2 ORDER BY m.ordinal
    """
)
_SELECT_TIES = RawStatement(
    """
    SELECT count(*) AS count FROM archiver.chats c
     WHERE c.session_id = $1 AND c.chat_id <> $2 AND c.source <> 'history'
       AND coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at) = $3
    """
)
_UPDATE_SESSION = RawStatement(
    """
    UPDATE archiver.sessions
       SET coverage = $2, reason = $3, reconcile_at = $4,
           append_after = CASE WHEN append_after IS NOT NULL THEN greatest(append_after, $5) END
     WHERE session_id = $1
    """
)


class Amendment:
    """The turns of a batch that change no line of a session's transcript.

    `own`: the new facts about all turns of the batch, by chat id. `earlier`: the facts already known about these
    turns. `others`: the new facts about the turns that may change a line, by chat id.
    """

    def __init__(
        self,
        connection: Connection,
        status: Any,
        own: Mapping[str, Sequence[Fact]],
        earlier: Mapping[Key, Sequence[Fact]],
    ) -> None:
        self._connection, self._status = connection, status
        self._session_id: str = status.session_id
        self._turns: dict[str, Turn] = {}
        self._new: list[Turn] = []
        self.others: dict[str, Sequence[Fact]] = {}
        for chat_id, chat_facts in own.items():
            turn = self._amended(chat_id, chat_facts, earlier.get((self._session_id, chat_id)))
            if turn is None:
                self.others[chat_id] = chat_facts
            else:
                self._turns[chat_id] = turn

    def _amended(self, chat_id: str, own: Sequence[Fact], known: Sequence[Fact] | None) -> Turn | None:
        """Return the turn with its new facts; None if it may change a line."""
        if any(fact.received_at <= self._status.read_at for fact in own):
            return None
        if known is None:
            turn = fold(own)
            if turn.messages:
                return None
            self._new.append(turn)
            return turn
        if not any(fact.event.session_id == self._session_id for fact in known):
            return None  # its facts can no longer be parsed, or it was unassigned until now
        turn, read_at = fold([*own, *known]), self._status.read_at
        before, after = aligned(chat_id, fold(known), read_at), aligned(chat_id, turn, read_at)
        return turn if self._is_same(before, after) else None

    def _is_same(self, before: TurnMessages, after: TurnMessages) -> bool:
        """Return whether this turn and all other turns of the session keep their lines."""
        if msgspec.structs.replace(before, revised_at=after.revised_at) != after:
            return False
        if before.revised_at == after.revised_at or not after.messages:
            return True
        read_at = self._status.reconciled_at
        if self._has_ties(after):
            return False
        if read_at is None or before.revised_at > read_at:  # newer than everything that the history shows
            return True
        # Without `append_after`, the lines may result from a second alignment, and the first one is unknown.
        return self._status.append_after is not None and self._is_shown_alike(after, read_at)

    def _has_ties(self, turn: TurnMessages) -> bool:
        """Return whether another turn began at the same time."""
        ((count,),) = _SELECT_TIES.execute(
            self._connection, self._session_id, turn.chat_id, turn.began_at.isoformat()
        )
        return bool(count)

    def _is_shown_alike(self, turn: TurnMessages, read_at: datetime) -> bool:
        """Return whether the archived lines are exactly the turn's own messages, so that its time decides nothing.

        False for a turn with several inputs or answers: its time also decides whether it repeats earlier ones.
        """
        if turn.inputs > 1 or len(turn.messages) - turn.inputs > 1:
            return False
        lines = _SELECT_LINES.execute(self._connection, self._session_id, turn.chat_id)
        said = [(message.role, message.content) for message in turn.messages]
        filled = [each for each in said if each[1].strip()]
        if [(line.role, line.content) for line in lines] not in (said, filled):
            return False
        # The time decides whether the history could have shown a line that only the webhook has.
        is_alike = turn.revised_at <= read_at or {line.in_history for line in lines} in ({True}, {None})
        return is_alike and all(line.source == "webhook" for line in lines)

    def write(self, timing: Timing) -> list[Change]:
        """Write the turns and the new state of the session; return the changes."""
        if not self._turns:
            return []
        turns = {(self._session_id, chat_id): turn for chat_id, turn in self._turns.items()}
        before = rows.select_turn_states(self._connection, sorted(turns))
        rows.upsert_transcript_turns(self._connection, turns, [])
        status = self._status
        due_at = timing.due_after(status.last_event_at, status.read_by)
        began_at = max((turn.began_at for turn in self._new), default=None)
        began = began_at.isoformat() if began_at else None
        values = (coverage.OPEN, coverage.EVENTS_AFTER_READING, due_at.isoformat(), began)
        _UPDATE_SESSION.execute(self._connection, self._session_id, *values)
        return differences.amendment_changes(turns, before)
