"""Match turns with lines that the history words differently, if no other turn fits these lines.

Between two turns that are placed, a turn without lines and lines without a turn belong together if their texts are
similar (`wording.are_similar`), and no other turn there fits these lines, and no other lines there fit this turn.

An input that was cut at a low limit (`wording.is_short_cut`) is recognised if one turn and one stretch of lines
remain between two placed turns, their answers are equal, and no input on the side that was cut is longer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from archiver.archive.transcript.candidates import Candidates, Match, TurnText
from archiver.archive.transcript.placement import Placement
from archiver.archive.transcript.shapes import USER, TurnMessages
from archiver.archive.transcript.wording import are_similar, is_short_cut

_MAX_LINES = 8  # turns or stretches of lines between two placed turns; more are not compared


def similar(turns: Sequence[TurnMessages], candidates: Candidates, placement: Placement) -> dict[int, Match]:
    """Return matches, unambiguous in both directions, of turns that have no lines and are not deleted."""
    values: dict[int, Match] = {}
    for without_match, first, last in _gaps(turns, candidates, placement):
        is_between = first > 0 and last < len(candidates.merged.lines)
        starts = _starts(candidates, first, last)
        if not 0 < len(starts) <= _MAX_LINES:
            continue
        if len(without_match) == len(starts) == 1 and is_between:
            match = _match(candidates, without_match[0], starts[0], last) or _cut_match(
                candidates, without_match[0], starts[0], last
            )
            values |= {without_match[0]: match} if match else {}
            continue
        fitting: dict[int, list[Match]] = {
            turn: [match for start in starts if (match := _match(candidates, turn, start, last))]
            for turn in without_match
        }
        counts: defaultdict[int, int] = defaultdict(int)
        for matches in fitting.values():
            for match in matches:
                counts[match.start] += 1
        values |= {
            turn: matches[0]
            for turn, matches in fitting.items()
            if len(matches) == 1 and counts[matches[0].start] == 1
        }
    return values


def _gaps(
    turns: Sequence[TurnMessages], candidates: Candidates, placement: Placement
) -> Iterator[tuple[list[int], int, int]]:
    """Yield the turns without lines between two turns placed in order, and the lines between those two."""
    end, without_match = 0, list[int]()
    for turn in range(len(turns) + 1):
        if turn in placement.in_order or turn == len(turns):
            start = placement.matches[turn].start if turn < len(turns) else len(candidates.merged.lines)
            if 0 < len(without_match) <= _MAX_LINES and end < start:
                yield without_match, end, start
            if turn < len(turns):
                end, without_match = max(end, placement.matches[turn].end), []
        elif turn not in placement.matches and not turns[turn].is_deleted:
            without_match.append(turn)


def _starts(candidates: Candidates, first: int, last: int) -> list[int]:
    """Return where a turn could begin: at each unclaimed user line that does not follow another user line."""
    merged = candidates.merged
    return [
        line
        for line in range(first, last)
        if merged.is_user(line) and not merged.taken[line] and (line == first or not merged.is_user(line - 1))
    ][: _MAX_LINES + 1]


def _inputs(candidates: Candidates, turn: int, start: int, last: int) -> tuple[list[int], list[int]] | None:
    """Return the inputs of the turn and as many user lines from `start` on; None if it cannot begin there."""
    turn_text = candidates.turn_texts[turn]
    inputs = [message for message in sorted(turn_text.required) if message < turn_text.inputs]
    lines = [*_inputs_from(candidates, start, last)]
    if not inputs or len(inputs) != len(lines) or not candidates.could_show(turn, start):
        return None
    return inputs, lines


def _match(candidates: Candidates, turn: int, start: int, last: int) -> Match | None:
    turn_text, merged = candidates.turn_texts[turn], candidates.merged
    inputs, lines = _inputs(candidates, turn, start, last) or ([], [])
    if not inputs:
        return None
    if not all(_is_same(turn_text, message, merged.keys[line]) for message, line in zip(inputs, lines, strict=True)):
        return None
    outputs = [pair for pair in turn_text.outputs_from(lines[-1] + 1) if pair[1] < last]
    is_answered = any(
        merged.keys[line] is not None for line in range(lines[-1] + 1, last) if not merged.is_user(line)
    )
    if turn_text.has_output and is_answered and not outputs and not _is_certain(turn_text, inputs, lines, candidates):
        return None
    return merged.match(turn_text, [*zip(inputs, lines, strict=True), *outputs], is_full=False)


def _cut_match(candidates: Candidates, turn: int, start: int, last: int) -> Match | None:
    """Match a turn with a single input that the history or the webhook truncates, if the answers are equal."""
    turn_text, merged = candidates.turn_texts[turn], candidates.merged
    inputs, lines = _inputs(candidates, turn, start, last) or ([], [])
    if len(inputs) != 1 or not turn_text.has_output:
        return None
    turn_content, history_content = turn_text.keys[inputs[0]][1], (merged.keys[lines[0]] or ("", ""))[1]
    if is_short_cut(history_content, turn_content):
        longest = max(len(key[1]) for key in merged.keys if key and key[0] == USER)
    elif is_short_cut(turn_content, history_content):
        longest = max(len(key[1]) for each in candidates.turn_texts for key in each.keys if key[0] == USER)
    else:
        return None
    outputs = [*range(turn_text.inputs, len(turn_text.keys))]
    pairs = merged.walk(turn_text, outputs, lines[0] + 1, 1) or []
    if longest > min(len(turn_content), len(history_content)) or not pairs or pairs[-1][1] >= last:
        return None
    return merged.match(turn_text, [(inputs[0], lines[0]), *pairs], is_full=False)


def _inputs_from(candidates: Candidates, start: int, last: int) -> Iterator[int]:
    merged = candidates.merged
    for line in range(start, last):
        if merged.is_user(line):
            yield line
        elif not merged.is_aside(line):
            return


def _is_same(turn_text: TurnText, message: int, line: tuple[str, str] | None) -> bool:
    role, content = turn_text.keys[message]
    return line is not None and line[0] == role and are_similar(content, line[1])


_MIN_CERTAIN_LENGTH = 40  # characters of an input that suffice as evidence without the answer


def _is_certain(turn_text: TurnText, inputs: Sequence[int], lines: Sequence[int], candidates: Candidates) -> bool:
    keys = [candidates.merged.keys[line] for line in lines]
    return all(
        key is not None and min(len(turn_text.keys[message][1]), len(key[1])) >= _MIN_CERTAIN_LENGTH
        for message, key in zip(inputs, keys, strict=True)
    )
