"""Derive the rows of a session whose history is known, from turns and readings (I6, I7). Pure."""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from archiver.archive import coverage
from archiver.archive import transcript as alignment
from archiver.archive.coverage import Reading, Timing
from archiver.archive.transcript import Transcript, TranscriptLine
from archiver.archive.transcript.shapes import USER
from archiver.archive.transcript.wording import are_similar, is_short_cut, normal_role
from archiver.archive.turns import Turn
from archiver.events import INTERNAL_PREFIX, SHAPES, Message, responses
from archiver.events.normal import normal_text
from archiver.events.responses import SessionSnapshot

Row = dict[str, Any]

BEFORE_FIRST_TURN = INTERNAL_PREFIX  # the chat id of lines before the first turn


class SessionFacts(msgspec.Struct):
    """All facts of one session: turns by chat id, readings and registrations in order of time."""

    session_id: str
    turns: Mapping[str, Turn]
    readings: Sequence[Reading]
    registrations: Sequence[tuple[datetime, SessionSnapshot]]
    arrived_at: Sequence[datetime]  # arrivals of all facts except readings
    unassigned: Sequence[str]  # its chats that also have unassigned facts
    is_erased: bool = False  # all of it, or some of its turns


class Rows(msgspec.Struct):
    """The archive rows of a session."""

    session: Row
    chats: list[Row]
    messages: list[Row]


def derive(session_facts: SessionFacts, timing: Timing) -> Rows:
    """Return the rows of a session, independent of the order of its facts."""
    transcript = _transcript(session_facts)
    lines = transcript.lines
    keys = _chat_keys(lines)
    history_chats = _history_chats(session_facts, lines, keys)
    chats = [chat_row(session_facts.session_id, chat_id, turn) for chat_id, turn in session_facts.turns.items()]
    return Rows(
        session=_session_row(session_facts, transcript, len(history_chats), timing),
        chats=chats + history_chats,
        messages=_message_rows(session_facts, lines, keys),
    )


def _transcript(session_facts: SessionFacts) -> Transcript:
    read_at = session_facts.readings[-1].last_at if session_facts.readings else None
    return alignment.compose(
        [aligned(chat_id, turn, read_at) for chat_id, turn in session_facts.turns.items()],
        [
            alignment.HistoryMessages(reading.snapshot.messages, reading.last_at, reading.first_at, reading.shown)
            for reading in session_facts.readings
            if reading.snapshot.messages is not None
        ],
    )


def without_turns(session_facts: SessionFacts, chat_ids: Collection[str]) -> SessionSnapshot | None:
    """Return the content of all readings without these turns; None if no reading had messages.

    A line that no turn claimed is omitted too if it repeats a text of these turns, even cut or masked.
    """
    if not any(reading.snapshot.messages is not None for reading in session_facts.readings):
        return None
    known_texts = {
        normal_text(message.content)
        for chat_id in chat_ids
        if chat_id in session_facts.turns
        for message in session_facts.turns[chat_id].messages
    }
    remaining = [
        Message(line.role, _in_history(line), SHAPES[line.kind])
        for line in _transcript(session_facts).lines
        if line.first_read_at is not None
        and line.chat_id not in chat_ids
        and (line.chat_id is not None or not _repeats(line.content, known_texts - {""}))
    ]
    snapshots = [reading.snapshot for reading in session_facts.readings]
    return SessionSnapshot(
        tuple(remaining),
        name=_last(each.name for each in snapshots),
        status=_last(each.status for each in snapshots),
        assistant_id=_last(each.assistant_id for each in snapshots),
        created_at=min((each.created_at for each in snapshots if each.created_at), default=None),
    )


def _in_history(line: TranscriptLine) -> str:
    """Return the history's text of a line if its normal form is that of the content; else the content."""
    text = line.history_content
    return text if text is not None and normal_text(text) == normal_text(line.content) else line.content


_CUT = 32  # characters; a beginning of this length proves that the text is the same, even if it ends within a number


def _repeats(content: str, texts: Collection[str]) -> bool:
    text = normal_text(content)
    beginning = text.removesuffix("...").rstrip()
    is_long = len(beginning) >= _CUT
    return text in texts or any(
        are_similar(text, each) or is_short_cut(text, each) or (is_long and each.startswith(beginning))
        for each in texts
    )


def aligned(chat_id: str, turn: Turn, read_at: datetime | None) -> alignment.TurnMessages:
    """Return a turn as input of the alignment.

    A deletion after the latest reading, at `read_at`, counts from the next reading on: until then it changes no line.
    """
    is_deleted = turn.vanished_at is not None and (read_at is None or turn.vanished_at <= read_at)
    times = turn.began_at, turn.revised_at
    return alignment.TurnMessages(
        chat_id, turn.messages, turn.inputs, *times, is_deleted, turn.first_received_at, turn.sent
    )


def _chat_keys(lines: Sequence[TranscriptLine]) -> list[str]:
    """Return the chat id of each line; an internal id for turns known only from history."""
    keys: list[str] = []
    item, before = 0, None
    for line in lines:
        if line.chat_id is not None:
            keys.append(line.chat_id)
        elif _begins_turn(line, before):
            item += 1
            keys.append(f"{INTERNAL_PREFIX}{item}")
        else:
            keys.append(keys[-1] if keys else BEFORE_FIRST_TURN)
        before = line
    return keys


def _begins_turn(line: TranscriptLine, before: TranscriptLine | None) -> bool:
    if before is None:
        return normal_role(line.role) == USER
    return before.chat_id is not None or (normal_role(line.role) == USER and normal_role(before.role) != USER)


def _history_chats(session_facts: SessionFacts, lines: Sequence[TranscriptLine], keys: Sequence[str]) -> list[Row]:
    first: dict[str, TranscriptLine] = {}
    for line, key in zip(lines, keys, strict=True):
        if key.startswith(INTERNAL_PREFIX) and key != BEFORE_FIRST_TURN:
            first.setdefault(key, line)
    nothing = dict.fromkeys(CHAT_COLUMNS)
    return [
        nothing
        | {
            "session_id": session_facts.session_id,
            "chat_id": key,
            "first_received_at": line.first_read_at,
            "source": responses.SOURCE,
        }
        for key, line in first.items()
    ]


def _message_rows(session_facts: SessionFacts, lines: Sequence[TranscriptLine], keys: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    ordinals: dict[str, int] = {}
    for place, (line, key) in enumerate(zip(lines, keys, strict=True), 1):
        ordinal = ordinals.get(key, 0)
        ordinals[key] = ordinal + 1
        row = message_row(session_facts.session_id, key, ordinal, line)
        rows.append(row | {"place": place} if session_facts.readings else row)
    return rows


def message_row(session_id: str, chat_id: str, ordinal: int, line: TranscriptLine) -> Row:
    """Return a line as a row of `messages`, without its position."""
    return {
        "session_id": session_id,
        "chat_id": chat_id,
        "ordinal": ordinal,
        "role": line.role,
        "content": line.content,
        "content_kind": line.kind,
        "history_content": line.history_content,
        "source": line.source,
        "place": None,
        "in_history": line.in_history,
    }


CHAT_COLUMNS = (
    "assistant_id",
    "external_id",
    "status",
    "cost",
    "variables",
    "created_at",
    "updated_at",
    "session_name",
    "session_status",
    "occurred_at",
    "first_received_at",
    "deleted_at",
    "source",
)


def chat_row(session_id: str, chat_id: str, turn: Turn) -> Row:
    """Return a turn as a row of `chats`; `variables` are JSON text."""
    row: Row = {name: getattr(turn, name) for name in CHAT_COLUMNS}
    row["session_id"], row["chat_id"] = session_id, chat_id
    row["variables"] = msgspec.json.encode(turn.variables).decode() if turn.variables else None
    return row


def _session_row(session_facts: SessionFacts, transcript: Transcript, history_chats: int, timing: Timing) -> Row:
    readings, lines = session_facts.readings, transcript.lines
    first_event_at = min([*session_facts.arrived_at, *(reading.first_at for reading in readings)])
    # Without events, the first reading counts as the last event.
    last_event_at = max(session_facts.arrived_at, default=first_event_at)
    snapshots = _snapshots_in_order(session_facts)
    created_at = min((each.created_at for each in snapshots if each.created_at), default=None)
    # A creation time is wrong if the session would have expired upstream before its first event.
    is_plausible = created_at is not None and created_at > first_event_at - timing.lifetime
    opened_at = min(first_event_at, created_at) if is_plausible and created_at else first_event_at
    covered = coverage.coverage_of(
        session_facts.turns, history_chats, readings, lines, last_event_at, is_erased=session_facts.is_erased
    )
    return {
        "session_id": session_facts.session_id,
        "first_event_at": first_event_at,
        "last_event_at": last_event_at,
        "coverage": covered.state,
        "reason": covered.reason,
        "reconciled_at": covered.reconciled_at,
        "read_at": covered.read_at,
        "repaired_messages": covered.repaired_messages,
        "name": _last(each.name for each in snapshots),
        "status": _last(each.status for each in snapshots),
        "assistant_id": _last(each.assistant_id for each in snapshots),
        "created_at": created_at,
        "places": len(lines) if readings else None,
        "append_after": _append_after(session_facts, transcript),
        "read_by": timing.read_by(opened_at),
        # Erased content could not be recognised in a history, so the history is not fetched again.
        "reconcile_at": None
        if session_facts.is_erased
        else coverage.next_reading(timing, opened_at, last_event_at, readings),
    }


_NEVER = datetime.min.replace(tzinfo=UTC)


def _append_after(session_facts: SessionFacts, transcript: Transcript) -> datetime | None:
    """Return the time after which a later turn must begin to be appended unchanged; None if no turn may be."""
    if session_facts.is_erased or not session_facts.readings or not transcript.can_append:
        return None
    return max((turn.began_at for turn in session_facts.turns.values()), default=_NEVER)


def _snapshots_in_order(session_facts: SessionFacts) -> list[SessionSnapshot]:
    dated = [
        *session_facts.registrations,
        *((reading.last_at, reading.snapshot) for reading in session_facts.readings),
    ]
    return [snapshot for _, snapshot in sorted(dated, key=lambda pair: pair[0])]


def _last(values: Any) -> Any:
    return next((value for value in reversed(list(values)) if value is not None), None)
