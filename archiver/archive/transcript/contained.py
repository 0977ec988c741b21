"""Drop readings that a later reading contains. Most are contained, because a history grows.

Such a part only proves when its lines were first shown. Aligning it could only cause errors: the question of an
answer is unknown if it was cut off.
"""

from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate, islice

import msgspec

from archiver.archive.transcript.shapes import HistoryMessages, TranscriptLine
from archiver.events import Message

_MAX_PLACES = 100  # places that are searched for a part

_Part = tuple[datetime, int, int]  # when a part was read, its first line, the line after its last
FirstRead = Sequence[datetime | None]  # when each line of a reading was shown for the first time by one of its parts


class MaximalReading(msgspec.Struct):
    """A reading that the next kept reading does not contain, with the first reading time of each line.

    `is_doubtful`: a part of it that is not empty fits several places, so that some of these times may be wrong.
    """

    reading: HistoryMessages
    first_read_at: FirstRead = ()
    is_doubtful: bool = False


def maximal_readings(readings: Sequence[HistoryMessages]) -> list[MaximalReading]:
    """Return the readings, given in order of time, that the next kept reading does not contain as a run."""
    result: list[MaximalReading] = []
    parts: list[list[_Part]] = []
    following: Sequence[Message] = ()
    repeats = _Repeats(())
    place = 0  # of the previous reading in this loop
    for each in reversed(readings):
        first_read_at = each.first_read_at or each.read_at
        if each.shown is not None and place == 0:
            parts[-1].append((first_read_at, 0, each.shown))
            result[-1].is_doubtful |= repeats.hold(each.shown)
            continue
        reading = each if each.shown is None else _with_messages(each, following)
        following = reading.messages
        places = _places(following, result[-1].reading.messages) if result else []
        place = places[0] if places else 0
        if places:
            parts[-1].append((first_read_at, place, place + len(following)))
            result[-1].is_doubtful |= len(places) > 1
        else:
            result.append(MaximalReading(reading))
            parts.append([])
            repeats = _Repeats(following)
    for last, own in zip(result, parts, strict=True):
        last.first_read_at = _earliest(own, len(last.reading.messages))
    return [*reversed(result)]


def _with_messages(reading: HistoryMessages, following: Sequence[Message]) -> HistoryMessages:
    return msgspec.structs.replace(reading, messages=tuple(following[: reading.shown]), shown=None)


class _Repeats:
    """The places at which the first messages of a reading occur again, and the number of messages at each."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        again = (index for index in range(1, len(messages)) if messages[index] == messages[0])
        self._starts = [*islice(again, _MAX_PLACES - 2)]
        self._lengths = [*accumulate(map(self._length_at, self._starts), max)]

    def _length_at(self, start: int) -> int:
        pairs = zip(self._messages, islice(self._messages, start, None), strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(self._messages) - start)

    def hold(self, length: int) -> bool:
        """Return whether the first `length` messages occur in another place as well."""
        last = len(self._messages) - length
        if last <= 0 or not length:
            return False
        before = bisect_left(self._starts, last)
        return bool(before and self._lengths[before - 1] >= length) or (
            self._messages[last] == self._messages[0] and self._messages[last:] == self._messages[:length]
        )


def _earliest(parts: Sequence[_Part], size: int) -> FirstRead:
    """Return the earliest reading time of each of `size` lines, in one pass over lines and parts."""
    times: list[datetime | None] = [None] * size
    unset = [*range(size + 1)]  # for each line the next one without a time, or one on the way to it
    for read_at, start, end in sorted(parts):
        line = _next_unset(unset, start)
        while line < end:
            times[line] = read_at
            unset[line] = line + 1
            line = _next_unset(unset, line + 1)
    return times


def _next_unset(unset: list[int], line: int) -> int:
    while unset[line] != line:
        unset[line] = unset[unset[line]]
        line = unset[line]
    return line


def date_lines(lines: Sequence[TranscriptLine], first_read_at: FirstRead) -> list[TranscriptLine]:
    """Set the first reading time of the lines of the latest reading from the readings that it contains."""
    times = iter(first_read_at)
    return [_dated(line, next(times)) if line.in_history else line for line in lines]


def _dated(line: TranscriptLine, first_read_at: datetime | None) -> TranscriptLine:
    if first_read_at is None or (line.first_read_at is not None and line.first_read_at <= first_read_at):
        return line
    return msgspec.structs.replace(line, first_read_at=first_read_at)


def _places(part: Sequence[Message], messages: Sequence[Message]) -> list[int]:
    """Return up to two positions of `part` in `messages`; the start is tried first, then the end."""
    last = len(messages) - len(part)
    if last < 0:
        return []
    if not part:
        return [0]
    between = (index for index in range(1, last) if messages[index] == part[0])
    starts = (0, *([last] if last else []), *between)
    fitting = (start for start in starts[:_MAX_PLACES] if messages[start : start + len(part)] == part)
    return [*islice(fitting, 2)]
