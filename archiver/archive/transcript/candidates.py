"""Find the lines of the merged history that a turn may match.

A turn matches at a line if its messages correspond to the lines from there on, in order; texts are compared by
`wording.text_key`. A line that is not a user's may be skipped (tool and system messages, an output that the webhook
did not report), and so may a blank message, which upstream may leave out. Between two inputs only asides may be
skipped: an answer ends a turn. The match is *full* if every message with content was found, *partial* if every such
input was.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from itertools import accumulate, pairwise

import msgspec

from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.subsequence import align, common_subsequence
from archiver.archive.transcript.wording import Key, are_similar, is_cut, text_key

NEARBY = 32  # places of an often repeated text that are tried for one turn
SKEW = timedelta(seconds=40)  # the greatest error that is expected of a turn's time
PROMPTS = frozenset({"system", "developer"})
ASIDES = frozenset({"system", "developer", "tool", "function"})  # roles of lines that webhooks often do not report


class Match(msgspec.Struct, frozen=True, gc=False):
    """A match of a turn with the lines `start` to `end` (exclusive); `pairs` of (message index, line), both
    ascending.

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


class MergedHistory:
    """The lines of the merged history, indexed by text, with a flag for lines that turns have claimed."""

    def __init__(self, lines: Sequence[TranscriptLine]) -> None:
        self.lines = lines
        self.taken = bytearray(len(lines))
        # An extra entry at the end represents both ends: a walk beyond either stops there as at a user's line.
        self.keys: list[Key | None] = [*(text_key(line.role, line.content) for line in lines), None]
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
        """Return whether the line is a user message or the end of the history."""
        return self._is_user[line]

    def is_aside(self, line: int) -> bool:
        """Return whether webhooks often omit this line (system, tool and blank messages)."""
        return self._is_aside[line]

    def walk(
        self, turn_text: "TurnText", messages: Iterable[int], line: int, step: int
    ) -> list[tuple[int, int]] | None:
        """Pair `messages` with lines from `line` on, in direction `step`; None if a message is missing."""
        pairs = []
        for message in messages:
            # A step down to an input, or up from one input to the one before it, must not skip an answer.
            is_among_inputs = message < turn_text.inputs - (step < 0)
            while self.keys[line] != turn_text.keys[message]:
                if message not in turn_text.required:
                    break
                if self._is_user[line] or (is_among_inputs and not self._is_aside[line]):
                    return None
                line += step
            else:
                pairs.append((message, line))
                line += step
        return pairs

    def answers_from(self, line: int) -> list[Key | None]:
        """Return the keys of the lines from `line` up to the next user message."""
        return self.keys[line : self._is_user.index(True, line)]

    def match(self, turn: "TurnText", pairs: list[tuple[int, int]], *, is_full: bool) -> Match:
        start, end = pairs[0][1], pairs[-1][1] + 1
        asides = jumps = 0
        if end - start > len(pairs):
            values = {line for _, line in pairs}
            skipped = [line for line in range(start, end) if line not in values]
            asides = sum(self._is_aside[line] for line in skipped)
            jumps = len(skipped) - asides
        is_exact = all(turn.messages[message].content == self.lines[line].content for message, line in pairs)
        return Match(start, end, tuple(pairs), is_full, asides, jumps, is_exact)


class TurnText:
    """The text of a turn, shared by all turns with the same text; caches its matches."""

    def __init__(self, turn: TurnMessages, merged: MergedHistory) -> None:
        self.messages = turn.messages
        self.keys = [text_key(message.role, message.content) for message in turn.messages]
        filled = [index for index, (_, content) in enumerate(self.keys) if content]
        # A history may omit the instructions and the results of tools that the application sends to its assistant.
        filled = [index for index in filled if index >= turn.inputs or self.keys[index][0] not in ASIDES] or filled
        # If a turn has no content, only its blank input can be found.
        self.required = frozenset(filled or range(turn.inputs or len(self.keys)))
        self.inputs = turn.inputs
        self.has_output = any(index >= turn.inputs for index in filled)
        # The rarest text leaves the fewest places to try.
        self.anchor = self._rarest(self.required, merged)
        inputs = [index for index in self.required if index < turn.inputs]
        self.input_anchor = self._rarest(inputs, merged) if inputs and self.has_output else None
        self._merged = merged
        self._full: dict[int, Match | None] = {}
        self._partial: dict[int, Match | None] = {}

    def _rarest(self, messages: Iterable[int], merged: MergedHistory) -> int | None:
        """Return the message that occurs least often in the merged history; None if one is missing there."""
        count, rarest = min((len(merged.places.get(self.keys[index], ())), index) for index in messages)
        return rarest if count else None

    def full_at(self, line: int) -> Match | None:
        """Return the full match with the anchor at `line`."""
        if line not in self._full:
            self._full[line] = self._find_full(line)
        return self._full[line]

    def partial_at(self, line: int) -> Match | None:
        """Return the partial match with the input anchor at `line`."""
        if line not in self._partial:
            self._partial[line] = self._find_partial(line)
        return self._partial[line]

    def _find_full(self, line: int) -> Match | None:
        pairs = self._around(self.anchor, line, len(self.keys))
        return self._merged.match(self, pairs, is_full=True) if pairs else None

    def _find_partial(self, line: int) -> Match | None:
        pairs = self._around(self.input_anchor, line, self.inputs)
        if not pairs:
            return None
        begin = pairs[-1][1] + 1
        pairs += self.outputs_from(begin)
        return self._merged.match(self, pairs, is_full=False)

    def outputs_from(self, begin: int) -> list[tuple[int, int]]:
        """Pair outputs with lines from `begin` up to the next user message, including similar ones.

        Between two equal pairs, or a pair and an end, a single output is paired with a single line if they are
        similar, unless it is the beginning of that line: then it may have been reported before the rest existed.
        """
        turn_keys, history_keys = self.keys[self.inputs :], self._merged.answers_from(begin)
        equal = common_subsequence(turn_keys, history_keys)
        pairs = []
        for (turn_before, history_before), (turn_at, history_at) in pairwise(
            [(-1, -1), *equal, (len(turn_keys), len(history_keys))]
        ):
            outputs = [each for each in range(turn_before + 1, turn_at) if self._is_answer(turn_keys[each])]
            lines = [each for each in range(history_before + 1, history_at) if self._is_answer(history_keys[each])]
            if len(outputs) == len(lines) == 1 and _is_similar(turn_keys[outputs[0]], history_keys[lines[0]]):
                pairs.append((self.inputs + outputs[0], begin + lines[0]))
            if turn_at < len(turn_keys):
                pairs.append((self.inputs + turn_at, begin + history_at))
        return pairs

    @staticmethod
    def _is_answer(key: Key | None) -> bool:
        return key is not None and key[0] not in ASIDES and bool(key[1])

    def _around(self, anchor: int | None, line: int, end: int) -> list[tuple[int, int]] | None:
        if anchor is None:
            return None
        after = self._merged.walk(self, range(anchor + 1, end), line + 1, 1)
        before = None if after is None else self._merged.walk(self, range(anchor - 1, -1, -1), line - 1, -1)
        return None if after is None or before is None else [*reversed(before), (anchor, line), *after]


def _is_similar(output: Key, line: Key | None) -> bool:
    return (
        line is not None
        and output[0] == line[0]
        and not is_cut(output[1], line[1])
        and are_similar(output[1], line[1])
    )


class Candidates:
    """The matches to try for each turn; turns are numbered in order of `began_at`."""

    def __init__(self, lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages]) -> None:
        self.merged = MergedHistory(lines)
        self._turns = turns
        known_texts: dict[tuple[object, int], TurnText] = {}
        self.turn_texts = []
        for turn in turns:
            identity = (turn.messages, turn.inputs)
            if identity not in known_texts:
                known_texts[identity] = TurnText(turn, self.merged)
            self.turn_texts.append(known_texts[identity])

    def full(self, turn: int) -> list[Match]:
        """Return full matches; for a turn without output, only at lines whose readings could show it."""
        turn_text = self.turn_texts[turn]
        return [match for line in self._nearby(turn, turn_text.anchor) if (match := self.full_at(turn, line))]

    def partial(self, turn: int) -> list[Match]:
        """Return partial matches at lines whose readings could show the turn."""
        turn_text = self.turn_texts[turn]
        lines = (line for line in self._nearby(turn, turn_text.input_anchor) if self.could_show(turn, line))
        return [match for line in lines if (match := turn_text.partial_at(line))]

    def full_at(self, turn: int, line: int) -> Match | None:
        """Return the full match at `line`; None for a turn without output if the line is too old."""
        turn_text = self.turn_texts[turn]
        return turn_text.full_at(line) if turn_text.has_output or self.could_show(turn, line) else None

    def free_places(self, turn: int) -> Iterator[int]:
        """Yield every unclaimed line with the text of the anchor."""
        turn_text = self.turn_texts[turn]
        places = () if turn_text.anchor is None else self.merged.places[turn_text.keys[turn_text.anchor]]
        return (place for place in places if not self.merged.taken[place])

    def could_show(self, turn: int, line: int) -> bool:
        """Return whether a reading that showed this line was taken after the turn began."""
        last_read_at = self.merged.lines[line].last_read_at
        return last_read_at is not None and last_read_at >= self._turns[turn].began_at - SKEW

    def untimely(self, turn: int, line: int) -> timedelta:
        """Return by how much the turn began too early or too late for this line; zero if in time.

        A line was said before each reading that showed it, and after an earlier reading that showed neither this line
        nor a later one.
        """
        began_at = self._turns[turn].began_at
        first_read_at = self.merged.lines[line].first_read_at
        if first_read_at is None or began_at > first_read_at:
            return timedelta.max if first_read_at is None else began_at - first_read_at
        after = self._times_of_later_lines[line]
        return after - began_at if after is not None and began_at < after else timedelta()

    @cached_property
    def _times_of_later_lines(self) -> list[datetime | None]:
        """Return for each line the latest reading that showed neither it nor a later line."""
        lines = self.merged.lines
        readings = sorted({line.first_read_at for line in lines if line.first_read_at} - {None})
        result: list[datetime | None] = []
        earliest: datetime | None = None
        for line in reversed(lines):
            if line.first_read_at is not None and (earliest is None or line.first_read_at < earliest):
                earliest = line.first_read_at
            before = bisect_left(readings, earliest) if earliest else 0
            result.append(readings[before - 1] if before else None)
        return result[::-1]

    def _nearby(self, turn: int, anchor: int | None) -> list[int]:
        """Return the lines with the anchor's text; if there are many, only those nearest to the expected line."""
        if anchor is None:
            return []
        places = self.merged.places[self.turn_texts[turn].keys[anchor]]
        if len(places) <= NEARBY:
            return places
        middle = bisect_left(places, self._expected[self._offsets[turn] + anchor])
        first = max(0, min(middle - NEARBY // 2, len(places) - NEARBY))
        return places[first : first + NEARBY]

    @cached_property
    def _offsets(self) -> list[int]:
        return [*accumulate((len(turn_text.keys) for turn_text in self.turn_texts), initial=0)]

    @cached_property
    def _expected(self) -> list[int]:
        """Return the expected line of each message, from an alignment of all turns as one text."""
        turn_keys = [key for turn_text in self.turn_texts for key in turn_text.keys]
        keys = self.merged.keys[:-1]
        lines = [0] * len(turn_keys)
        for line, message in align(keys, turn_keys):
            lines[message] = line
        return [*accumulate(lines, max)]
