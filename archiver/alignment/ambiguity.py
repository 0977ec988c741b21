"""Turns whose lines the evidence does not decide.

A turn is ambiguous where other lines fit it as well as those that it has:

- as many of its messages are found there, none written less alike, and nothing is skipped but asides, which webhooks
  often do not report; it does not count whether more answers follow, since a webhook may be sent before they exist;
- no turn has claimed these lines, for their own webhook was lost, or only turns that are ambiguous themselves have;
- the readings that showed them agree with the time of the turn, give or take `SKEW`;
- the order of the turns allows it; turns whose times differ by at most twice `SKEW` may have either order.

Turns that fit each other's lines are ambiguous where their times differ by at most twice `SKEW`, or by no more than
times of this session are known to be wrong; else their times decide. Where turns were deleted, those that skip an
answer, are shown in part, begin after a line of the user that no turn has, or whose text occurs more than once, are
ambiguous if lines of a deleted one are still shown, for these may be another turn's, or if lines vanished that no
deleted turn has.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

from archiver.alignment.candidates import SKEW, Candidates, Match
from archiver.alignment.placement import Placement
from archiver.alignment.shapes import Turn
from archiver.alignment.wording import Key

_PASSES = 16  # turns that move one after the other, each to the place of the next


class _Move(NamedTuple):
    """A turn, lines that fit it as well, and the turns that have them now."""

    turn: int
    start: int
    end: int
    holders: frozenset[int]


def ambiguous_turns(
    turns: Sequence[Turn], candidates: Candidates, placement: Placement, *, is_dated: bool
) -> frozenset[int]:
    """The placed turns, by their place in order of `began_at`, that could have other lines.

    `is_dated`: it is certain when each line was read for the first time; else that decides nothing.
    """
    error = _time_error(turns, placement)
    owners = _owners(placement)
    is_torn = _is_torn(turns, candidates, placement, owners)
    told = Counter(chain.from_iterable({*told.keys} for told in candidates.told))
    found = {
        turn
        for turn, match in placement.matches.items()
        if (is_torn or _may_be_gone(turns[turn], turn, placement, candidates))
        and (
            _recurs(turn, candidates, told)
            or match.jumps
            or _is_partly_shown(match, candidates)
            or _begins_late(match, candidates, owners)
        )
    }
    moves = []
    for turn, match in placement.matches.items():
        for other in _alternatives(candidates, turn, match, is_dated=is_dated):
            holders = _owners_in(owners, other) - {turn}
            moves.append(_Move(turn, other.start, other.end, frozenset(holders)))
            if holders and all(abs(turns[each].began_at - turns[turn].began_at) <= error for each in holders):
                swap = holders | {turn}
                if all(
                    any(
                        _owners_in(owners, each) <= swap and not _overlap(each, other)
                        for each in _alternatives(candidates, holder, placement.matches[holder], is_dated=is_dated)
                    )
                    for holder in holders
                ):
                    found |= swap
    return frozenset(_spread(found, moves, turns, placement, len(candidates.spine.lines)))


def _may_be_gone(turn: Turn, number: int, placement: Placement, candidates: Candidates) -> bool:
    """Whether a turn was deleted, and the lines that it has, still shown, may be those of another."""
    match = placement.matches[number]
    return turn.is_deleted and any(line.in_history for line in candidates.spine.lines[match.start : match.end])


def _is_torn(turns: Sequence[Turn], candidates: Candidates, placement: Placement, owners: Mapping[int, int]) -> bool:
    """Whether turns were deleted and lines vanished that are not theirs: equal ones may have been taken for them."""
    if not any(turn.is_deleted and turn.messages for turn in turns):
        return False
    vanished = (index for index, line in enumerate(candidates.spine.lines) if line.in_history is False)
    return any(index not in owners or not turns[owners[index]].is_deleted for index in vanished)


def _is_partly_shown(match: Match, candidates: Candidates) -> bool:
    return len({line.in_history for line in candidates.spine.lines[match.start : match.end]}) > 1


def _begins_late(match: Match, candidates: Candidates, owners: Mapping[int, int]) -> bool:
    """Whether the user says something right before it that no turn has."""
    before = match.start - 1
    return before >= 0 and candidates.spine.is_user(before) and before not in owners


def _recurs(turn: int, candidates: Candidates, told: Mapping[Key, int]) -> bool:
    """Whether what a turn says first occurs more than once."""
    key = candidates.told[turn].keys[0]
    return len(candidates.spine.places.get(key, ())) > 1 or told[key] > 1


def _spread(
    found: set[int], moves: Sequence[_Move], turns: Sequence[Turn], placement: Placement, lines: int
) -> set[int]:
    """Add the turns that could go where nothing stands, or only turns that could go elsewhere themselves."""
    deleted = {turn for turn, each in enumerate(turns) if each.is_deleted}
    for _ in range(_PASSES if moves else 0):
        certain = Placement(placement.matches, placement.in_order - found - deleted)
        bounds = certain.bounds(turns, lines, 2 * SKEW)
        more = set()
        for move in moves:
            low, high = bounds[move.turn] if move.turn in placement.in_order else (0, lines)
            if move.turn not in found and move.holders <= found and low <= move.start and move.end <= high:
                more.add(move.turn)
        if not more:
            break
        found = found | more
    return found


def _time_error(turns: Sequence[Turn], placement: Placement) -> timedelta:
    """Two times that differ by no more than this may be in the wrong order.

    Each may be wrong by `SKEW`; more where the times of the turns contradict the order of their lines by more.
    """
    error, latest = timedelta(), None
    for turn, _ in sorted(placement.matches.items(), key=lambda placing: placing[1].start):
        began_at = turns[turn].began_at
        if latest is None or began_at > latest:
            latest = began_at
        error = max(error, latest - began_at)
    return max(error, 2 * SKEW)


def _owners(placement: Placement) -> dict[int, int]:
    return {line: turn for turn, match in placement.matches.items() for line in range(match.start, match.end)}


def _alternatives(candidates: Candidates, turn: int, match: Match, *, is_dated: bool) -> Iterator[Match]:
    """Other lines that fit the turn as well as those of its match."""
    known = candidates.full(turn) if match.is_full else candidates.partial(turn)
    is_timely = is_dated and candidates.untimely(turn, match.start) <= SKEW
    for other in known:
        if other.start == match.start or len(other.pairs) != len(match.pairs):
            continue
        if other.jumps > match.jumps or other.is_exact < match.is_exact:
            continue
        if not is_timely or candidates.untimely(turn, other.start) <= SKEW:
            yield other


def _owners_in(owners: Mapping[int, int], match: Match) -> set[int]:
    return {owners[line] for line in range(match.start, match.end) if line in owners}


def _overlap(one: Match, other: Match) -> bool:
    return one.start < other.end and other.start < one.end
