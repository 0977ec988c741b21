"""Select turns that arrived after the latest reading began: they are appended without alignment.

They begin after all turns that had arrived before. The reading cannot show them, unless upstream's clock or a
delivery was late: then the lines that show them are still unclaimed, and all turns are aligned together.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime

from archiver.archive.transcript.candidates import ASIDES, SKEW
from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.wording import fragments_of, normal_role
from archiver.events import Message
from archiver.events.normal import normal_text


def count_aligned(ordered: Sequence[TurnMessages], read_at: datetime | None) -> int:
    """Return how many of the turns, in order of `began_at`, to align; the others are newer than the reading."""
    count = len(ordered)
    while count and _is_newer(ordered[count - 1], read_at):
        count -= 1
    return count


def _is_newer(turn: TurnMessages, read_at: datetime | None) -> bool:
    return read_at is None or (turn.arrived_at is not None and turn.arrived_at > read_at)


def has_open_end(lines: Iterable[TranscriptLine]) -> bool:
    """Return whether the transcript ends with a turn known only from history, which a late delivery may match."""
    is_open = False
    for line in lines:
        is_open = line.chat_id is None and (is_open or normal_role(line.role) == USER)
    return is_open


def unclaimed_texts(lines: Iterable[TranscriptLine]) -> set[str]:
    """Return the normalised texts of lines known only from history (`texts_of`)."""
    return {text for line in lines if line.source == "history" for text in texts_of(line.content)}


def texts_of(content: str) -> Iterator[str]:
    """Yield the normalised text of a message and, because a history may join messages, of each of several lines."""
    yield normal_text(content)
    if "\n" in content:
        yield from map(normal_text, fragments_of(content))


def may_claim(turn: TurnMessages, texts: Collection[str], read_at: datetime | None) -> bool:
    """Return whether the turn may match lines with some of the unclaimed `texts`, regardless of role names.

    A part of one message suffices if the reading, at `read_at`, could show the turn. Otherwise a turn matches only as
    a whole, with an answer (`candidates.Candidates.could_show`).
    """
    filled = [(index, each) for index, each in enumerate(turn.messages) if each.content.strip()]
    if not texts or not filled:
        return False
    if read_at is None or turn.began_at <= read_at + SKEW:
        return any(_is_among(each, texts) for _, each in filled)
    said = [(index, each) for index, each in filled if normal_role(each.role) not in ASIDES]
    has_answer = any(index >= turn.inputs for index, _ in filled)
    return has_answer and all(_is_among(each, texts) for _, each in said or filled)


def _is_among(message: Message, texts: Collection[str]) -> bool:
    return any(text in texts for text in texts_of(message.content))
