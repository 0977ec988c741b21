"""Where a turn may stand in the spine.

A turn matches from a line on when its messages and the lines run in parallel; texts are compared by `wording.key_of`.
A line that is not a user's may be skipped (tool and system messages, an output that the webhook did not tell), and so
may a blank message, which upstream may leave out. Between two inputs only asides may be skipped: an answer ends a
turn. The match is *full* when every message with content was found, *partial* when every such input was.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from itertools import accumulate, pairwise

import msgspec

from archiver.alignment.shapes import USER, Line, Turn
from archiver.alignment.subsequence import align, common_subsequence
from archiver.alignment.wording import Key, are_alike, is_cut, key_of

NEARBY = 32  # places of an often repeated text that are tried for one turn
SKEW = timedelta(seconds=40)  # by which the time of a turn is believed to be wrong at most
PROMPTS = frozenset({"system", "developer"})
ASIDES = frozenset({"system", "developer", "tool", "function"})  # roles of lines that webhooks often do not report


class Match(msgspec.Struct, frozen=True, gc=False):
    """A turn at the lines `start` to `end`, exclusive; `pairs` of (message of the turn, line), ascending in both.

    `asides`: skipped lines that webhooks often do not report; `jumps`: other skipped lines; `is_exact`: no pair
    differs in writing.
    """

    start: int
    end: int
    pairs: tuple[tuple[int, int], ...]
    is_full: bool
    asides: int = 0
    jumps: int = 0
    is_exact: bool = True


class Spine:
    """The lines, by text too, and which of them turns have claimed."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.taken = bytearray(len(lines))
        # One more at the end stands for both ends: a walk that runs off either stops there as at a user's line.
        self.keys: list[Key | None] = [*(key_of(line.role, line.content) for line in lines), None]
        self._is_user = [*(key is None or key[0] == USER for key in self.keys)]
        self._is_aside = [*(key is not None and (key[0] in ASIDES or not key[1]) for key in self.keys)]
        self.places: defaultdict[Key | None, list[int]] = defaultdict(list)
        for place, key in enumerate(self.keys):
            self.places[key].append(place)

    def is_free(self, match: Match) -> bool:
        return not any(self.taken[match.start : match.end])

    def take(self, match: Match) -> None:
        self.taken[match.start : match.end] = b"\1" * (match.end - match.start)

    def is_user(self, line: int) -> bool:
        """Whether the user says this line, or nothing stands there."""
        return self._is_user[line]

    def is_aside(self, line: int) -> bool:
        """Whether webhooks often do not report this line."""
        return self._is_aside[line]

    def walk(self, told: "Told", messages: Iterable[int], line: int, step: int) -> list[tuple[int, int]] | None:
        """Pairs of `messages`, by index, and lines from `line` on, up or down; None where a message is missing."""
        pairs = []
        for message in messages:
            # The step that leads down to an input, or up from one to the input before, passes no answer.
            is_among_inputs = message < told.inputs - (step < 0)
            while self.keys[line] != told.keys[message]:
                if message not in told.required:
                    break
                if self._is_user[line] or (is_among_inputs and not self._is_aside[line]):
                    return None
                line += step
            else:
                pairs.append((message, line))
                line += step
        return pairs

    def answers_from(self, line: int) -> list[Key | None]:
        """The lines from `line` up to the next user's."""
        return self.keys[line : self._is_user.index(True, line)]

    def match(self, turn: "Told", pairs: list[tuple[int, int]], *, is_full: bool) -> Match:
        start, end = pairs[0][1], pairs[-1][1] + 1
        asides = jumps = 0
        if end - start > len(pairs):
            found = {line for _, line in pairs}
            skipped = [line for line in range(start, end) if line not in found]
            asides = sum(self._is_aside[line] for line in skipped)
            jumps = len(skipped) - asides
        is_exact = all(turn.messages[message].content == self.lines[line].content for message, line in pairs)
        return Match(start, end, tuple(pairs), is_full, asides, jumps, is_exact)


class Told:
    """What a turn tells, shared by all turns that tell the same; remembers where it was found."""

    def __init__(self, turn: Turn, spine: Spine) -> None:
        self.messages = turn.messages
        self.keys = [key_of(message.role, message.content) for message in turn.messages]
        filled = [index for index, (_, content) in enumerate(self.keys) if content]
        # A history may omit the instructions and the results of tools that the application sends to its assistant.
        filled = [index for index in filled if index >= turn.inputs or self.keys[index][0] not in ASIDES] or filled
        # Of a turn without any content its blank input is all that there is to find.
        self.required = frozenset(filled or range(turn.inputs or len(self.keys)))
        self.inputs = turn.inputs
        self.has_output = any(index >= turn.inputs for index in filled)
        # The rarest text leaves the fewest places to try.
        self.anchor = self._rarest(self.required, spine)
        inputs = [index for index in self.required if index < turn.inputs]
        self.input_anchor = self._rarest(inputs, spine) if inputs and self.has_output else None
        self._spine = spine
        self._full: dict[int, Match | None] = {}
        self._partial: dict[int, Match | None] = {}

    def _rarest(self, messages: Iterable[int], spine: Spine) -> int | None:
        """The message whose text the spine holds least often; None if it lacks one."""
        count, rarest = min((len(spine.places.get(self.keys[index], ())), index) for index in messages)
        return rarest if count else None

    def full_at(self, line: int) -> Match | None:
        """The full match with the anchor at `line`."""
        if line not in self._full:
            self._full[line] = self._find_full(line)
        return self._full[line]

    def partial_at(self, line: int) -> Match | None:
        """The partial match with the input anchor at `line`."""
        if line not in self._partial:
            self._partial[line] = self._find_partial(line)
        return self._partial[line]

    def _find_full(self, line: int) -> Match | None:
        pairs = self._around(self.anchor, line, len(self.keys))
        return self._spine.match(self, pairs, is_full=True) if pairs else None

    def _find_partial(self, line: int) -> Match | None:
        pairs = self._around(self.input_anchor, line, self.inputs)
        if not pairs:
            return None
        begin = pairs[-1][1] + 1
        pairs += self.outputs_from(begin)
        return self._spine.match(self, pairs, is_full=False)

    def outputs_from(self, begin: int) -> list[tuple[int, int]]:
        """Pairs of outputs and the lines from `begin` up to the next user's, those that are alike included.

        Between two equal ones, or those and an end, one output is alike to the one line that stands there, unless it
        is the beginning of that line: then it may have been reported before the rest existed.
        """
        said, shown = self.keys[self.inputs :], self._spine.answers_from(begin)
        equal = common_subsequence(said, shown)
        pairs = []
        for (said_before, shown_before), (at_said, at_shown) in pairwise([(-1, -1), *equal, (len(said), len(shown))]):
            outputs = [each for each in range(said_before + 1, at_said) if self._is_answer(said[each])]
            lines = [each for each in range(shown_before + 1, at_shown) if self._is_answer(shown[each])]
            if len(outputs) == len(lines) == 1 and _is_alike(said[outputs[0]], shown[lines[0]]):
                pairs.append((self.inputs + outputs[0], begin + lines[0]))
            if at_said < len(said):
                pairs.append((self.inputs + at_said, begin + at_shown))
        return pairs

    @staticmethod
    def _is_answer(key: Key | None) -> bool:
        return key is not None and key[0] not in ASIDES and bool(key[1])

    def _around(self, anchor: int | None, line: int, end: int) -> list[tuple[int, int]] | None:
        if anchor is None:
            return None
        after = self._spine.walk(self, range(anchor + 1, end), line + 1, 1)
        before = None if after is None else self._spine.walk(self, range(anchor - 1, -1, -1), line - 1, -1)
        return None if after is None or before is None else [*reversed(before), (anchor, line), *after]


def _is_alike(output: Key, line: Key | None) -> bool:
    return (
        line is not None and output[0] == line[0] and not is_cut(output[1], line[1]) and are_alike(output[1], line[1])
    )


class Candidates:
    """The matches worth trying, by turn; turns are named by their place in order of `began_at`."""

    def __init__(self, lines: Sequence[Line], turns: Sequence[Turn]) -> None:
        self.spine = Spine(lines)
        self._turns = turns
        told: dict[tuple[object, int], Told] = {}
        self.told = []
        for turn in turns:
            tells = (turn.messages, turn.inputs)
            if tells not in told:
                told[tells] = Told(turn, self.spine)
            self.told.append(told[tells])

    def full(self, turn: int) -> list[Match]:
        """Full matches; those of a turn that tells no output only where a reading could show it."""
        told = self.told[turn]
        return [match for line in self._nearby(turn, told.anchor) if (match := self.full_at(turn, line))]

    def partial(self, turn: int) -> list[Match]:
        """Partial matches where a reading could show the turn."""
        told = self.told[turn]
        lines = (line for line in self._nearby(turn, told.input_anchor) if self.could_show(turn, line))
        return [match for line in lines if (match := told.partial_at(line))]

    def full_at(self, turn: int, line: int) -> Match | None:
        """The full match with the anchor at `line`, unless inputs are its only evidence and the line is too old."""
        told = self.told[turn]
        return told.full_at(line) if told.has_output or self.could_show(turn, line) else None

    def free_places(self, turn: int) -> Iterator[int]:
        """Every unclaimed line that has the text of the anchor."""
        told = self.told[turn]
        places = () if told.anchor is None else self.spine.places[told.keys[told.anchor]]
        return (place for place in places if not self.spine.taken[place])

    def could_show(self, turn: int, line: int) -> bool:
        """Whether a reading that showed this line was taken after the turn began."""
        last_read_at = self.spine.lines[line].last_read_at
        return last_read_at is not None and last_read_at >= self._turns[turn].began_at - SKEW

    def untimely(self, turn: int, line: int) -> timedelta:
        """By how much the turn began too early or too late to begin at this line; zero where it did not.

        A line that a reading showed was said before it. One that follows what an earlier reading showed at last was
        said after that reading.
        """
        began_at = self._turns[turn].began_at
        first_read_at = self.spine.lines[line].first_read_at
        if first_read_at is None or began_at > first_read_at:
            return timedelta.max if first_read_at is None else began_at - first_read_at
        after = self._said_after[line]
        return after - began_at if after is not None and began_at < after else timedelta()

    @cached_property
    def _said_after(self) -> list[datetime | None]:
        """Of each line the latest reading that showed neither it nor any line after it."""
        lines = self.spine.lines
        readings = sorted({line.first_read_at for line in lines if line.first_read_at} - {None})
        found: list[datetime | None] = []
        earliest: datetime | None = None
        for line in reversed(lines):
            if line.first_read_at is not None and (earliest is None or line.first_read_at < earliest):
                earliest = line.first_read_at
            before = bisect_left(readings, earliest) if earliest else 0
            found.append(readings[before - 1] if before else None)
        return found[::-1]

    def _nearby(self, turn: int, anchor: int | None) -> list[int]:
        """Where the anchor's text stands; of many places those next to where the whole conversation has it."""
        if anchor is None:
            return []
        places = self.spine.places[self.told[turn].keys[anchor]]
        if len(places) <= NEARBY:
            return places
        middle = bisect_left(places, self._expected[self._offsets[turn] + anchor])
        first = max(0, min(middle - NEARBY // 2, len(places) - NEARBY))
        return places[first : first + NEARBY]

    @cached_property
    def _offsets(self) -> list[int]:
        return [*accumulate((len(told.keys) for told in self.told), initial=0)]

    @cached_property
    def _expected(self) -> list[int]:
        """The line of each message of all turns in a row, if these are aligned as one text, or of the one before."""
        said = [key for told in self.told for key in told.keys]
        keys = self.spine.keys[:-1]
        lines = [0] * len(said)
        for line, message in align(keys, said):
            lines[message] = line
        return [*accumulate(lines, max)]
