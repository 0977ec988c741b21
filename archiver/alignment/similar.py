"""Turns that history words differently: found where nothing else is left for them.

Between two turns that are placed, a turn without lines and lines without a turn belong together where the texts are
alike (`wording.are_alike`), no other turn there is alike to these lines, and no other lines there to this turn.

An input that was cut at a low limit (`wording.is_short_cut`) is recognised where one turn and one stretch of lines
are left between two placed turns, their answers are equal, and no input on the side that was cut is longer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from archiver.alignment.candidates import Candidates, Match, Told
from archiver.alignment.placement import Placement
from archiver.alignment.shapes import USER, Turn
from archiver.alignment.wording import are_alike, is_short_cut

_MOST = 8  # turns or stretches of lines between two placed turns; more are not compared


def similar(turns: Sequence[Turn], candidates: Candidates, placement: Placement) -> dict[int, Match]:
    """Matches of turns without lines that were not deleted, each the only one of its lines and they of it."""
    found: dict[int, Match] = {}
    for unplaced, first, last in _gaps(turns, candidates, placement):
        is_between = first > 0 and last < len(candidates.spine.lines)
        starts = _starts(candidates, first, last)
        if not 0 < len(starts) <= _MOST:
            continue
        if len(unplaced) == len(starts) == 1 and is_between:
            match = _match(candidates, unplaced[0], starts[0], last) or _cut_match(
                candidates, unplaced[0], starts[0], last
            )
            found |= {unplaced[0]: match} if match else {}
            continue
        fitting: dict[int, list[Match]] = {
            turn: [match for start in starts if (match := _match(candidates, turn, start, last))] for turn in unplaced
        }
        counts: defaultdict[int, int] = defaultdict(int)
        for matches in fitting.values():
            for match in matches:
                counts[match.start] += 1
        found |= {
            turn: matches[0]
            for turn, matches in fitting.items()
            if len(matches) == 1 and counts[matches[0].start] == 1
        }
    return found


def _gaps(
    turns: Sequence[Turn], candidates: Candidates, placement: Placement
) -> Iterator[tuple[list[int], int, int]]:
    """Turns without lines between two that are placed in order, and the lines between those two."""
    end, unplaced = 0, list[int]()
    for turn in range(len(turns) + 1):
        if turn in placement.in_order or turn == len(turns):
            start = placement.matches[turn].start if turn < len(turns) else len(candidates.spine.lines)
            if 0 < len(unplaced) <= _MOST and end < start:
                yield unplaced, end, start
            if turn < len(turns):
                end, unplaced = max(end, placement.matches[turn].end), []
        elif turn not in placement.matches and not turns[turn].is_deleted:
            unplaced.append(turn)


def _starts(candidates: Candidates, first: int, last: int) -> list[int]:
    """Where a turn could begin: at the user's first line after another's."""
    spine = candidates.spine
    return [
        line
        for line in range(first, last)
        if spine.is_user(line) and not spine.taken[line] and (line == first or not spine.is_user(line - 1))
    ][: _MOST + 1]


def _inputs(candidates: Candidates, turn: int, start: int, last: int) -> tuple[list[int], list[int]] | None:
    """The inputs of the turn and as many lines of the user from `start` on; None if it cannot begin there."""
    told = candidates.told[turn]
    inputs = [message for message in sorted(told.required) if message < told.inputs]
    lines = [*_inputs_from(candidates, start, last)]
    if not inputs or len(inputs) != len(lines) or not candidates.could_show(turn, start):
        return None
    return inputs, lines


def _match(candidates: Candidates, turn: int, start: int, last: int) -> Match | None:
    told, spine = candidates.told[turn], candidates.spine
    inputs, lines = _inputs(candidates, turn, start, last) or ([], [])
    if not inputs:
        return None
    if not all(_is_same(told, message, spine.keys[line]) for message, line in zip(inputs, lines, strict=True)):
        return None
    outputs = [pair for pair in told.outputs_from(lines[-1] + 1) if pair[1] < last]
    is_answered = any(spine.keys[line] is not None for line in range(lines[-1] + 1, last) if not spine.is_user(line))
    if told.has_output and is_answered and not outputs and not _is_certain(told, inputs, lines, candidates):
        return None
    return spine.match(told, [*zip(inputs, lines, strict=True), *outputs], is_full=False)


def _cut_match(candidates: Candidates, turn: int, start: int, last: int) -> Match | None:
    """The match of a turn of one input that one side has cut at a low limit, and whose answers are equal."""
    told, spine = candidates.told[turn], candidates.spine
    inputs, lines = _inputs(candidates, turn, start, last) or ([], [])
    if len(inputs) != 1 or not told.has_output:
        return None
    said, shown = told.keys[inputs[0]][1], (spine.keys[lines[0]] or ("", ""))[1]
    if is_short_cut(shown, said):
        longest = max(len(key[1]) for key in spine.keys if key and key[0] == USER)
    elif is_short_cut(said, shown):
        longest = max(len(key[1]) for each in candidates.told for key in each.keys if key[0] == USER)
    else:
        return None
    outputs = [*range(told.inputs, len(told.keys))]
    pairs = spine.walk(told, outputs, lines[0] + 1, 1) or []
    if longest > min(len(said), len(shown)) or not pairs or pairs[-1][1] >= last:
        return None
    return spine.match(told, [(inputs[0], lines[0]), *pairs], is_full=False)


def _inputs_from(candidates: Candidates, start: int, last: int) -> Iterator[int]:
    spine = candidates.spine
    for line in range(start, last):
        if spine.is_user(line):
            yield line
        elif not spine.is_aside(line):
            return


def _is_same(told: Told, message: int, line: tuple[str, str] | None) -> bool:
    role, content = told.keys[message]
    return line is not None and line[0] == role and are_alike(content, line[1])


_CERTAIN = 40  # characters of an input that say enough, whatever was answered


def _is_certain(told: Told, inputs: Sequence[int], lines: Sequence[int], candidates: Candidates) -> bool:
    keys = [candidates.spine.keys[line] for line in lines]
    return all(
        key is not None and min(len(told.keys[message][1]), len(key[1])) >= _CERTAIN
        for message, key in zip(inputs, keys, strict=True)
    )
