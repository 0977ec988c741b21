"""Record the lines of each turn, and compute the range of lines that the order of times allows."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from datetime import timedelta
from itertools import accumulate

import msgspec

from archiver.archive.transcript.candidates import SKEW, Match
from archiver.archive.transcript.shapes import TurnMessages


class Placement(msgspec.Struct):
    """Non-overlapping matches by turn; turns are numbered in order of `began_at`.

    `in_order` are the turns whose places agree with their times. `ambiguous` are those that other lines fit as well.
    """

    matches: dict[int, Match]
    in_order: set[int]
    ambiguous: frozenset[int] = frozenset()

    def bounds(self, turns: Sequence[TurnMessages], lines: int, tolerance: timedelta) -> list[tuple[int, int]]:
        """Return for each turn the range of `lines` that is in order with the turns placed in order.

        Turns whose times differ by at most `tolerance` may be in either order; if it is zero, the given order of the
        turns is certain.
        """
        placed = sorted(self.in_order)
        ends = [*accumulate((self.matches[turn].end for turn in placed), max, initial=0)]
        starts = [*accumulate((self.matches[turn].start for turn in reversed(placed)), min, initial=lines)][::-1]
        began = [turns[turn].began_at for turn in placed]
        bounds = []
        for turn, each in enumerate(turns):
            if tolerance:
                before = bisect_left(began, each.began_at - tolerance)
                after = bisect_right(began, each.began_at + tolerance)
            else:
                before, after = bisect_left(placed, turn), bisect_right(placed, turn)
            bounds.append((ends[before], starts[after]))
        return bounds

    def is_in_order(self, turns: Sequence[TurnMessages], turn: int, match: Match, others: Collection[int]) -> bool:
        """Return whether the times of the turns in order, except `others`, allow this match."""
        for each in self.in_order - {turn, *others}:
            apart = turns[each].began_at - turns[turn].began_at
            is_after = self.matches[each].start >= match.end
            if (apart < -2 * SKEW and is_after) or (apart > 2 * SKEW and not is_after):
                return False
        return True
