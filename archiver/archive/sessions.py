"""Derive the rows of a session whose history is known, from turns and readings (I6, I7). Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
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
    opened_at = _opened_at(session_facts, timing)
    history_chats = _history_chats(session_facts, lines, keys, opened_at)
    history_turns = sum(row["chat_id"] != BEFORE_FIRST_TURN for row in history_chats)
    chats = [
        chat_row(session_facts.session_id, chat_id, turn) | {"began_at": None}
        for chat_id, turn in session_facts.turns.items()
    ]
    return Rows(
        session=_session_row(session_facts, transcript, history_turns, opened_at, timing),
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
    """Return the chat id of each line; an internal id for turns known only from history.

    The internal id has the number of the turn's first line in the merged history, so that it does not change when
    the history gets longer or when other turns claim their lines.
    """
    keys: list[str] = []
    used: set[str] = set()
    before = None
    for line in lines:
        if line.chat_id is not None:
            keys.append(line.chat_id)
        elif _begins_turn(line, before):
            keys.append(_unused(f"{INTERNAL_PREFIX}{line.number}", used))
        else:
            keys.append(keys[-1] if keys else BEFORE_FIRST_TURN)
        before = line
    return keys


def _unused(key: str, used: set[str]) -> str:
    """Return the key, with a suffix if it is in `used`: parts of one line may be in two turns."""
    result, count = key, 1
    while result in used:
        count += 1
        result = f"{key}.{count}"
    used.add(result)
    return result


def _begins_turn(line: TranscriptLine, before: TranscriptLine | None) -> bool:
    if before is None:
        return normal_role(line.role) == USER
    return before.chat_id is not None or (normal_role(line.role) == USER and normal_role(before.role) != USER)


class _HistoryTurn(msgspec.Struct, frozen=True):
    """A turn known only from history, or the lines before the first turn: its key, and when it was first read."""

    key: str
    first_read_at: datetime | None


def _history_chats(
    session_facts: SessionFacts, lines: Sequence[TranscriptLine], keys: Sequence[str], opened_at: datetime
) -> list[Row]:
    nothing = dict.fromkeys(CHAT_COLUMNS)
    return [
        nothing
        | {
            "session_id": session_facts.session_id,
            "chat_id": turn.key,
            "first_received_at": turn.first_read_at,
            "source": responses.SOURCE,
            "began_at": began_at,
        }
        for turn, began_at in _dated(session_facts.turns, lines, keys, opened_at)
    ]


def _dated(
    turns: Mapping[str, Turn], lines: Sequence[TranscriptLine], keys: Sequence[str], opened_at: datetime
) -> Iterator[tuple[_HistoryTurn, datetime]]:
    """Yield the turns known only from history in order, each with an estimate of when it began.

    They are evenly spaced between the turns before and after them. Without a turn before or after, they have the
    time of the other one; without both, the session's.
    """
    waiting: list[_HistoryTurn] = []
    before: datetime | None = None
    first = dict(zip(reversed(keys), reversed(lines), strict=True))
    for key in dict.fromkeys(keys):
        if key.startswith(INTERNAL_PREFIX):
            waiting.append(_HistoryTurn(key, first[key].first_read_at))
        else:
            yield from _between(waiting, before, turns[key].began_at, opened_at)
            waiting, before = [], turns[key].began_at
    yield from _between(waiting, before, None, opened_at)


def _between(
    waiting: Sequence[_HistoryTurn], before: datetime | None, after: datetime | None, opened_at: datetime
) -> Iterator[tuple[_HistoryTurn, datetime]]:
    start = before or after or opened_at
    step = (max(after or start, start) - start) / (len(waiting) + 1)
    yield from ((turn, start + number * step) for number, turn in enumerate(waiting, 1))


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
    "answered_at",
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


def _first_event_at(session_facts: SessionFacts) -> datetime:
    return min([*session_facts.arrived_at, *(reading.first_at for reading in session_facts.readings)])


def _created_at(session_facts: SessionFacts) -> datetime | None:
    snapshots = _snapshots_in_order(session_facts)
    return min((each.created_at for each in snapshots if each.created_at), default=None)


def _opened_at(session_facts: SessionFacts, timing: Timing) -> datetime:
    """Return when the session began: its creation time upstream if credible, else its first event."""
    first_event_at, created_at = _first_event_at(session_facts), _created_at(session_facts)
    # A creation time is wrong if the session would have expired upstream before its first event.
    is_plausible = created_at is not None and created_at > first_event_at - timing.lifetime
    return min(first_event_at, created_at) if is_plausible and created_at else first_event_at


def _session_row(
    session_facts: SessionFacts, transcript: Transcript, history_turns: int, opened_at: datetime, timing: Timing
) -> Row:
    readings, lines = session_facts.readings, transcript.lines
    first_event_at = _first_event_at(session_facts)
    # Without events, the first reading counts as the last event.
    last_event_at = max(session_facts.arrived_at, default=first_event_at)
    snapshots = _snapshots_in_order(session_facts)
    covered = coverage.coverage_of(
        session_facts.turns, history_turns, readings, lines, last_event_at, is_erased=session_facts.is_erased
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
        "created_at": _created_at(session_facts),
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
    if transcript.lines and transcript.lines[-1].chat_id is None:
        return None  # the next turn changes the estimated time of the lines before it
    return max((turn.began_at for turn in session_facts.turns.values()), default=_NEVER)


def _snapshots_in_order(session_facts: SessionFacts) -> list[SessionSnapshot]:
    dated = [
        *session_facts.registrations,
        *((reading.last_at, reading.snapshot) for reading in session_facts.readings),
    ]
    return [snapshot for _, snapshot in sorted(dated, key=lambda pair: pair[0])]


def _last(values: Any) -> Any:
    return next((value for value in reversed(list(values)) if value is not None), None)
