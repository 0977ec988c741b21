"""A session of which history is known, as a whole: turns and readings to the rows of the archive (I6, I7). Pure."""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from archiver import alignment, history
from archiver.alignment import Line, Transcript
from archiver.alignment.shapes import USER
from archiver.alignment.wording import are_alike, is_short_cut, normal_role
from archiver.events import OURS, SHAPES, Message
from archiver.events.normal import normal_text
from archiver.history import Told
from archiver.projection import coverage
from archiver.projection.coverage import Reading, Timing
from archiver.projection.turns import Turn

Row = dict[str, Any]

HEAD = OURS  # stands for a chat where something was said before any turn


class Story(msgspec.Struct):
    """What the ledger tells of one session: turns by chat id, readings and registrations in order of time."""

    session_id: str
    turns: Mapping[str, Turn]
    readings: Sequence[Reading]
    registrations: Sequence[tuple[datetime, Told]]
    heard_at: Sequence[datetime]  # arrivals of all that is not a reading
    strays: Sequence[str]  # its chats of which some facts did not tell the session
    is_erased: bool = False  # all of it, or some of its turns


class Rows(msgspec.Struct):
    """A session in the archive."""

    session: Row
    chats: list[Row]
    messages: list[Row]


def derive(story: Story, timing: Timing) -> Rows:
    """The rows of a session, whatever the order in which its facts came."""
    transcript = _transcript(story)
    lines = transcript.lines
    keys = _chat_keys(lines)
    found_chats = _found_chats(story, lines, keys)
    chats = [chat_row(story.session_id, chat_id, turn) for chat_id, turn in story.turns.items()]
    return Rows(
        session=_session_row(story, transcript, len(found_chats), timing),
        chats=chats + found_chats,
        messages=_message_rows(story, lines, keys),
    )


def _transcript(story: Story) -> Transcript:
    return alignment.compose(
        [aligned(chat_id, turn) for chat_id, turn in story.turns.items()],
        [
            alignment.Reading(reading.told.messages, reading.last_at, reading.first_at, reading.shown)
            for reading in story.readings
            if reading.told.messages is not None
        ],
    )


def without(story: Story, chat_ids: Collection[str]) -> Told | None:
    """What all readings told of a session, in order, but for these turns; None where no reading told its messages.

    A line that no turn claimed goes too where it says what such a turn said, in whatever form it was written, cut or
    masked.
    """
    if not any(reading.told.messages is not None for reading in story.readings):
        return None
    said = {
        normal_text(message.content)
        for chat_id in chat_ids
        if chat_id in story.turns
        for message in story.turns[chat_id].messages
    }
    kept = [
        Message(line.role, _in_history(line), SHAPES[line.kind])
        for line in _transcript(story).lines
        if line.first_read_at is not None
        and line.chat_id not in chat_ids
        and (line.chat_id is not None or not _repeats(line.content, said - {""}))
    ]
    told = [reading.told for reading in story.readings]
    return Told(
        tuple(kept),
        name=_last(each.name for each in told),
        status=_last(each.status for each in told),
        assistant_id=_last(each.assistant_id for each in told),
        created_at=min((each.created_at for each in told if each.created_at), default=None),
    )


def _in_history(line: Line) -> str:
    """The text of a line as history has it, where the line is found again by it, whatever stands beside it."""
    text = line.history_content
    return text if text is not None and normal_text(text) == normal_text(line.content) else line.content


_CUT = 32  # characters: so much of a beginning is of the same text, even where it ends within a number


def _repeats(content: str, said: Collection[str]) -> bool:
    text = normal_text(content)
    beginning = text.removesuffix("...").rstrip()
    is_long = len(beginning) >= _CUT
    return text in said or any(
        are_alike(text, each) or is_short_cut(text, each) or (is_long and each.startswith(beginning)) for each in said
    )


def aligned(chat_id: str, turn: Turn) -> alignment.Turn:
    """A turn as the alignment takes it."""
    is_deleted = turn.deleted_at is not None
    return alignment.Turn(
        chat_id, turn.messages, turn.inputs, turn.began_at, turn.told_at, is_deleted, turn.first_received_at
    )


def _chat_keys(lines: Sequence[Line]) -> list[str]:
    """The chat id of each line; where only history knows the turn one of our own making: a user's words begin it."""
    keys: list[str] = []
    found, before = 0, None
    for line in lines:
        if line.chat_id is not None:
            keys.append(line.chat_id)
        elif _begins_turn(line, before):
            found += 1
            keys.append(f"{OURS}{found}")
        else:
            keys.append(keys[-1] if keys else HEAD)
        before = line
    return keys


def _begins_turn(line: Line, before: Line | None) -> bool:
    if before is None:
        return normal_role(line.role) == USER
    return before.chat_id is not None or (normal_role(line.role) == USER and normal_role(before.role) != USER)


def _found_chats(story: Story, lines: Sequence[Line], keys: Sequence[str]) -> list[Row]:
    first: dict[str, Line] = {}
    for line, key in zip(lines, keys, strict=True):
        if key.startswith(OURS) and key != HEAD:
            first.setdefault(key, line)
    nothing = dict.fromkeys(CHAT_COLUMNS)
    return [
        nothing
        | {
            "session_id": story.session_id,
            "chat_id": key,
            "first_received_at": line.first_read_at,
            "source": history.SOURCE,
        }
        for key, line in first.items()
    ]


def _message_rows(story: Story, lines: Sequence[Line], keys: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    ordinals: dict[str, int] = {}
    for place, (line, key) in enumerate(zip(lines, keys, strict=True), 1):
        ordinal = ordinals.get(key, 0)
        ordinals[key] = ordinal + 1
        row = message_row(story.session_id, key, ordinal, line)
        rows.append(row | {"place": place} if story.readings else row)
    return rows


def message_row(session_id: str, chat_id: str, ordinal: int, line: Line) -> Row:
    """A line as a row of `messages`, without its place."""
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
    """A turn as a row of `chats`; `variables` are JSON text."""
    row: Row = {name: getattr(turn, name) for name in CHAT_COLUMNS}
    row["session_id"], row["chat_id"] = session_id, chat_id
    row["variables"] = msgspec.json.encode(turn.variables).decode() if turn.variables else None
    return row


def _session_row(story: Story, transcript: Transcript, found: int, timing: Timing) -> Row:
    readings, lines = story.readings, transcript.lines
    first_event_at = min([*story.heard_at, *(reading.first_at for reading in readings)])
    # A session that nobody mentioned before it was read was last heard of then.
    last_event_at = max(story.heard_at, default=first_event_at)
    told = _told_in_order(story)
    created_at = min((each.created_at for each in told if each.created_at), default=None)
    # Whoever tells of a session that upstream had forgotten before we heard of it is mistaken.
    is_plausible = created_at is not None and created_at > first_event_at - timing.lifetime
    opened_at = min(first_event_at, created_at) if is_plausible and created_at else first_event_at
    covered = coverage.cover(story.turns, found, readings, lines, last_event_at, is_erased=story.is_erased)
    return {
        "session_id": story.session_id,
        "first_event_at": first_event_at,
        "last_event_at": last_event_at,
        "coverage": covered.state,
        "reason": covered.reason,
        "reconciled_at": covered.reconciled_at,
        "read_at": covered.read_at,
        "repaired_messages": covered.repaired_messages,
        "name": _last(each.name for each in told),
        "status": _last(each.status for each in told),
        "assistant_id": _last(each.assistant_id for each in told),
        "created_at": created_at,
        "places": len(lines) if readings else None,
        "append_after": _append_after(story, transcript),
        "read_by": timing.read_by(opened_at),
        # What history shows cannot be told apart from what was erased, so it is not asked again.
        "reconcile_at": None
        if story.is_erased
        else coverage.next_reading(timing, opened_at, last_event_at, readings),
    }


_NEVER = datetime.min.replace(tzinfo=UTC)


def _append_after(story: Story, transcript: Transcript) -> datetime | None:
    """A turn that arrives after the latest reading is appended as it is if it begins after this; None: none is."""
    if story.is_erased or not story.readings or not transcript.can_append:
        return None
    return max((turn.began_at for turn in story.turns.values()), default=_NEVER)


def _told_in_order(story: Story) -> list[Told]:
    dated = [*story.registrations, *((reading.last_at, reading.told) for reading in story.readings)]
    return [told for _, told in sorted(dated, key=lambda pair: pair[0])]


def _last(values: Any) -> Any:
    return next((value for value in reversed(list(values)) if value is not None), None)
