"""Build one transcript from the known turns and history readings. A pure function of both.

Readings that a later one contains are dropped; `merge_history` merges the lines of the others; `merge_turns` lets the
turns claim their lines; turns newer than the latest reading are appended (`appendable`).
"""

from collections.abc import Iterable
from datetime import datetime

import msgspec

from archiver.archive.transcript import appendable, wording
from archiver.archive.transcript.appendable import may_claim, texts_of
from archiver.archive.transcript.contained import date_lines, maximal_readings
from archiver.archive.transcript.context import oldest_first, restore_unproven, without_repeats
from archiver.archive.transcript.history import merge_history
from archiver.archive.transcript.shapes import HistoryMessages, TranscriptLine, TurnMessages
from archiver.archive.transcript.turns import in_order, merge_turns, place, transcript_of, unmatched_turn

__all__ = [
    "HistoryMessages",
    "Transcript",
    "TranscriptLine",
    "TurnMessages",
    "compose",
    "may_claim",
    "merge_history",
    "merge_turns",
    "texts_of",
    "transcript",
    "unmatched_turn",
]


_TRIALS = 3  # attempts to omit repeats; each restores the turns whose repeats were not confirmed


class Transcript(msgspec.Struct, frozen=True):
    """The lines of a session, in order.

    `can_append`: a further turn that arrives after the latest reading, begins after all others, and cannot match
    lines that only history has (`may_claim`) is appended unchanged (`unmatched_turn`), and changes none of these
    lines.
    """

    lines: list[TranscriptLine]
    can_append: bool


def transcript(turns: Iterable[TurnMessages], readings: Iterable[HistoryMessages]) -> list[TranscriptLine]:
    """Return the transcript lines of a session in order."""
    return compose(turns, readings).lines


def compose(turns: Iterable[TurnMessages], readings: Iterable[HistoryMessages]) -> Transcript:
    """Return the transcript of a session, and whether a newer turn can be appended without aligning again.

    `turns` are of different chats, in any order. `readings` are processed in order of `read_at`, and in the given
    order if these times are equal.
    """
    known = list(turns)
    deleted_runs = {_message_keys(turn) for turn in known if turn.is_deleted and len(turn.messages) > turn.inputs} - {
        ()
    }
    # If runs overlap, the last one counts. The shorter one comes last, because the longer one may consist of it and
    # of lines of another turn.
    deleted = sorted(deleted_runs, key=lambda run: (-len(run), run))
    history_lines: list[TranscriptLine] = []
    read_at = None
    result = maximal_readings(sorted(readings, key=lambda reading: reading.read_at))
    # If turns vanished, equal turns that remain may have been mistaken for them.
    is_dated = len(result) <= 1 or not any(turn.is_deleted and turn.messages for turn in known)
    for each in result:
        history_lines = date_lines(merge_history(history_lines, each.reading, deleted), each.first_read_at)
        read_at = each.reading.read_at
        is_dated = is_dated and not each.is_doubtful
    history_lines = [msgspec.structs.replace(line, number=number) for number, line in enumerate(history_lines, 1)]
    return _with_turns(history_lines, known, read_at, is_dated=is_dated)


def _with_turns(
    history_lines: list[TranscriptLine], turns: list[TurnMessages], read_at: datetime | None, *, is_dated: bool
) -> Transcript:
    ordered = in_order(turns)
    count = appendable.count_aligned(ordered, read_at)
    lines = _merge(history_lines, ordered[:count], read_at, is_dated=is_dated)
    is_open, texts = appendable.has_open_end(lines), appendable.unclaimed_texts(lines)
    if count < len(ordered):
        if is_open or any(may_claim(turn, texts, read_at) for turn in ordered[count:]):
            lines = _merge(history_lines, ordered, read_at, is_dated=is_dated)
            return Transcript(lines, can_append=False)
        lines = [*lines, *(line for turn in ordered[count:] for line in unmatched_turn(turn, read_at))]
    return Transcript(lines, can_append=not is_open)


def _merge(
    history_lines: list[TranscriptLine], turns: list[TurnMessages], read_at: datetime | None, *, is_dated: bool
) -> list[TranscriptLine]:
    """Let turns claim their history lines, without content that they repeat from earlier turns."""
    turns, undecided = oldest_first(turns, history_lines)
    lines = _without_repeats(history_lines, turns, read_at, is_dated=is_dated)
    if not undecided:
        return lines
    return [msgspec.structs.replace(line, is_ambiguous=True) if line.chat_id in undecided else line for line in lines]


def _without_repeats(
    history_lines: list[TranscriptLine], turns: list[TurnMessages], read_at: datetime | None, *, is_dated: bool
) -> list[TranscriptLine]:
    trimmed = without_repeats(turns, history_lines)
    for _ in range(_TRIALS):
        placed = place(history_lines, trimmed, is_dated=is_dated)
        # A version that another one supersedes is also a proof. So no revision time decides about other turns.
        restored = trimmed
        if trimmed != turns:
            restored = restore_unproven(turns, trimmed, transcript_of(placed, read_at, with_superseded=True))
        if restored == trimmed:
            return transcript_of(placed, read_at)
        trimmed = restored
    return merge_turns(history_lines, turns, read_at, is_dated=is_dated)


def _message_keys(turn: TurnMessages) -> tuple[tuple[str, str], ...]:
    keys = (wording.text_key(message.role, message.content) for message in turn.messages)
    return tuple((role, content) for role, content in keys if content)
