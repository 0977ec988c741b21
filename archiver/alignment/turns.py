"""Turns claim their lines of the spine, or stand between the others' lines where their times put them."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime

import msgspec

from archiver.alignment.candidates import ASIDES, Match
from archiver.alignment.matching import place
from archiver.alignment.shapes import USER, Line, Turn
from archiver.alignment.wording import normal_role
from archiver.events import Message

# Roles whose lines are no version of an output.
_OTHERS = ASIDES | {USER}


class _Superseded(msgspec.Struct, frozen=True):
    """What a newer telling of the same turn replaces."""

    lines: Collection[int] = ()
    messages: Collection[int] = ()


def merge_turns(
    lines: Sequence[Line], turns: Sequence[Turn], read_at: datetime | None, *, is_dated: bool = True
) -> list[Line]:
    """The transcript from the spine of history lines, of which none is claimed, and turns of different chats.

    `read_at` is the time of the latest reading, None if there is none. `is_dated`: it is certain when each line was
    read for the first time. The lines of a turn stand together. A turn
    that the spine does not show is inserted whole, blank messages too, before the next turn that it shows. Of a turn
    that both tell differently the newer telling stands (I3).
    """
    ordered = in_order(turns)
    placement = place(lines, ordered, is_dated=is_dated)
    missing = deque(index for index in range(len(ordered)) if index not in placement.matches)
    placings = sorted(placement.matches.items(), key=lambda placing: placing[1].start)
    starts = [match.start for _, match in placings] + [len(lines)]
    merged = [*lines[: starts[0]]]
    for (index, match), limit in zip(placings, starts[1:], strict=True):
        while index in placement.in_order and missing and missing[0] < index:
            merged += whole_turn(ordered[missing.popleft()], read_at)
        run = msgspec.structs.replace(match, end=_end(lines, match, limit, is_deleted=ordered[index].is_deleted))
        own = _run(ordered[index], run, lines, read_at)
        is_ambiguous = index in placement.ambiguous
        merged += [msgspec.structs.replace(line, is_ambiguous=True) for line in own] if is_ambiguous else own
        merged += lines[run.end : limit]
    for index in missing:
        merged += whole_turn(ordered[index], read_at)
    return merged


def in_order(turns: Iterable[Turn]) -> list[Turn]:
    """The turns that have messages, in order of their beginning."""
    return sorted(
        (turn for turn in turns if turn.messages), key=lambda turn: (turn.began_at, turn.told_at, turn.chat_id)
    )


def whole_turn(turn: Turn, read_at: datetime | None) -> list[Line]:
    """The lines of a turn of which no reading shows anything."""
    in_history = None if read_at is None or turn.began_at > read_at else False
    return [_own(turn, index, in_history) for index in range(len(turn.messages))]


def _own(turn: Turn, index: int, in_history: bool | None) -> Line:
    message = turn.messages[index]
    return Line(message.role, message.content, "webhook", turn.chat_id, in_history, kind=message.kind)


def _end(lines: Sequence[Line], match: Match, limit: int, *, is_deleted: bool) -> int:
    """Where the turn's lines end: what no user said after it belongs to it, up to the next turn.

    What is shown still is not part of a deleted turn that vanished.
    """
    is_shown = lines[match.end - 1].in_history
    end = match.end
    while end < limit and normal_role(lines[end].role) != USER:
        if is_deleted and lines[end].in_history and not is_shown:
            break
        end += 1
    return end


def _run(turn: Turn, match: Match, lines: Sequence[Line], read_at: datetime | None) -> Iterator[Line]:
    """The lines of a turn that was found: history's, from `match.start` to `match.end`, and its own among them."""
    superseded = _superseded(turn, match, lines)
    found = {message for message, _ in match.pairs}
    in_history = None if read_at is None or turn.told_at > read_at else False
    unfound = deque(
        index
        for index, message in enumerate(turn.messages)
        if message.content.strip() and index not in found and index not in superseded.messages
    )

    def own(end: int) -> Iterator[Line]:
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


def _claimed(line: Line, turn: Turn, message: Message) -> Line:
    """A line that both tell, in the words of the webhook, and with those of history where they differ."""
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


def _superseded(turn: Turn, match: Match, lines: Sequence[Line]) -> _Superseded:
    """Compare what the turn tells with the version of it in the last reading that showed its input.

    They differ when each has an output that the other lacks: then the newer stands. Outputs of earlier readings are
    outdated if the turn told its own after them, or if that version has another in their place; not if it may just
    have been cut before them.
    """
    said = [line for message, line in match.pairs if message < turn.inputs]
    read_at = lines[said[-1]].last_read_at if said else None
    if read_at is None:
        return _Superseded()
    found = dict(match.pairs)
    times = {
        index: lines[index].last_read_at or read_at
        for index in range(said[-1] + 1, match.end)
        if _is_answer(lines[index])
    }
    answers = [index for index in range(turn.inputs, len(turn.messages)) if _is_answer(turn.messages[index])]
    unseen = {index for index in answers if index not in found or times.get(found[index], read_at) < read_at}
    foreign = times.keys() - found.values()
    current = {index for index in foreign if times[index] == read_at}
    latest = max((index for index in times if times[index] == read_at), default=0)
    outdated = {
        index
        for index in foreign
        if times[index] < read_at and (index < latest or (answers and times[index] < turn.told_at))
    }
    if not (unseen and current):
        return _Superseded(outdated)
    return _Superseded(outdated | current) if turn.told_at > read_at else _Superseded(outdated, unseen)


def _is_answer(said: Line | Message) -> bool:
    return normal_role(said.role) not in _OTHERS and bool(said.content.strip())
