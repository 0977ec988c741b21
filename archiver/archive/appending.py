"""Append turns that are newer than the latest reading, at a cost independent of the session's length.

The rows are those that `sessions.derive` would return for the whole session: `transcript.compose` decides when a turn
changes nothing before it, and the column `sessions.append_after` stores that decision. `amending` writes the known
turns whose lines stay the same. All other turns require `rederive`.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from archiver import events
from archiver.archive import coverage, differences, facts, rows, transcript
from archiver.archive.amending import Amendment
from archiver.archive.coverage import Timing
from archiver.archive.differences import TurnState
from archiver.archive.facts import UNASSIGNED, Key
from archiver.archive.outbox import Change
from archiver.archive.sessions import aligned, message_row
from archiver.archive.turns import Fact, Turn, fold
from archiver.database import RawStatement, as_json, execute

# Times of the session as the upsert of this batch left them.
_SELECT_STATUSES = RawStatement(
    """
    SELECT s.session_id, s.read_at, s.reconciled_at, s.last_event_at, s.read_by, s.places, s.append_after,
           s.coverage, s.reason
      FROM archiver.sessions s
     WHERE s.session_id = ANY (ARRAY(SELECT json_array_elements_text($1)))
    """
)
_SELECT_UNCLAIMED = RawStatement(
    """
    SELECT m.session_id, m.role, m.content FROM archiver.messages m
     WHERE m.session_id = ANY (ARRAY(SELECT json_array_elements_text($1))) AND m.source = 'history'
    """
)
_SELECT_LAST = RawStatement(
    """
    SELECT count(*) AS count, min(m.place) AS first, max(m.place) AS last,
           (SELECT coalesce(c.created_at, c.occurred_at, c.first_received_at) FROM archiver.chats c
             WHERE c.session_id = $1 AND c.chat_id = $2) AS began_at
      FROM archiver.messages m WHERE m.session_id = $1 AND m.chat_id = $2
    """
)
_UPDATE_SESSION = RawStatement(
    """
    UPDATE archiver.sessions
       SET coverage = $2, reason = $3, reconcile_at = $4, places = $5, append_after = $6
     WHERE session_id = $1
    """
)

Own = Mapping[str, Sequence[Fact]]  # facts of this batch about one session, by chat id


class Appended(msgspec.Struct):
    """The sessions in which every turn of the batch was appended or amended, and the resulting changes."""

    sessions: set[str] = msgspec.field(default_factory=set)
    changes: list[Change] = msgspec.field(default_factory=list)


def append(connection: Connection, by_turn: Mapping[Key, Sequence[Fact]], timing: Timing) -> Appended:
    """Append or amend the turns of these newly recorded facts in sessions that allow it for all of them.

    Returns those sessions and the changes. The caller has locked the sessions. The cost depends only on these turns
    and on the lines known only from history.
    """
    by_session: dict[str, dict[str, Sequence[Fact]]] = defaultdict(dict)
    for (session_id, chat_id), chat_facts in by_turn.items():
        by_session[session_id][chat_id] = chat_facts
    possible = sorted(each for each, own in by_session.items() if _are_new(own))
    appended = Appended()
    if not possible:
        return appended
    sessions_json = as_json(possible)
    new = {(each, chat_id): own for each in possible for chat_id, own in by_session[each].items()}
    statuses, unclaimed, others = execute(
        connection,
        _SELECT_STATUSES.bind(sessions_json),
        _SELECT_UNCLAIMED.bind(sessions_json),
        facts.other_facts(facts.own_keys(new), of_read=True),
    )
    texts: dict[str, set[str]] = defaultdict(set)
    for row in unclaimed:
        texts[row.session_id].update(transcript.texts_of(row.content))
    unassigned = {row.chat_id for row in others if row.session_id == UNASSIGNED}
    earlier = facts.by_turn(others, by_turn)
    for status in statuses:
        amendment = Amendment(connection, status, by_session[status.session_id], earlier)
        own = amendment.others
        tail = None
        if own:
            if not unassigned.isdisjoint(own) or not _are_creations(status.session_id, own):
                continue
            tail = _TranscriptTail(connection, status, own, earlier)
            if not tail.can_append(texts[status.session_id]):
                continue
        appended.changes += tail.write(timing) if tail else []
        appended.changes += amendment.write(timing)
        if (status.coverage, status.reason) != (coverage.OPEN, coverage.EVENTS_AFTER_READING):
            appended.changes.append(Change(differences.COVERAGE, status.session_id))
        appended.sessions.add(status.session_id)
    return appended


def _are_new(own: Own) -> bool:
    return not any(fact.is_repeat for each in own.values() for fact in each)


def _are_creations(session_id: str, own: Own) -> bool:
    """Return whether all these facts create a chat and name this session."""
    return all(
        fact.event.type == events.CREATED and fact.event.session_id == session_id
        for each in own.values()
        for fact in each
    )


class _TranscriptTail:
    """The end of a session's transcript, and the turns to write there: the last turn, if revised, and new turns."""

    def __init__(self, connection: Connection, status: Any, own: Own, earlier: Mapping[Key, Sequence[Fact]]) -> None:
        self._connection = connection
        self._status = status
        self._session_id: str = status.session_id
        known = {chat_id: earlier.get((self._session_id, chat_id)) for chat_id in own}
        self._revised = [chat_id for chat_id, item in known.items() if item is not None]
        self._is_readable = all(known[chat_id] for chat_id in self._revised)
        folded = {chat_id: fold([*own[chat_id], *(known[chat_id] or ())]) for chat_id in own}
        self._turns: list[tuple[str, Turn]] = sorted(
            folded.items(), key=lambda each: (each[1].began_at, each[1].revised_at, each[0])
        )
        self._places: int = status.places

    def can_append(self, texts: Collection[str]) -> bool:
        """Return whether the turns follow all others, arrived after the latest reading and match none of `texts`."""
        if self._status.append_after is None or len(self._revised) > 1 or not self._is_readable:
            return False
        read_at, reconciled_at = self._status.read_at, self._status.reconciled_at
        for chat_id, turn in self._turns:
            own = aligned(chat_id, turn, read_at)
            if not self._is_newer(turn) or transcript.may_claim(own, texts, reconciled_at):
                return False
        return self._follow_others()

    def _is_newer(self, turn: Turn) -> bool:
        is_later = turn.first_received_at > self._status.read_at
        return is_later and turn.deleted_at is None and turn.inputs <= 1

    def _follow_others(self) -> bool:
        last: datetime = self._status.append_after
        new = self._turns
        if self._revised:
            (chat_id, revised), *new = self._turns
            # Another time would change the estimated time of lines before it.
            if chat_id != self._revised[0] or revised.began_at != last or not self._is_last(chat_id):
                return False
        return all(turn.began_at > last for _, turn in new)

    def _is_last(self, chat_id: str) -> bool:
        """Return whether the transcript ends with this turn, so that its new lines replace the old ones."""
        ((count, first, last, began_at),) = _SELECT_LAST.execute(self._connection, self._session_id, chat_id)
        is_last = count > 0 and last == self._places and first == last - count + 1
        if not is_last or began_at != self._status.append_after:
            return False
        self._places -= count
        return True

    def write(self, timing: Timing) -> list[Change]:
        """Write the turns, their lines and the new state of the session; return the changes."""
        keyed = {(self._session_id, chat_id): turn for chat_id, turn in self._turns}
        revised = [(self._session_id, chat_id) for chat_id in self._revised]
        before: Mapping[Key, TurnState] = rows.select_turn_states(self._connection, revised) if revised else {}
        lines = [
            message_row(self._session_id, chat_id, ordinal, line)
            for chat_id, turn in self._turns
            for ordinal, line in enumerate(
                transcript.unmatched_turn(aligned(chat_id, turn, self._status.read_at), self._status.reconciled_at)
            )
        ]
        for place, row in enumerate(lines, self._places + 1):
            row["place"] = place
        rows.upsert_transcript_turns(self._connection, keyed, lines)
        rows.delete_surplus_messages(self._connection, {key: len(keyed[key].messages) for key in revised})
        self._update_session(self._places + len(lines), timing)
        return differences.turn_changes(keyed, before)

    def _update_session(self, places: int, timing: Timing) -> None:
        status = self._status
        due_at = timing.due_after(status.last_event_at, status.read_by)
        append_after = max(turn.began_at for _, turn in self._turns)
        values = (coverage.OPEN, coverage.EVENTS_AFTER_READING, due_at.isoformat(), places, append_after.isoformat())
        _UPDATE_SESSION.execute(self._connection, self._session_id, *values)
