"""Types of parsed and malformed deliveries, and the reasons why a delivery is malformed."""

from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import msgspec

from archiver.errors import ArchiverError

MAX_ID = 1024  # bytes of UTF-8: two ids fit into an entry of a Postgres index, which is limited to 2,704 bytes
MAX_DEPTH = 200  # levels of nesting, far below the limit of every Python parser
MAX_MESSAGES = 2_000  # per turn


Shape = Literal["text", "refusal", "tool_call", "null", "empty", "image", "audio", "video", "file", "object"]
Kind = Literal["text", "refusal", "tool_call", "other"]

_KINDS: dict[Shape, Kind] = {"text": "text", "refusal": "refusal", "tool_call": "tool_call"}
SHAPES: dict[Kind, Shape] = {"text": "text", "refusal": "refusal", "tool_call": "tool_call", "other": "object"}


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as text. `shape`: the format in which it was sent.

    Only `text` and `refusal` contain words; the content of `object` is JSON, that of the others is blank.
    """

    role: str
    content: str
    shape: Shape = "text"

    @property
    def kind(self) -> Kind:
        """Return the content kind that the archive stores."""
        return _KINDS.get(self.shape, "other")

    @property
    def has_text(self) -> bool:
        """Return whether the message has text."""
        return self.shape in {"text", "refusal"}


class Chat(msgspec.Struct, frozen=True, gc=False):
    """A turn as one delivery reports it; a field that it does not report is None or empty."""

    assistant_id: str | None
    external_id: str | None
    status: str | None
    cost: Decimal | None
    variables: dict[str, Any] | None
    input: tuple[Message, ...]
    output: tuple[Message, ...]
    created_at: datetime | None
    updated_at: datetime | None
    session_name: str | None = None
    session_status: str | None = None


EMPTY_CHAT = Chat(None, None, None, None, None, (), (), None, None)


class Event(msgspec.Struct, frozen=True, gc=False):
    """A parsed delivery. `occurred_at`: envelope time; `body`: the exact bytes."""

    type: str
    body: bytes
    dedupe_key: bytes
    session_id: str
    chat_id: str | None
    chat: Chat | None
    occurred_at: datetime | None


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """A delivery that could not be parsed: `reason` is a stable code, `detail` a sentence without content."""

    body: bytes
    reason: str
    detail: str


REASONS = {
    "not_json": "The body is not JSON.",
    "nested_too_deeply": f"The body is nested more than {MAX_DEPTH} levels deep.",
    "not_an_object": "The body is JSON, but not an object.",
    "no_event_type": "Neither the top level nor `message` has a `type` or `event` that is a string.",
    "no_chat_id": "A chat event needs the chat's `id`.",
    "unusable_id": f"An id exceeds {MAX_ID} bytes, contains U+0000 or a lone surrogate, or begins with U+001F.",
    "too_many_messages": f"One turn has more than {MAX_MESSAGES} messages.",
}


class UnreadableError(ArchiverError):
    """The content cannot be parsed; the message is a stable code, such as a key of `REASONS`."""
