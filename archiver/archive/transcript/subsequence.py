"""Align two sequences: `align` finds the common items of two versions of a conversation.

It uses `common_subsequence`, which finds a longest common subsequence, exactly and in bounded memory. Each row of its
table is one integer (Crochemore et al. 2001, Hyyrö 2004), so that a machine word processes 64 cells at a time and
repeated items cost no more than others. A table that would be too large is split as in Hirschberg (1975).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from operator import add

Pair = tuple[int, int]  # index in old, index in new

CELLS = 1 << 28  # bits of the table in memory: 32 MiB


def align(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[Pair]:
    """Return a longest common subsequence that keeps the items that occur exactly once in each sequence.

    If one sequence is truncated, repeated messages such as "ok" would otherwise outweigh unique ones.
    """
    head = _common_head(old, new)
    pairs = [(index, index) for index in range(head)]
    anchors = [(head - 1, head - 1), *_anchors(old, new, head), (len(old), len(new))]
    for (old_before, new_before), (at_old, at_new) in pairwise(anchors):
        between = common_subsequence(old[old_before + 1 : at_old], new[new_before + 1 : at_new])
        pairs += [(old_before + 1 + in_old, new_before + 1 + in_new) for in_old, in_new in between]
        pairs.append((at_old, at_new))
    return pairs[:-1]


def _common_head(old: Sequence[Hashable], new: Sequence[Hashable]) -> int:
    shorter = min(len(old), len(new))
    return next((index for index in range(shorter) if old[index] != new[index]), shorter)


def _anchors(old: Sequence[Hashable], new: Sequence[Hashable], head: int) -> list[Pair]:
    """Return the longest chain, from `head` on, of pairs of items that are unique in both, by patience sorting."""
    in_old, in_new = Counter(old[head:]), Counter(new[head:])
    places = {item: index for index, item in enumerate(old[head:], head) if in_old[item] == in_new[item] == 1}
    piles: list[int] = []
    tops: list[int] = []
    links: list[tuple[Pair, int]] = []
    for at_new, item in enumerate(new[head:], head):
        if item in places:
            pile = bisect_left(piles, places[item])
            links.append(((places[item], at_new), tops[pile - 1] if pile else -1))
            piles[pile : pile + 1] = [places[item]]
            tops[pile : pile + 1] = [len(links) - 1]
    chain = []
    link = tops[-1] if tops else -1
    while link >= 0:
        pair, link = links[link]
        chain.append(pair)
    return chain[::-1]


def common_subsequence(old: Sequence[Hashable], new: Sequence[Hashable], cells: int = CELLS) -> list[Pair]:
    """Return the pairs of equal items of a longest common subsequence, ascending in both.

    Of several longest ones, it returns one that matches the beginning of `new`, because the unmatched items of `new`
    tend to be at its end.
    """
    head = _common_head(old, new)
    pairs = [(index, index) for index in range(head)]
    if head == min(len(old), len(new)):
        return pairs
    old, new = old[head:], new[head:]
    if len(old) * len(new) <= cells or len(new) == 1:
        rest = _walk(old, new)
    else:
        half = len(new) // 2
        cut = _cut(old, new, half)
        lower = common_subsequence(old[cut:], new[half:], cells)
        rest = common_subsequence(old[:cut], new[:half], cells)
        rest += [(in_old + cut, in_new + half) for in_old, in_new in lower]
    return pairs + [(in_old + head, in_new + head) for in_old, in_new in rest]


def _rows(old: Sequence[Hashable], new: Sequence[Hashable]) -> Iterator[int]:
    """Yield the rows of the table from the last to the first: one for each tail of `new`, the shortest first.

    Bit t is clear if the item of `old` before its last t items makes the subsequence with these longer.
    """
    every = (1 << len(old)) - 1
    places: dict[Hashable, int] = {}
    for bit, item in enumerate(reversed(old)):
        places[item] = places.get(item, 0) | 1 << bit
    row = every
    for item in reversed(new):
        hits = row & places.get(item, 0)
        if hits:
            row = (row + hits | row - hits) & every
        yield row


def _walk(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[Pair]:
    rows = [*_rows(old, new)]
    pairs = []
    in_old = in_new = 0
    while in_old < len(old) and in_new < len(new):
        if old[in_old] == new[in_new]:
            pairs.append((in_old, in_new))
            in_old, in_new = in_old + 1, in_new + 1
        elif rows[-1 - in_new] >> (len(old) - 1 - in_old) & 1:
            in_old += 1
        else:
            in_new += 1
    return pairs


def _cut(old: Sequence[Hashable], new: Sequence[Hashable], half: int) -> int:
    """Return where to cut `old` so that aligning its parts with those of `new`, cut at `half`, loses nothing."""
    lower = _lengths(old, new[half:])[::-1]
    upper = _lengths(old[::-1], new[:half][::-1])
    lengths = [*map(add, upper, lower)]
    return lengths.index(max(lengths))


def _lengths(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[int]:
    """Return the length of the subsequence of `new` and the last n items of `old`, for each n."""
    row = reduce(lambda _, each: each, _rows(old, new), 0)
    bits = reversed(f"{row:0{len(old)}b}")
    return [*accumulate((bit == "0" for bit in bits), initial=0)]
