"""Turns that arrived after the latest reading began: they are appended as they are, without an alignment.

A turn belongs to them if it begins after all others that have arrived before. The reading cannot show them, unless
upstream's clock or a delivery was late: then the lines that show them are still unclaimed, and everything is aligned
together.
"""

from collections.abc import Container, Iterable, Sequence
from datetime import datetime

from archiver.alignment.shapes import USER, Line, Turn
from archiver.alignment.wording import normal_role
from archiver.events import Message
from archiver.events.normal import normal_text


def split(ordered: Sequence[Turn], read_at: datetime | None) -> int:
    """The number of turns, given in order of their beginning, that are to be aligned; those after them are newer."""
    count = len(ordered)
    while count and _is_newer(ordered[count - 1], read_at):
        count -= 1
    return count


def _is_newer(turn: Turn, read_at: datetime | None) -> bool:
    return read_at is None or (turn.arrived_at is not None and turn.arrived_at > read_at)


def has_open_end(lines: Iterable[Line]) -> bool:
    """Whether a turn that no webhook has told stands at the end: a late delivery may be about it."""
    is_open = False
    for line in lines:
        is_open = line.chat_id is None and (is_open or normal_role(line.role) == USER)
    return is_open


def unclaimed(lines: Iterable[Line]) -> set[str]:
    """The normalised texts that only history tells."""
    return {normal_text(line.content) for line in lines if line.source == "history"}


def may_claim(messages: Iterable[Message], texts: Container[str]) -> bool:
    """Whether any of these messages may be one of the unclaimed `texts`, whatever their roles are called."""
    return any(message.content.strip() and normal_text(message.content) in texts for message in messages)
