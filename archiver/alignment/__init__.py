"""One transcript out of what webhooks told and what history answers showed: a pure function of the known turns and
the sequence of the known readings, so that the order in which they arrived cannot matter (I5, I6).

Readings that a later one holds as a whole are left out; `merge_history` keeps a spine of all lines that the others
showed; `merge_turns` lets the turns claim theirs.
"""

from collections.abc import Iterable

from archiver.alignment.history import merge_history
from archiver.alignment.parts import date, whole
from archiver.alignment.shapes import Line, Reading, Turn
from archiver.alignment.turns import merge_turns

__all__ = ["Line", "Reading", "Turn", "merge_history", "merge_turns", "transcript"]


def transcript(turns: Iterable[Turn], readings: Iterable[Reading]) -> list[Line]:
    """What a session said, in order.

    `turns`, of different chats, come in any order. `readings` are taken in order of `read_at`; those of one instant
    in the order given.
    """
    known = list(turns)
    gone = {_said(turn) for turn in known if turn.is_deleted and len(turn.messages) > turn.inputs} - {()}
    # Of runs that overlap the last one counts, so their order must not be chance.
    deleted = sorted(gone, key=lambda run: (len(run), run))
    spine: list[Line] = []
    read_at = None
    for reading, first_read_at in whole(sorted(readings, key=lambda reading: reading.read_at)):
        spine = date(merge_history(spine, reading, deleted), first_read_at)
        read_at = reading.read_at
    return merge_turns(spine, known, read_at)


def _said(turn: Turn) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in turn.messages if message.content.strip())
