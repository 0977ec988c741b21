"""Match turns with lines: by order first, then by the evidence of texts."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice

import msgspec

from archiver.archive.transcript.ambiguity import ambiguous_turns
from archiver.archive.transcript.candidates import SKEW, Candidates, Match, TurnText
from archiver.archive.transcript.placement import Placement
from archiver.archive.transcript.shapes import TranscriptLine, TurnMessages
from archiver.archive.transcript.similar import similar

_WEIGHT_WITH_OUTPUTS = 4  # factor for the weight of messages if the outputs were found with the inputs
MAX_TRIES = 256  # places that are tried for a turn that is out of order
_MOVES = 16  # turns that may move elsewhere, one after the other, to make room for one turn
_TAIL = 64  # last messages of a turn, which may be all that the head of the history shows of it

Assignment = tuple[int, Match]


def place_turns(
    lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], *, is_dated: bool = True
) -> Placement:
    """Match turns, given in order of `began_at`, with the unclaimed lines of the merged history.

    The objective, in this order: turns found in full with their outputs, in the order of their times; such turns out
    of that order; turns found only by their inputs, often just "ok", in order; then such turns out of order, but
    only among turns whose times are so close that their order is not certain. `_Search.weight` decides between
    matches of one kind: one without skipped lines wins. A turn whose lines are claimed gets them if the other turns
    find lines that fit as well. A turn without matching lines gets the similar lines between its neighbours. Deleted
    turns come last, because a history may no longer show them. Finally the head may show the tail of a turn.

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
    def __init__(self, lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], *, is_dated: bool) -> None:
        self.is_dated = is_dated
        self.placement = Placement({}, set())
        self._lines = lines
        self._turns = turns
        self.candidates = Candidates(lines, turns)
        self.merged = self.candidates.merged

    def claim_outputs_in_order(self, turns: Sequence[int]) -> None:
        # A partial match helps to distinguish repeated texts if a turn has no other match.
        bounds = self._bounds(timedelta())
        result = [
            (turn, self._within(*bounds[turn], self.candidates.full(turn) or self.candidates.partial(turn)))
            for turn in turns
        ]
        for turn, match in heaviest_chain(result, self.weight):
            if match.is_full and self.candidates.turn_texts[turn].has_output:
                self.claim(turn, match, in_order=True)

    def _within(self, low: int, high: int, matches: Sequence[Match]) -> list[Match]:
        return [m for m in matches if low <= m.start and m.end <= high and self.merged.is_free(m)]

    def claim_inputs_in_order(self, turns: Sequence[int]) -> None:
        bounds = self._bounds(timedelta())
        result = [(turn, self._input_matches(turn, *bounds[turn])) for turn in self._without_match(turns)]
        for turn, match in heaviest_chain(result, self.weight):
            self.claim(turn, match, in_order=True)

    def claim_nearby(self, turns: Sequence[int]) -> None:
        bounds = self._bounds(2 * SKEW)
        for turn in self._without_match(turns):
            matches = self._input_matches(turn, *bounds[turn])
            if matches:
                self.claim(turn, max(matches, key=partial(self.weight, turn)), in_order=False)

    def _input_matches(self, turn: int, low: int, high: int) -> list[Match]:
        """Return the free matches between two lines that are based only on inputs."""
        matches = self.matches_of(turn, with_output=False)
        return [m for m in self._within(low, high, matches) if self._is_free(turn, m)]

    def claim_elsewhere(self, turns: Sequence[int], *, with_output: bool) -> None:
        without_match: set[TurnText] = set()
        bounds = self._bounds(2 * SKEW)
        for turn in self._without_match(turns):
            turn_text = self.candidates.turn_texts[turn]
            if turn_text.has_output != with_output or turn_text in without_match:
                continue
            matches = self._free_matches(turn)
            if not matches:
                without_match.add(turn_text)
                continue
            low, high = bounds[turn]
            best = max(matches, key=lambda m: (low <= m.start and m.end <= high, self.weight(turn, m)))
            self.claim(turn, best, in_order=False)

    def _free_matches(self, turn: int) -> list[Match]:
        """Return full matches at unclaimed lines, regardless of order."""
        has_output = self.candidates.turn_texts[turn].has_output
        lines = islice(self.candidates.free_places(turn), MAX_TRIES)
        matches = (match for line in lines if (match := self.candidates.full_at(turn, line)))
        return [m for m in matches if (self.merged.is_free(m) if has_output else self._is_free(turn, m))]

    def claim_occupied(self, turns: Sequence[int], *, with_output: bool) -> None:
        """Claim lines of turns that can move elsewhere, if the times are too close to decide."""
        without_match = [
            turn
            for turn in self._without_match(turns)
            if self.candidates.turn_texts[turn].has_output or not with_output
        ]
        if without_match:
            displacement = _Displacement(self, self._turns, with_output=with_output)
            for turn in without_match:
                displacement.make_room(turn, _MOVES, frozenset())

    def matches_of(self, turn: int, *, with_output: bool) -> list[Match]:
        """Return the matches by which a turn may claim lines: full ones with output, or else those by its inputs."""
        turn_text = self.candidates.turn_texts[turn]
        return (
            self.candidates.full(turn) if with_output or not turn_text.has_output else self.candidates.partial(turn)
        )

    def claim_similar(self) -> None:
        """Claim lines that are worded differently."""
        for turn, match in similar(self._turns, self.candidates, self.placement).items():
            if self.merged.is_free(match):
                self.claim(turn, match, in_order=True)

    def claim_head(self) -> None:
        """Match the tail of the last turn before a cut history with the head of that history."""
        claimed = self.merged.taken.find(1)
        limit = claimed if claimed >= 0 else len(self._lines)
        first = min(self.placement.in_order, default=len(self._turns))
        for turn in self._without_match(range(first))[::-1]:
            match = self._head_match(turn, limit)
            if match:
                self.claim(turn, match, in_order=True)
                return

    def _head_match(self, turn: int, limit: int) -> Match | None:
        turn_text = self.candidates.turn_texts[turn]
        last_read_at = self._lines[0].last_read_at if limit and not self._turns[turn].is_deleted else None
        if last_read_at is None or last_read_at < self._turns[turn].began_at:
            return None
        for begin in range(max(1, len(turn_text.keys) - _TAIL), len(turn_text.keys)):
            pairs = self.merged.walk(turn_text, range(begin, len(turn_text.keys)), 0, 1) or []
            if any(message in turn_text.required for message, _ in pairs) and pairs[-1][1] < limit:
                return msgspec.structs.replace(self.merged.match(turn_text, pairs, is_full=False), start=0)
        return None

    def _is_free(self, turn: int, match: Match) -> bool:
        """Return whether an input may claim these lines for its turn.

        A deleted turn may not claim lines that the history still shows, nor any lines only by its input if it has an
        output: such lines belong to another turn.
        """
        if self._turns[turn].is_deleted:
            is_shown = any(line.in_history for line in self._lines[match.start : match.end])
            if is_shown or self.candidates.turn_texts[turn].has_output:
                return False
        return self.merged.is_free(match)

    def claim(self, turn: int, match: Match, *, in_order: bool) -> None:
        self.merged.take(match)
        self.placement.matches[turn] = match
        if in_order:
            self.placement.in_order.add(turn)

    def holders(self, match: Match) -> set[int]:
        """Return the turns that have claimed lines of this match."""
        if self.merged.is_free(match):
            return set()
        return {
            turn for turn, own in self.placement.matches.items() if own.start < match.end and match.start < own.end
        }

    def release(self, turn: int) -> Match:
        """Release the lines of a turn."""
        match = self.placement.matches.pop(turn)
        self.merged.taken[match.start : match.end] = bytes(match.end - match.start)
        self.placement.in_order.discard(turn)
        return match

    def _without_match(self, turns: Iterable[int]) -> list[int]:
        return [turn for turn in turns if turn not in self.placement.matches]

    def _bounds(self, tolerance: timedelta) -> list[tuple[int, int]]:
        return self.placement.bounds(self._turns, len(self._lines), tolerance)

    def weight(self, turn: int, match: Match) -> int:
        """Return the weight of a match: one number for several criteria, by which the sums of chains are compared.

        The criteria, most important first: the number of messages found, with more weight in full matches; whether
        the match agrees with the time of the turn, is still shown (for a deleted turn: no longer), skips no message
        that webhooks report, is written identically, skips no line at all, and is followed by no more answers; then
        the earlier place.
        """
        result = 2 * len(match.pairs) + match.is_full
        if match.is_full and self.candidates.turn_texts[turn].has_output:
            result *= _WEIGHT_WITH_OUTPUTS
        is_whole = self.merged.is_user(match.end)
        is_timely = not self.candidates.untimely(turn, match.start)
        is_shown = bool(self._lines[match.end - 1].in_history)
        total = result
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


class _Displacement:
    """A search that moves turns to other fitting lines, so that a turn can claim theirs."""

    def __init__(self, search: _Search, turns: Sequence[TurnMessages], *, with_output: bool) -> None:
        self._search = search
        self._turns = turns
        self._with_output = with_output
        self._tries = MAX_TRIES

    def make_room(self, turn: int, moves: int, settled: frozenset[int]) -> bool:
        """Claim lines for the turn by moving a chain of at most `moves` other turns; return False if impossible."""
        search, turn_text = self._search, self._search.candidates.turn_texts[turn]
        if self._tries <= 0:
            return False
        matches = search.matches_of(turn, with_output=turn_text.has_output if settled else self._with_output)
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
        before = dict(search.placement.matches), set(search.placement.in_order), bytes(search.merged.taken)
        if not all(search.placement.matches[holder].is_full for holder in holders):
            return False
        for holder in holders:
            search.release(holder)
        search.claim(turn, match, in_order=False)
        if all(self.make_room(holder, moves - 1, settled | {turn}) for holder in sorted(holders)):
            return True
        search.placement.matches, search.placement.in_order = before[0], before[1]
        search.merged.taken[:] = before[2]
        return False


def heaviest_chain(
    found: Sequence[tuple[int, Sequence[Match]]], weight: Callable[[int, Match], int]
) -> list[Assignment]:
    """Return at most one match per turn, in order and without overlap, with the greatest total weight."""
    # The best chains by their ends: a later end is kept only for a greater total. A chain is the index of its last
    # link, which stores the index of the link before it; index 0 is the empty chain.
    ends, totals, chains = [0], [0], [0]
    links: list[tuple[Assignment, int]] = []
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
