"""Input and output types of an alignment."""

from datetime import datetime
from typing import Literal

import msgspec

from archiver.events import Kind, Message

USER = "user"


class HistoryMessages(msgspec.Struct, frozen=True, gc=False):
    """One history response as messages without ids or times; may be cut at either end, shortened or empty.

    `first_read_at`: when the same response first arrived, if that was before `read_at`. `shown`: the response shows
    this number of the first messages of the next reading, and `messages` is empty.
    """

    messages: tuple[Message, ...]
    read_at: datetime
    first_read_at: datetime | None = None
    shown: int | None = None


class TurnMessages(msgspec.Struct, frozen=True, gc=False):
    """The newest revision of one chat: the first `inputs` messages are input, the others output.

    `began_at` orders turns, ties by `revised_at` and `chat_id`; it may be wrong. `revised_at` is the upstream time of
    the newest revision. `arrived_at`: when its first delivery arrived; None if unknown. `sent`: its input with the
    earlier conversation, in the order in which it was sent (`context.as_sent`).
    """

    chat_id: str
    messages: tuple[Message, ...]
    inputs: int
    began_at: datetime
    revised_at: datetime
    is_deleted: bool = False
    arrived_at: datetime | None = None
    sent: tuple[Message, ...] = ()


class TranscriptLine(msgspec.Struct, frozen=True, gc=False):
    """One message of a transcript.

    `source`: webhook or history; webhook if both have it. `in_history`: whether the latest reading shows it; None if
    it could not, because the turn is newer or no history was read. `first_read_at` and `last_read_at` are the times
    of the earliest and the latest reading that showed it. `is_ambiguous`: other lines fit its turn as well.
    `is_reworded`: webhook and history write it differently; then `history_content` is the text in the latest reading
    that showed it, unless only the roles differ. `number`: its position in the merged history, from 1; None if no
    reading showed it.
    """

    role: str
    content: str
    source: Literal["webhook", "history"]
    chat_id: str | None
    in_history: bool | None
    first_read_at: datetime | None = None
    last_read_at: datetime | None = None
    is_ambiguous: bool = False
    is_reworded: bool = False
    kind: Kind = "text"
    history_content: str | None = None
    number: int | None = None
