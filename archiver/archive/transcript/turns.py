"""Build the lines of the transcript from placed turns; turns that the history does not show are inserted by time.

`matching` decides which lines of the history belong to which turn.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime

import msgspec

from archiver.archive.transcript.candidates import ASIDES, Match
from archiver.archive.transcript.matching import place_turns
from archiver.archive.transcript.placement import Placement
from archiver.archive.transcript.recut import place_recut
from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.wording import normal_role
from archiver.events import Message

# Roles whose lines are not versions of an output.
_OTHERS = ASIDES | {USER}


class _Superseded(msgspec.Struct, frozen=True):
    """Lines and messages that a newer revision of the same turn replaces."""

    lines: Collection[int] = ()
    messages: Collection[int] = ()


class PlacedTurns(msgspec.Struct):
    """Turns in order of `began_at`, with the history lines that each claims. Revision times decide only ties."""

    lines: Sequence[TranscriptLine]
    turns: Sequence[TurnMessages]
    placement: Placement


def place(lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], *, is_dated: bool = True) -> PlacedTurns:
    """Let turns of different chats claim lines of the merged history.

    `is_dated`: it is certain when each line was read for the first time.
    """
    ordered = in_order(turns)
    lines, placement = place_recut(lines, ordered, lambda cut: place_turns(cut, ordered, is_dated=is_dated))
    return PlacedTurns(lines, ordered, placement)


def merge_turns(
    lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], read_at: datetime | None, *, is_dated: bool = True
) -> list[TranscriptLine]:
    """Return the transcript from unclaimed history lines and turns of different chats."""
    return transcript_of(place(lines, turns, is_dated=is_dated), read_at)


def transcript_of(
    placed: PlacedTurns, read_at: datetime | None, *, with_superseded: bool = False
) -> list[TranscriptLine]:
    """Return the transcript from the placed turns.

    `read_at` is the time of the latest reading, None if there is none. The lines of a turn are contiguous. A turn
    that the history does not show is inserted whole, with its blank messages, before the next turn that the history
    shows. If webhook and history differ on a turn, the newer version wins (I3); `with_superseded` retains both.
    """
    lines, ordered, placement = placed.lines, placed.turns, placed.placement
    missing = deque(index for index in range(len(ordered)) if index not in placement.matches)
    placings = sorted(placement.matches.items(), key=lambda placing: placing[1].start)
    starts = [match.start for _, match in placings] + [len(lines)]
    merged = [*lines[: starts[0]]]
    for (index, match), limit in zip(placings, starts[1:], strict=True):
        while index in placement.in_order and missing and missing[0] < index:
            merged += unmatched_turn(ordered[missing.popleft()], read_at)
        run = msgspec.structs.replace(match, end=_end(lines, match, limit, is_deleted=ordered[index].is_deleted))
        superseded = _Superseded() if with_superseded else _superseded(ordered[index], run, lines)
        own = _run(ordered[index], run, lines, read_at, superseded)
        is_ambiguous = index in placement.ambiguous
        merged += [msgspec.structs.replace(line, is_ambiguous=True) for line in own] if is_ambiguous else own
        merged += lines[run.end : limit]
    for index in missing:
        merged += unmatched_turn(ordered[index], read_at)
    return merged


def in_order(turns: Iterable[TurnMessages]) -> list[TurnMessages]:
    """Return the turns that have messages, in order of `began_at`."""
    return sorted(
        (turn for turn in turns if turn.messages), key=lambda turn: (turn.began_at, turn.revised_at, turn.chat_id)
    )


def unmatched_turn(turn: TurnMessages, read_at: datetime | None) -> list[TranscriptLine]:
    """Return the lines of a turn that no reading shows."""
    in_history = None if read_at is None or turn.began_at > read_at else False
    return [_own(turn, index, in_history) for index in range(len(turn.messages))]


def _own(turn: TurnMessages, index: int, in_history: bool | None) -> TranscriptLine:
    message = turn.messages[index]
    return TranscriptLine(message.role, message.content, "webhook", turn.chat_id, in_history, kind=message.kind)


def _end(lines: Sequence[TranscriptLine], match: Match, limit: int, *, is_deleted: bool) -> int:
    """Return where the turn's lines end: it owns the following lines up to the next user message or turn.

    A line that is still shown is not part of a deleted turn that vanished.
    """
    is_shown = lines[match.end - 1].in_history
    end = match.end
    while end < limit and normal_role(lines[end].role) != USER:
        if is_deleted and lines[end].in_history and not is_shown:
            break
        end += 1
    return end


def _run(
    turn: TurnMessages,
    match: Match,
    lines: Sequence[TranscriptLine],
    read_at: datetime | None,
    superseded: _Superseded,
) -> Iterator[TranscriptLine]:
    """Yield the lines of a matched turn: those of history from `match.start` to `match.end`, and its own."""
    values = {message for message, _ in match.pairs}
    in_history = None if read_at is None or turn.revised_at > read_at else False
    unfound = deque(
        index
        for index, message in enumerate(turn.messages)
        if message.content.strip() and index not in values and index not in superseded.messages
    )

    def own(end: int) -> Iterator[TranscriptLine]:
        while unfound and unfound[0] < end:
            yield _own(turn, unfound.popleft(), in_history)

    messages = {line: message for message, line in match.pairs}
    yield from own(match.pairs[0][0])
    for index in range(match.start, match.end):
        message = messages.get(index)
        if message is None:
            if index not in superseded.lines:
                yield msgspec.structs.replace(lines[index], chat_id=turn.chat_id)
            continue
        yield from own(message)
        if message not in superseded.messages:
            yield _claimed(lines[index], turn, turn.messages[message])
    yield from own(len(turn.messages))


def _claimed(line: TranscriptLine, turn: TurnMessages, message: Message) -> TranscriptLine:
    """Merge a line that both sources have: content of the webhook, and the history's wording if it differs."""
    if (message.role, message.content) == (line.role, line.content):
        return msgspec.structs.replace(line, source="webhook", chat_id=turn.chat_id, kind=message.kind)
    return msgspec.structs.replace(
        line,
        role=message.role,
        content=message.content,
        source="webhook",
        chat_id=turn.chat_id,
        kind=message.kind,
        is_reworded=True,
        history_content=line.content if line.content != message.content else None,
    )


def _superseded(turn: TurnMessages, match: Match, lines: Sequence[TranscriptLine]) -> _Superseded:
    """Compare the turn with its version in the last reading that showed its input.

    They differ if each has an output that the other lacks: then the newer version wins. Outputs of earlier readings
    are outdated if the turn reported its own outputs after them, or if that version has another in their place; not
    if that version may merely have been cut off before them.
    """
    input_lines = [line for message, line in match.pairs if message < turn.inputs]
    read_at = lines[input_lines[-1]].last_read_at if input_lines else None
    if read_at is None:
        return _Superseded()
    result = dict(match.pairs)
    times = {
        index: lines[index].last_read_at or read_at
        for index in range(input_lines[-1] + 1, match.end)
        if _is_answer(lines[index])
    }
    answers = [index for index in range(turn.inputs, len(turn.messages)) if _is_answer(turn.messages[index])]
    unseen = {index for index in answers if index not in result or times.get(result[index], read_at) < read_at}
    foreign = times.keys() - result.values()
    current = {index for index in foreign if times[index] == read_at}
    latest = max((index for index in times if times[index] == read_at), default=0)
    outdated = {
        index
        for index in foreign
        if times[index] < read_at and (index < latest or (answers and times[index] < turn.revised_at))
    }
    if not (unseen and current):
        return _Superseded(outdated)
    return _Superseded(outdated | current) if turn.revised_at > read_at else _Superseded(outdated, unseen)


def _is_answer(message: TranscriptLine | Message) -> bool:
    return normal_role(message.role) not in _OTHERS and bool(message.content.strip())
