"""Which turn stands where: order first, then the evidence of texts."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice

import msgspec

from archiver.alignment.ambiguity import ambiguous_turns
from archiver.alignment.candidates import SKEW, Candidates, Match, Told
from archiver.alignment.placement import Placement
from archiver.alignment.shapes import Line, Turn
from archiver.alignment.similar import similar

_OUTPUTS_TOO = 4  # how much more a message weighs where the outputs were found with the inputs
_TRIES = 256  # places where a turn that is out of order is looked for
_MOVES = 16  # turns that go elsewhere, one after the other, to make room for one
_TAIL = 64  # messages of a turn that the head of the history may show alone

Placing = tuple[int, Match]


def place(lines: Sequence[Line], turns: Sequence[Turn], *, is_dated: bool = True) -> Placement:
    """Find the turns, given in order of their beginning, in a spine of unclaimed lines.

    The objective, in this order: turns found in full with their outputs, in the order of their times; such turns out
    of that order; turns found by their inputs alone, often a mere "ok", in order; then such turns out of order, but
    only among turns whose times are so close that their order is not certain. `_Search.weight` decides between
    matches of one kind: one without skipped lines wins. A turn that finds its lines taken has them if the others find
    lines that fit them as well; one that finds none has those between its neighbours that are alike. Turns that were
    deleted come after all others, for a history may show them no more. At last the head may show the tail of a turn.

    `is_dated`: it is certain when each line was read for the first time.
    """
    search = _Search(lines, turns, is_dated=is_dated)
    for is_deleted in (False, True):
        some = [turn for turn, each in enumerate(turns) if each.is_deleted == is_deleted]
        search.claim_outputs_in_order(some)
        search.claim_elsewhere(some, with_output=True)
        if not is_deleted:
            search.claim_occupied(some, with_output=True)
        search.claim_inputs_in_order(some)
        search.claim_elsewhere(some, with_output=False)
        search.claim_nearby(some)
        if not is_deleted:
            search.claim_occupied(some, with_output=False)
            search.claim_similar()
    search.claim_head()
    search.placement.ambiguous = ambiguous_turns(turns, search.candidates, search.placement, is_dated=is_dated)
    return search.placement


class _Search:
    def __init__(self, lines: Sequence[Line], turns: Sequence[Turn], *, is_dated: bool) -> None:
        self.is_dated = is_dated
        self.placement = Placement({}, set())
        self._lines = lines
        self._turns = turns
        self.candidates = Candidates(lines, turns)
        self.spine = self.candidates.spine

    def claim_outputs_in_order(self, turns: Sequence[int]) -> None:
        # A partial match helps to tell repeated texts apart, where it is all that a turn has.
        bounds = self._bounds(timedelta())
        found = [
            (turn, self._within(*bounds[turn], self.candidates.full(turn) or self.candidates.partial(turn)))
            for turn in turns
        ]
        for turn, match in heaviest_chain(found, self.weight):
            if match.is_full and self.candidates.told[turn].has_output:
                self.claim(turn, match, in_order=True)

    def _within(self, low: int, high: int, matches: Sequence[Match]) -> list[Match]:
        return [m for m in matches if low <= m.start and m.end <= high and self.spine.is_free(m)]

    def claim_inputs_in_order(self, turns: Sequence[int]) -> None:
        bounds = self._bounds(timedelta())
        found = [(turn, self._weak_matches(turn, *bounds[turn])) for turn in self._unplaced(turns)]
        for turn, match in heaviest_chain(found, self.weight):
            self.claim(turn, match, in_order=True)

    def claim_nearby(self, turns: Sequence[int]) -> None:
        bounds = self._bounds(2 * SKEW)
        for turn in self._unplaced(turns):
            matches = self._weak_matches(turn, *bounds[turn])
            if matches:
                self.claim(turn, max(matches, key=partial(self.weight, turn)), in_order=False)

    def _weak_matches(self, turn: int, low: int, high: int) -> list[Match]:
        """The matches by inputs alone between two lines."""
        matches = self.matches_of(turn, with_output=False)
        return [m for m in self._within(low, high, matches) if self._is_free(turn, m)]

    def claim_elsewhere(self, turns: Sequence[int], *, with_output: bool) -> None:
        hopeless: set[Told] = set()
        bounds = self._bounds(2 * SKEW)
        for turn in self._unplaced(turns):
            told = self.candidates.told[turn]
            if told.has_output != with_output or told in hopeless:
                continue
            matches = self._free_matches(turn)
            if not matches:
                hopeless.add(told)
                continue
            low, high = bounds[turn]
            best = max(matches, key=lambda m: (low <= m.start and m.end <= high, self.weight(turn, m)))
            self.claim(turn, best, in_order=False)

    def _free_matches(self, turn: int) -> list[Match]:
        """Full matches at lines that no turn has claimed, whatever the order."""
        has_output = self.candidates.told[turn].has_output
        lines = islice(self.candidates.free_places(turn), _TRIES)
        matches = (match for line in lines if (match := self.candidates.full_at(turn, line)))
        return [m for m in matches if (self.spine.is_free(m) if has_output else self._is_free(turn, m))]

    def claim_occupied(self, turns: Sequence[int], *, with_output: bool) -> None:
        """Claim lines of turns that go elsewhere for it, where the times of all are too close to decide."""
        unplaced = [
            turn for turn in self._unplaced(turns) if self.candidates.told[turn].has_output or not with_output
        ]
        if unplaced:
            room = _Room(self, self._turns, with_output=with_output)
            for turn in unplaced:
                room.make(turn, _MOVES, frozenset())

    def matches_of(self, turn: int, *, with_output: bool) -> list[Match]:
        """The matches by which a turn may claim lines: full ones with output, or else those by its inputs."""
        told = self.candidates.told[turn]
        return self.candidates.full(turn) if with_output or not told.has_output else self.candidates.partial(turn)

    def claim_similar(self) -> None:
        """Claim lines that are worded differently."""
        for turn, match in similar(self._turns, self.candidates, self.placement).items():
            if self.spine.is_free(match):
                self.claim(turn, match, in_order=True)

    def claim_head(self) -> None:
        """A history that was cut in the middle of a turn begins with the tail of the last one before all others."""
        claimed = self.spine.taken.find(1)
        limit = claimed if claimed >= 0 else len(self._lines)
        first = min(self.placement.in_order, default=len(self._turns))
        for turn in self._unplaced(range(first))[::-1]:
            match = self._head_match(turn, limit)
            if match:
                self.claim(turn, match, in_order=True)
                return

    def _head_match(self, turn: int, limit: int) -> Match | None:
        told = self.candidates.told[turn]
        last_read_at = self._lines[0].last_read_at if limit and not self._turns[turn].is_deleted else None
        if last_read_at is None or last_read_at < self._turns[turn].began_at:
            return None
        for begin in range(max(1, len(told.keys) - _TAIL), len(told.keys)):
            pairs = self.spine.walk(told, range(begin, len(told.keys)), 0, 1) or []
            if any(message in told.required for message, _ in pairs) and pairs[-1][1] < limit:
                return msgspec.structs.replace(self.spine.match(told, pairs, is_full=False), start=0)
        return None

    def _is_free(self, turn: int, match: Match) -> bool:
        """Whether an input may claim these lines for its turn.

        Not for a deleted one where another answer follows, or where history shows them still: those are another's.
        """
        if self._turns[turn].is_deleted:
            is_shown = any(line.in_history for line in self._lines[match.start : match.end])
            if is_shown or self.candidates.told[turn].has_output:
                return False
        return self.spine.is_free(match)

    def claim(self, turn: int, match: Match, *, in_order: bool) -> None:
        self.spine.take(match)
        self.placement.matches[turn] = match
        if in_order:
            self.placement.in_order.add(turn)

    def holders(self, match: Match) -> set[int]:
        """The turns that have lines of this match."""
        if self.spine.is_free(match):
            return set()
        return {
            turn for turn, own in self.placement.matches.items() if own.start < match.end and match.start < own.end
        }

    def release(self, turn: int) -> Match:
        """Take its lines from a turn."""
        match = self.placement.matches.pop(turn)
        self.spine.taken[match.start : match.end] = bytes(match.end - match.start)
        self.placement.in_order.discard(turn)
        return match

    def _unplaced(self, turns: Iterable[int]) -> list[int]:
        return [turn for turn in turns if turn not in self.placement.matches]

    def _bounds(self, tolerance: timedelta) -> list[tuple[int, int]]:
        return self.placement.bounds(self._turns, len(self._lines), tolerance)

    def weight(self, turn: int, match: Match) -> int:
        """What a match is worth: the sum over a chain decides, lexicographically.

        Messages found, those of full matches first; then how many matches agree with the time of the turn, are shown
        still unless it was deleted, pass no message that webhooks report, are written alike, skip no line at all, and
        have nothing after them; then the earlier.
        """
        found = 2 * len(match.pairs) + match.is_full
        if match.is_full and self.candidates.told[turn].has_output:
            found *= _OUTPUTS_TOO
        is_whole = self.spine.is_user(match.end)
        is_timely = not self.candidates.untimely(turn, match.start)
        is_shown = bool(self._lines[match.end - 1].in_history)
        total = found
        for merit in (
            is_timely,
            is_shown != self._turns[turn].is_deleted,
            not match.jumps,
            match.is_exact,
            not match.asides,
            is_whole,
        ):
            total = total * (len(self._turns) + 1) + merit
        return total * (len(self._turns) + 1) * (len(self._lines) + 1) - match.start


class _Room:
    """Lets turns claim lines that others have, where these find lines that fit them as well."""

    def __init__(self, search: _Search, turns: Sequence[Turn], *, with_output: bool) -> None:
        self._search = search
        self._turns = turns
        self._with_output = with_output
        self._tries = _TRIES

    def make(self, turn: int, moves: int, settled: frozenset[int]) -> bool:
        """Claim lines for the turn, at most so many others moving one after the other; False if there are none."""
        search, told = self._search, self._search.candidates.told[turn]
        if self._tries <= 0:
            return False
        matches = search.matches_of(turn, with_output=told.has_output if settled else self._with_output)
        for match in sorted(matches, key=partial(search.weight, turn), reverse=True):
            self._tries -= 1
            is_untimely = search.is_dated and search.candidates.untimely(turn, match.start) > SKEW
            holders = search.holders(match)
            if is_untimely or (holders and not moves) or holders & settled:
                continue
            if not search.placement.is_in_order(self._turns, turn, match, holders | settled):
                continue
            if self._swap(turn, match, holders, moves, settled):
                return True
        return False

    def _swap(self, turn: int, match: Match, holders: set[int], moves: int, settled: frozenset[int]) -> bool:
        search = self._search
        before = dict(search.placement.matches), set(search.placement.in_order), bytes(search.spine.taken)
        if not all(search.placement.matches[holder].is_full for holder in holders):
            return False
        for holder in holders:
            search.release(holder)
        search.claim(turn, match, in_order=False)
        if all(self.make(holder, moves - 1, settled | {turn}) for holder in sorted(holders)):
            return True
        search.placement.matches, search.placement.in_order = before[0], before[1]
        search.spine.taken[:] = before[2]
        return False


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
