"""Find messages that one reading joins or splits, but another does not, between lines that both show.

A block consists of the user's messages between two answers, and of the answers up to the next user message. Blocks of
two readings that have the same texts are the same messages, however they are divided. The last blocks of the earlier
reading may also be the beginning, up to a line end, of blocks of the later one.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from archiver.archive.transcript.shapes import USER, TranscriptLine
from archiver.archive.transcript.wording import fragments_of, text_key
from archiver.events import Message

_MAX_BLOCKS = 32  # between two lines that both readings show; more are not compared

Lines = Sequence[TranscriptLine | Message]
Texts = dict[str, list[str]]  # by role


class SameRun(NamedTuple):
    """Lines of the earlier reading, and the lines of the later one that contain their texts.

    `is_whole`: the lines of the later reading contain nothing else.
    """

    old: range
    new: range
    is_whole: bool


def same_runs(old_lines: Lines, new_lines: Lines, *, is_end: bool) -> Iterator[SameRun]:
    """Yield the runs with the same texts in another division, in order.

    `is_end`: the earlier reading shows nothing after its lines.
    """
    if not old_lines or not new_lines:
        return
    old, new = _Side(old_lines), _Side(new_lines)
    if max(old.size, new.size) > _MAX_BLOCKS:
        return
    at_old = at_new = 0
    while at_old < old.size:
        found = _first_run(old, new, at_old, at_new, is_end=is_end)
        if found is None:
            at_old += 1
            continue
        begin, to_old, to_new, is_whole = found
        yield SameRun(old.run(at_old, to_old), new.run(begin, to_new), is_whole)
        at_old, at_new = to_old, to_new


class _Side:
    """The lines of one reading, divided into numbered blocks."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._keys = [text_key(line.role, line.content) for line in lines]
        is_user = [role == USER for role, _ in self._keys]
        starts = [line for line in range(1, len(lines)) if is_user[line] and not is_user[line - 1]]
        self._bounds = [0, *starts, len(lines)]
        self.size = len(starts) + 1
        letters = [len(content.replace(" ", "")) for _, content in self._keys]
        counts = [sum(letters[start:stop]) for start, stop in pairwise(self._bounds)]
        self.letters = [*accumulate(counts, initial=0)]  # before each block

    def run(self, begin: int, end: int) -> range:
        return range(self._bounds[begin], self._bounds[end])

    def texts(self, begin: int, end: int) -> Texts:
        """Return the normalised texts of some blocks by role."""
        result: Texts = {}
        for line in self.run(begin, end):
            role, content = self._keys[line]
            if content:
                result.setdefault(role, []).append(content)
        return result

    def fragments(self, begin: int, end: int) -> Texts:
        """Return the normalised texts between line ends by role."""
        result: Texts = {}
        for line in (self._lines[line] for line in self.run(begin, end)):
            for text in fragments_of(line.content):
                role, content = text_key(line.role, text)
                result.setdefault(role, []).append(content)
        return result


def _first_run(
    old: _Side, new: _Side, at_old: int, at_new: int, *, is_end: bool
) -> tuple[int, int, int, bool] | None:
    """Return the run that begins with the earlier block `at_old`; None if there is none.

    The result is its first later block, the ends of its earlier and later blocks, and whether it is whole.
    """
    for begin in range(at_new, new.size):
        ends = _equal_ends(old, new, at_old, begin)
        if ends is not None:
            return begin, *ends, True
        end = _end_of_beginning(old, new, at_old, begin) if is_end else None
        if end is not None:
            return begin, old.size, end, False
    return None


def _equal_ends(old: _Side, new: _Side, at_old: int, at_new: int) -> tuple[int, int] | None:
    """Return the ends of two runs that begin here, have the same texts and divide them differently, if any."""
    to_old, to_new = at_old + 1, at_new + 1
    while to_old <= old.size and to_new <= new.size:
        more = (old.letters[to_old] - old.letters[at_old]) - (new.letters[to_new] - new.letters[at_new])
        if not more:
            is_same = _is_same(old.texts(at_old, to_old), new.texts(at_new, to_new))
            return (to_old, to_new) if is_same else None
        to_old, to_new = to_old + (more < 0), to_new + (more > 0)
    return None


def _is_same(one: Texts, other: Texts) -> bool:
    if one == other or one.keys() != other.keys():
        return False
    return all(any(joint.join(one[role]) == joint.join(other[role]) for joint in (" ", "")) for role in one)


def _end_of_beginning(old: _Side, new: _Side, at_old: int, at_new: int) -> int | None:
    """Return the end of the later blocks of which all earlier blocks from `at_old` on are the beginning.

    The beginning ends at a line end. None if there are no such blocks, or if both are divided alike.
    """
    whole = old.fragments(at_old, old.size)
    for end in range(at_new + 1, new.size + 1):
        found = new.fragments(at_new, end)
        if USER not in whole or (not _begins(found, whole) and not _begins(whole, found)):
            return None
        if _begins(found, whole):
            is_divided_alike = _begins(new.texts(at_new, end), old.texts(at_old, old.size))
            return None if is_divided_alike else end
    return None


def _begins(texts: Texts, beginning: Texts) -> bool:
    return all(texts.get(role, [])[: len(each)] == each for role, each in beginning.items())
