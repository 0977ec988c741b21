"""Which turn stands where: order first, then the evidence of texts."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import islice

import msgspec

from archiver.alignment.candidates import Candidates, Match, Told
from archiver.alignment.shapes import USER, Line, Turn

_OUTPUTS_TOO = 4  # how much more a message weighs where the outputs were found with the inputs
_TRIES = 256  # places where a turn that is out of order is looked for
_TAIL = 64  # messages of a turn that the head of the history may show alone

Placing = tuple[int, Match]


class Placement(msgspec.Struct, frozen=True):
    """Non-overlapping matches by turn; `in_order` are the turns whose places agree with their times."""

    matches: dict[int, Match]
    in_order: set[int]


def place(lines: Sequence[Line], turns: Sequence[Turn]) -> Placement:
    """Find the turns, given in order of their beginning, in a spine of unclaimed lines.

    In order, a set of matches with the greatest weight: full ones with output before all others, longer before
    shorter, then the earliest. What is left is looked for out of order, if found in full; and at the head, if that
    shows its tail.
    Inputs alone, often a mere "ok", are weak evidence: they claim nothing before all outputs have claimed theirs.
    """
    search = _Search(lines, turns)
    search.claim_outputs_in_order()
    search.claim_elsewhere(with_output=True)
    search.claim_inputs_in_order()
    search.claim_elsewhere(with_output=False)
    search.claim_head()
    return search.placement


class _Search:
    def __init__(self, lines: Sequence[Line], turns: Sequence[Turn]) -> None:
        self.placement = Placement({}, set())
        self._lines = lines
        self._turns = turns
        self._candidates = Candidates(lines, turns)
        self._spine = self._candidates.spine

    def claim_outputs_in_order(self) -> None:
        # A partial match helps to tell repeated texts apart, where it is all that a turn has.
        found = [
            (turn, self._candidates.full(turn) or self._candidates.partial(turn)) for turn in range(len(self._turns))
        ]
        for turn, match in heaviest_chain(found, self._weight):
            if match.is_full and self._candidates.told[turn].has_output:
                self._claim(turn, match, in_order=True)

    def claim_inputs_in_order(self) -> None:
        bounds = self._bounds()
        found = []
        for turn in self._unplaced():
            matches = self._candidates.partial(turn)
            if not self._candidates.told[turn].has_output:
                matches = self._candidates.full(turn)
            low, high = bounds[turn]
            free = [m for m in matches if low <= m.start and m.end <= high and self._is_free(turn, m)]
            found.append((turn, free))
        for turn, match in heaviest_chain(found, self._weight):
            self._claim(turn, match, in_order=True)

    def claim_elsewhere(self, *, with_output: bool) -> None:
        hopeless: set[Told] = set()
        for turn in self._unplaced():
            told = self._candidates.told[turn]
            if told.has_output != with_output or told in hopeless:
                continue
            for line in islice(self._candidates.free_places(turn), _TRIES):
                match = self._candidates.full_at(turn, line)
                if match and (self._spine.is_free(match) if with_output else self._is_free(turn, match)):
                    self._claim(turn, match, in_order=False)
                    break
            else:
                hopeless.add(told)

    def claim_head(self) -> None:
        """A history that was cut in the middle of a turn begins with the tail of the last one before all others."""
        claimed = self._spine.taken.find(1)
        limit = claimed if claimed >= 0 else len(self._lines)
        first = min(self.placement.in_order, default=len(self._turns))
        for turn in [turn for turn in self._unplaced() if turn < first][::-1]:
            match = self._head_match(turn, limit)
            if match:
                self._claim(turn, match, in_order=True)
                return

    def _head_match(self, turn: int, limit: int) -> Match | None:
        told = self._candidates.told[turn]
        last_read_at = self._lines[0].last_read_at if limit else None
        if last_read_at is None or last_read_at < self._turns[turn].began_at:
            return None
        for begin in range(max(1, len(told.keys) - _TAIL), len(told.keys)):
            pairs = self._spine.walk(told, range(begin, len(told.keys)), 0, 1) or []
            if any(message in told.required for message, _ in pairs) and pairs[-1][1] < limit:
                return Match(0, pairs[-1][1] + 1, tuple(pairs), is_full=False)
        return None

    def _is_free(self, turn: int, match: Match) -> bool:
        """Whether an input may claim these lines for its turn.

        Not for a deleted one where another answer follows, or where history shows them still: those are another's.
        """
        if self._turns[turn].is_deleted:
            is_shown = any(line.in_history for line in self._lines[match.start : match.end])
            if is_shown or self._candidates.told[turn].has_output:
                return False
        return self._spine.is_free(match)

    def _claim(self, turn: int, match: Match, *, in_order: bool) -> None:
        self._spine.take(match)
        self.placement.matches[turn] = match
        if in_order:
            self.placement.in_order.add(turn)

    def _unplaced(self) -> list[int]:
        return [turn for turn in range(len(self._turns)) if turn not in self.placement.matches]

    def _bounds(self) -> list[tuple[int, int]]:
        """Between which lines each turn is in order with those that are placed."""
        lows, highs = [], []
        low, high = 0, len(self._lines)
        for turn in range(len(self._turns)):
            lows.append(low)
            if turn in self.placement.in_order:
                low = self.placement.matches[turn].end
        for turn in reversed(range(len(self._turns))):
            highs.append(high)
            if turn in self.placement.in_order:
                high = self.placement.matches[turn].start
        return [*zip(lows, reversed(highs), strict=True)]

    def _weight(self, turn: int, match: Match) -> int:
        """The longer, the full, the one no older than the turn, the one that nothing else follows, the earlier."""
        first_read_at = self._lines[match.start].first_read_at
        is_timely = first_read_at is not None and first_read_at >= self._turns[turn].began_at
        found = 2 * len(match.pairs) + match.is_full
        if match.is_full and self._candidates.told[turn].has_output:
            found *= _OUTPUTS_TOO
        every = len(self._turns) + 1
        is_whole = match.end == len(self._lines) or self._lines[match.end].role == USER
        return ((found * every + is_timely) * every + is_whole) * every * (len(self._lines) + 1) - match.start


def heaviest_chain(
    found: Sequence[tuple[int, Sequence[Match]]], weight: Callable[[int, Match], int]
) -> list[Placing]:
    """At most one match a turn, in the order of the turns given and without overlap, of the greatest total weight."""
    # The best chains by their ends: a later end is kept only for a greater total. A chain is the index of its last
    # link, which knows the one before; link 0 is none.
    ends, totals, chains = [0], [0], [0]
    links: list[tuple[Placing, int]] = []
    for turn, matches in found:
        longer = []
        for match in matches:
            best = bisect_right(ends, match.start) - 1
            longer.append((totals[best] + weight(turn, match), match, chains[best]))
        for total, match, before in longer:
            if totals[bisect_right(ends, match.end) - 1] < total:
                links.append(((turn, match), before))
                worse = slice(bisect_left(ends, match.end), bisect_right(totals, total))
                ends[worse], totals[worse], chains[worse] = [match.end], [total], [len(links)]
    placings = []
    chain = chains[-1]
    while chain:
        placing, chain = links[chain - 1]
        placings.append(placing)
    return placings[::-1]
