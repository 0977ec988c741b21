"""Find turns whose lines cannot be determined from the evidence.

A turn is ambiguous if other lines fit it as well as its own lines:

- as many of its messages are found there, none written less similarly, and only asides are skipped, which webhooks
  often do not report; it does not matter whether more answers follow, since a webhook may be sent before they exist;
- no turn has claimed these lines, because their own webhook was lost, or only ambiguous turns have;
- the readings that showed them agree with the time of the turn, within `SKEW`;
- the order of the turns allows it; turns whose times differ by at most twice `SKEW` may have either order.

Turns that fit each other's lines are ambiguous if their times differ by at most twice `SKEW`, or by no more than the
largest known error of times in this session; otherwise their times decide.

After deletions, turns are also ambiguous that skip an answer, are partly shown, follow a user line that no turn has,
or begin with a text that occurs more than once: a deleted turn if its lines are still shown, because these may be
another turn's, and every turn if lines vanished that no deleted turn has.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

from archiver.archive.transcript.candidates import SKEW, Candidates, Match
from archiver.archive.transcript.placement import Placement
from archiver.archive.transcript.shapes import TurnMessages
from archiver.archive.transcript.wording import Key

_PASSES = 16  # turns that move one after the other, each to the place of the next


class _Move(NamedTuple):
    """A turn, other lines that fit it equally well, and the turns that hold those lines."""

    turn: int
    start: int
    end: int
    holders: frozenset[int]


def ambiguous_turns(
    turns: Sequence[TurnMessages], candidates: Candidates, placement: Placement, *, is_dated: bool
) -> frozenset[int]:
    """Return the placed turns (by index in order of `began_at`) that could have other lines.

    `is_dated`: it is certain when each line was read for the first time; otherwise these times are ignored.
    """
    error = _time_error(turns, placement)
    owners = _owners(placement)
    has_mixed_deletions = _has_mixed_deletions(turns, candidates, placement, owners)
    text_counts = Counter(chain.from_iterable({*text_counts.keys} for text_counts in candidates.turn_texts))
    values = {
        turn
        for turn, match in placement.matches.items()
        if (has_mixed_deletions or _may_be_deleted(turns[turn], turn, placement, candidates))
        and (
            _repeats(turn, candidates, text_counts)
            or match.jumps
            or _is_partly_shown(match, candidates)
            or _follows_unclaimed_question(match, candidates, owners)
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
                    values |= swap
    return frozenset(_spread(values, moves, turns, placement, len(candidates.merged.lines)))


def _may_be_deleted(turn: TurnMessages, number: int, placement: Placement, candidates: Candidates) -> bool:
    """Return whether the turn is deleted but its lines are still shown, so that they may be another turn's."""
    match = placement.matches[number]
    return turn.is_deleted and any(line.in_history for line in candidates.merged.lines[match.start : match.end])


def _has_mixed_deletions(
    turns: Sequence[TurnMessages], candidates: Candidates, placement: Placement, owners: Mapping[int, int]
) -> bool:
    """Return whether deleted turns and vanished lines do not match, so that equal lines may be confused."""
    if not any(turn.is_deleted and turn.messages for turn in turns):
        return False
    vanished = (index for index, line in enumerate(candidates.merged.lines) if line.in_history is False)
    return any(index not in owners or not turns[owners[index]].is_deleted for index in vanished)


def _is_partly_shown(match: Match, candidates: Candidates) -> bool:
    return len({line.in_history for line in candidates.merged.lines[match.start : match.end]}) > 1


def _follows_unclaimed_question(match: Match, candidates: Candidates, owners: Mapping[int, int]) -> bool:
    """Return whether a user line without a turn directly precedes the match."""
    before = match.start - 1
    return before >= 0 and candidates.merged.is_user(before) and before not in owners


def _repeats(turn: int, candidates: Candidates, counts: Mapping[Key, int]) -> bool:
    """Return whether the first text of a turn occurs more than once."""
    key = candidates.turn_texts[turn].keys[0]
    return len(candidates.merged.places.get(key, ())) > 1 or counts[key] > 1


def _spread(
    found: set[int], moves: Sequence[_Move], turns: Sequence[TurnMessages], placement: Placement, lines: int
) -> set[int]:
    """Return `found` and the turns that could move to free lines, or to lines of turns that could move themselves."""
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


def _time_error(turns: Sequence[TurnMessages], placement: Placement) -> timedelta:
    """Return by how much two times may differ and still be in the wrong order.

    Each time may be wrong by `SKEW`; by more if the times of the turns contradict the order of their lines by more.
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
    """Yield other lines that fit the turn as well as those of its match."""
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
