"""The merged history: every line that any reading showed, in order, and whether the latest reading shows it."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise

import msgspec

from archiver.archive.transcript.division import same_runs
from archiver.archive.transcript.shapes import USER, HistoryMessages, TranscriptLine
from archiver.archive.transcript.subsequence import Pair, align, common_subsequence
from archiver.archive.transcript.wording import Key, text_key
from archiver.events import Message

Run = tuple[Key, ...]  # all messages of one turn
Item = tuple[Key, object]  # a line and its context


def merge_history(
    lines: Sequence[TranscriptLine], reading: HistoryMessages, deleted: Collection[Run] = ()
) -> list[TranscriptLine]:
    """Merge a later reading into the merged history `lines`, none of which is claimed by a turn.

    Lines are the same if role and content are equal except for differences in writing (`wording.text_key`) and,
    unless they are the user's, the preceding user messages are equal too. Lines of a turn in `deleted` are the same
    only if the whole turn is there, because a partial match belongs to another turn.
    Lines that the reading does not show stay in place with `in_history=False` (I7); new ones are inserted in their
    place, after the old lines of the same gap. Old lines with the texts of new ones in another division are replaced
    (`division`). So the lines with `in_history=True` are the reading, in order.
    """
    old = [text_key(line.role, line.content) for line in lines]
    new = [text_key(message.role, message.content) for message in reading.messages]
    merged: list[TranscriptLine] = []
    for (old_before, new_before), (at_old, at_new) in pairwise(
        [(-1, -1), *_align(lines, old, new, deleted), (len(old), len(new))]
    ):
        gap = lines[old_before + 1 : at_old]
        merged += _between(gap, reading.messages[new_before + 1 : at_new], reading, is_end=at_old == len(old))
        merged += [
            _shown_again(line, message, reading.read_at)
            for line, message in zip(lines[at_old : at_old + 1], reading.messages[at_new : at_new + 1], strict=True)
        ]
    return merged


def _between(
    lines: Sequence[TranscriptLine], messages: Sequence[Message], reading: HistoryMessages, *, is_end: bool
) -> Iterator[TranscriptLine]:
    """Yield the lines between two that the reading shows again."""
    old_at = new_at = 0
    for run in same_runs(lines, messages, is_end=is_end):
        yield from map(_not_shown, lines[old_at : run.old.start])
        yield from (_line(message, reading) for message in messages[new_at : run.new.start])
        first_read_at = [line.first_read_at for line in lines[run.old.start : run.old.stop] if line.first_read_at]
        for message in messages[run.new.start : run.new.stop]:
            line = _line(message, reading)
            is_dated = run.is_whole and first_read_at
            yield msgspec.structs.replace(line, first_read_at=max(first_read_at)) if is_dated else line
        old_at, new_at = run.old.stop, run.new.stop
    yield from map(_not_shown, lines[old_at:])
    yield from (_line(message, reading) for message in messages[new_at:])


def _shown_again(line: TranscriptLine, message: Message, read_at: datetime) -> TranscriptLine:
    return msgspec.structs.replace(
        line, role=message.role, content=message.content, kind=message.kind, in_history=True, last_read_at=read_at
    )


def _line(message: Message, reading: HistoryMessages) -> TranscriptLine:
    first_read_at = reading.first_read_at or reading.read_at
    return TranscriptLine(
        *(message.role, message.content, "history", None, True, first_read_at, reading.read_at), kind=message.kind
    )


def _not_shown(line: TranscriptLine) -> TranscriptLine:
    return msgspec.structs.replace(line, in_history=False) if line.in_history else line


def _align(
    lines: Sequence[TranscriptLine], old: Sequence[Key], new: Sequence[Key], deleted: Collection[Run]
) -> list[Pair]:
    # An identical response changes nothing, even if it could be aligned in other ways.
    shown = [index for index, line in enumerate(lines) if line.in_history]
    if [old[index] for index in shown] == new:
        return [*zip(shown, range(len(new)), strict=True)]
    in_old, in_new = _runs(old, deleted), _runs(new, deleted)
    answers = _in_context(old, in_old, in_new)
    pairs = _keep_turns_whole(answers, align(answers, _in_context(new, in_new, in_old)))
    return [*_with_loose_ends(old, new, pairs)]


def _runs(keys: Sequence[Key], deleted: Collection[Run]) -> dict[Run, list[int]]:
    """Return the index of the first line of each occurrence of each deleted turn; the rarest text is looked up."""
    places: defaultdict[Key, list[int]] = defaultdict(list)
    for place, key in enumerate(keys if deleted else ()):
        places[key].append(place)
    runs = {}
    for run in deleted:
        _, offset = min((len(places.get(key, ())), offset) for offset, key in enumerate(run))
        starts = [place - offset for place in places.get(run[offset], ()) if place >= offset]
        runs[run] = [start for start in starts if tuple(keys[start : start + len(run)]) == run]
    return runs


def _in_context(
    keys: Sequence[Key], runs: Mapping[Run, Sequence[int]], others: Mapping[Run, Sequence[int]]
) -> list[Item]:
    """Tag each line with the preceding user message: an equal answer to another question is another message.

    A line of `runs` is tagged with its run instead, even if the end of the run is cut off, provided that the other
    sequence contains it whole (`others`).
    """
    question = None
    items: list[Item] = []
    for role, content in keys:
        if role == USER:
            question = content
        items.append(((role, content), None if role == USER else question))
    for run, starts in runs.items():
        for start in starts:
            items[start : start + len(run)] = [(key, (run, offset)) for offset, key in enumerate(run)]
        for length in range(1, len(run) if others[run] else 0):
            if tuple(keys[-length:]) == run[:length]:
                items[-length:] = [(key, (run, offset)) for offset, key in enumerate(run[:length])]
    return items


def _keep_turns_whole(old: Sequence[Item], pairs: list[Pair]) -> list[Pair]:
    """Return the alignment, shifted if equal texts allow it, so that a vanished part begins with a user line.

    Of `ok A | ok B`, the reading `ok B` shows the second turn, not the first line and the last.
    """
    partners = dict(pairs)
    for (before, _), (after, _) in pairwise([*pairs, (len(old), 0)]):
        gap = range(before + 1, after)
        for shift in range(len(gap)):
            if old[gap.start - shift][0][0] == USER:
                for moved in range(1, shift + 1):
                    partners[gap.stop - moved] = partners.pop(gap.start - moved)
                break
            upper, lower = gap.start - shift - 1, gap.stop - shift - 1
            if upper not in partners or old[upper] != old[lower]:
                break
    return sorted(partners.items())


def _with_loose_ends(old: Sequence[Key], new: Sequence[Key], pairs: list[Pair]) -> Iterator[Pair]:
    """Yield the pairs, and pairs of lines before the first user line of a cut reading, whose question is unknown."""
    for (old_before, new_before), (at_old, at_new) in pairwise([(-1, -1), *pairs, (len(old), len(new))]):
        in_old, in_new = range(old_before + 1, at_old), range(new_before + 1, at_new)
        if in_old and in_new:
            loose = _from_end(old, new, in_old, _loose(new, in_new)) or _from_end(
                old, new, _loose(old, in_old), in_new
            )
            yield from loose
        if at_old < len(old):
            yield at_old, at_new


def _loose(keys: Sequence[Key], gap: range) -> range:
    return range(gap.start, next((index for index in gap if keys[index][0] == USER), gap.stop))


def _from_end(old: Sequence[Key], new: Sequence[Key], in_old: range, in_new: range) -> list[Pair]:
    """Align two stretches from their end, because a part that was cut off ends where the rest begins."""
    pairs = common_subsequence([old[index] for index in reversed(in_old)], [new[index] for index in reversed(in_new)])
    return [(in_old[-1 - from_old], in_new[-1 - from_new]) for from_old, from_new in reversed(pairs)]
