"""One transcript out of what webhooks told and what history answers showed: a pure function of the known turns and
the sequence of the known readings, so that the order in which they arrived cannot matter (I5, I6).

Readings that a later one holds as a whole are left out; `merge_history` keeps a spine of all lines that the others
showed; `merge_turns` lets the turns claim theirs; turns newer than the latest reading are appended (`newer`).
"""

from collections.abc import Iterable
from datetime import datetime

import msgspec

from archiver.alignment import newer, wording
from archiver.alignment.context import restore_unproven, without_repeats
from archiver.alignment.history import merge_history
from archiver.alignment.newer import may_claim
from archiver.alignment.parts import date, whole
from archiver.alignment.shapes import Line, Reading, Turn
from archiver.alignment.turns import in_order, merge_turns, whole_turn

__all__ = [
    "Line",
    "Reading",
    "Transcript",
    "Turn",
    "compose",
    "may_claim",
    "merge_history",
    "merge_turns",
    "transcript",
    "whole_turn",
]


_TRIALS = 3  # of leaving repeats out; each restores the turns that turned out to repeat nothing


class Transcript(msgspec.Struct, frozen=True):
    """The lines of a session, in order.

    `can_append`: a further turn that arrives after the latest reading, begins after all others, and says nothing that
    only history tells (`may_claim`) is appended to these lines as it is (`whole_turn`), and changes none of them.
    """

    lines: list[Line]
    can_append: bool


def transcript(turns: Iterable[Turn], readings: Iterable[Reading]) -> list[Line]:
    """What a session said, in order: the lines of `compose`."""
    return compose(turns, readings).lines


def compose(turns: Iterable[Turn], readings: Iterable[Reading]) -> Transcript:
    """What a session said, in order, and whether a turn can be appended to it.

    `turns`, of different chats, come in any order. `readings` are taken in order of `read_at`; those of one instant
    in the order given.
    """
    known = list(turns)
    gone = {_said(turn) for turn in known if turn.is_deleted and len(turn.messages) > turn.inputs} - {()}
    # Of runs that overlap the last one counts, so their order must not be chance.
    deleted = sorted(gone, key=lambda run: (len(run), run))
    spine: list[Line] = []
    read_at = None
    found = whole(sorted(readings, key=lambda reading: reading.read_at))
    # Where turns vanished, equal ones that stayed may have been taken for them.
    is_dated = len(found) < 2 or not any(turn.is_deleted and turn.messages for turn in known)  # noqa: PLR2004  # one alone
    for each in found:
        spine = date(merge_history(spine, each.reading, deleted), each.first_read_at)
        read_at = each.reading.read_at
        is_dated = is_dated and not each.is_doubtful
    return _with_turns(spine, known, read_at, is_dated=is_dated)


def _with_turns(spine: list[Line], turns: list[Turn], read_at: datetime | None, *, is_dated: bool) -> Transcript:
    ordered = in_order(turns)
    count = newer.split(ordered, read_at)
    lines = _merge(spine, ordered[:count], read_at, is_dated=is_dated)
    is_open, texts = newer.has_open_end(lines), newer.unclaimed(lines)
    if count < len(ordered):
        if is_open or any(may_claim(turn.messages, texts) for turn in ordered[count:]):
            lines = _merge(spine, ordered, read_at, is_dated=is_dated)
            return Transcript(lines, can_append=False)
        lines = [*lines, *(line for turn in ordered[count:] for line in whole_turn(turn, read_at))]
    return Transcript(lines, can_append=not is_open)


def _merge(spine: list[Line], turns: list[Turn], read_at: datetime | None, *, is_dated: bool) -> list[Line]:
    """Let the turns claim their lines, without their repeats as far as the transcript then shows these."""
    trimmed = without_repeats(turns, spine)
    for _ in range(_TRIALS):
        lines = merge_turns(spine, trimmed, read_at, is_dated=is_dated)
        restored = restore_unproven(turns, trimmed, lines)
        if restored == trimmed:
            return lines
        trimmed = restored
    return merge_turns(spine, turns, read_at, is_dated=is_dated)


def _said(turn: Turn) -> tuple[tuple[str, str], ...]:
    keys = (wording.key_of(message.role, message.content) for message in turn.messages)
    return tuple((role, content) for role, content in keys if content)
