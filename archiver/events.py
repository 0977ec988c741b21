"""Bytes to `Event` or `Malformed`: the only place that knows what a webhook looks like. Pure.

Upstream documents no webhook body, so every field but the event type and the chat's id is optional, several
envelopes are understood, and whatever is not understood stays in the bytes.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

CREATED = "chat.created"
DELETED = "chat.deleted"
CHAT_EVENTS = frozenset({CREATED, DELETED})

WEBHOOK = "webhook"  # the source of what upstream sent by itself

MAX_ID = 1024  # bytes of UTF-8: two ids fit an entry of a Postgres index, which holds 2,704
OURS = "\x1f"  # begins the keys that we make ourselves, for turns that only history knows; so no id may
MAX_DEPTH = 200  # levels of nesting: far below what any of Python's parsers takes on any stack
MAX_MESSAGES = 2_000  # of one turn
MAX_VARIABLE_DEPTH = 64
_MAX_DIGITS = 400  # of an integer; longer ones stay text
_MAX_COST_TEXT = 40  # characters
_COST_MAGNITUDES = range(-30, 12)  # powers of ten
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_DIGITS = re.compile(r"-?[0-9]{9,19}(\.[0-9]+)?", re.ASCII)


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message of a turn, as text."""

    role: str
    content: str


class Chat(msgspec.Struct, frozen=True, gc=False):
    """One turn as one delivery tells it; None or empty where it does not."""

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


NOTHING_TOLD = Chat(None, None, None, None, None, (), (), None, None)


class Event(msgspec.Struct, frozen=True, gc=False):
    """One delivery that could be read. `occurred_at` is the envelope's time, `body` the exact bytes."""

    type: str
    body: bytes
    dedupe_key: bytes
    session_id: str
    chat_id: str | None
    chat: Chat | None
    occurred_at: datetime | None


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """One delivery that could not be read: `reason` is a stable code, `detail` a sentence without content."""

    body: bytes
    reason: str
    detail: str


REASONS = {
    "not_json": "The body is not JSON.",
    "nested_too_deeply": f"The body is nested more than {MAX_DEPTH} levels deep.",
    "not_an_object": "The body is JSON, but not an object.",
    "no_event_type": "There is no `type` or `event`, neither at the top nor in `message`, that is a text.",
    "no_chat_id": "A chat event needs the chat's `id`.",
    "unusable_id": f"An id is longer than {MAX_ID} bytes, holds U+0000 or a lone surrogate, or begins with U+001F.",
    "too_many_messages": f"One turn holds more than {MAX_MESSAGES} messages.",
}


class UnreadableError(Exception):
    """What was told cannot be read; the text is a code of `REASONS`."""


def parse(body: bytes) -> Event | Malformed:
    """Read one webhook body.

    Never raises, whatever the bytes are. The envelopes: `{"message": {"type", "timestamp", "chat"}}`,
    `{"type"|"event", "chat"|"data"}` and `{"type", "timestamp", "data": {"chat"}}`.
    """
    try:
        return _event(body, decode(body))
    except UnreadableError as error:
        reason = str(error)
    return Malformed(body=body, reason=reason, detail=REASONS[reason])


def decode(body: bytes) -> Any:
    """The JSON in these bytes, read liberally: lone surrogates, NaN, numbers of any length.

    Raises `UnreadableError`.
    """
    try:
        document = _load(body)
    except RecursionError:
        raise UnreadableError("nested_too_deeply") from None
    # Whether a body is read must not depend on how deep the caller stands; few bodies have brackets enough to ask.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _depth(document) > MAX_DEPTH:
        raise UnreadableError("nested_too_deeply")
    return document


def _load(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    # The standard library is slower and more liberal: lone surrogates, NaN, numbers out of range.
    try:
        return json.loads(body, parse_constant=str, parse_int=_integer, parse_float=_float)
    except ValueError as error:
        raise UnreadableError("not_json") from error


def _depth(document: Any) -> int:
    depth, level = 0, [document]
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [value for item in containers for value in (item.values() if isinstance(item, dict) else item)]
        depth += bool(containers)
    return depth


# What is no number to us stays text, so that two facts that differ in it alone still differ.


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= _MAX_DIGITS else text


def _float(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


def _event(body: bytes, document: Any) -> Event:
    if not isinstance(document, dict):
        raise UnreadableError("not_an_object")
    envelope = _envelope(document)
    event_type = _event_type(envelope)
    chat = _chat_object(envelope)
    chat_id = identifier(chat.get("id")) or identifier(chat.get("chatId")) or identifier(envelope.get("chatId"))
    if event_type in CHAT_EVENTS and chat_id is None:
        raise UnreadableError("no_chat_id")
    is_known = event_type in CHAT_EVENTS
    return Event(
        type=event_type,
        body=body,
        dedupe_key=_chat_key(event_type, chat_id, chat, envelope) if is_known else _other_key(event_type, envelope),
        session_id=_session_id(chat, envelope) or "",
        chat_id=chat_id,
        chat=_chat(chat, envelope) if is_known else None,
        occurred_at=timestamp(envelope.get("timestamp")) or timestamp(envelope.get("createdAt")),
    )


def _envelope(document: dict[str, Any]) -> dict[str, Any]:
    message = document.get("message")
    is_flat = any(isinstance(name := document.get(key), str) and name in CHAT_EVENTS for key in ("type", "event"))
    if isinstance(message, dict) and ("type" in message or "event" in message) and not is_flat:
        return message
    return document


def _event_type(envelope: dict[str, Any]) -> str:
    for name in ("type", "event"):
        value = envelope.get(name)
        if isinstance(value, str) and value.strip():
            return _storable_id(value.strip())
    raise UnreadableError("no_event_type")


def _chat_object(envelope: dict[str, Any]) -> dict[str, Any]:
    data = envelope.get("data")
    candidates = [envelope.get("chat")]
    if isinstance(data, dict):
        candidates += [data.get("chat"), data]
    else:
        candidates.append(data)
    for candidate in candidates:
        if isinstance(candidate, dict):
            return candidate
        if candidate is not None and (bare := identifier(candidate)):
            return {"id": bare}
    return {}


# What `_chat` reads beside the chat object, and so what makes two facts differ though their chat objects do not.
_BESIDE_THE_CHAT = frozenset({"assistant", "assistantId", "assistantOverrides", "session"})
_TIMES = ("timestamp", "createdAt")


def _chat_key(event_type: str, chat_id: str | None, chat: dict[str, Any], envelope: dict[str, Any]) -> bytes:
    """A digest of the fact, so that a retry in a new envelope is the same."""
    if _BESIDE_THE_CHAT.isdisjoint(envelope):
        return digest([event_type, chat_id, chat])
    beside = {name: envelope[name] for name in _BESIDE_THE_CHAT if envelope.get(name) is not None}
    return digest([event_type, chat_id, chat, beside] if beside else [event_type, chat_id, chat])


def _other_key(event_type: str, envelope: dict[str, Any]) -> bytes:
    """Of an unknown type nobody knows what matters: all but the time at which it was told."""
    return digest([event_type, {name: value for name, value in envelope.items() if name not in _TIMES}])


def digest(fact: list[Any]) -> bytes:
    """SHA-256 over the canonical JSON of a fact."""
    try:
        canonical = msgspec.json.encode(fact, order="deterministic")
    except (UnicodeEncodeError, OverflowError):
        canonical = json.dumps(fact, sort_keys=True, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(canonical).digest()


def _session_id(chat: dict[str, Any], envelope: dict[str, Any]) -> str | None:
    for place in (chat, _first_dict(envelope.get("data")), envelope):
        session = place.get("session")
        found = (
            identifier(place.get("sessionId")) or identifier(session) or identifier(_first_dict(session).get("id"))
        )
        if found:
            return found
    return None


def _chat(chat: dict[str, Any], envelope: dict[str, Any]) -> Chat:
    assistant = _first_dict(chat.get("assistant"), envelope.get("assistant"))
    session = _first_dict(chat.get("session"), envelope.get("session"))
    overrides = _first_dict(chat.get("assistantOverrides"), envelope.get("assistantOverrides"))
    said, answered = messages_of(chat.get("input"), "user"), messages_of(chat.get("output"), "assistant")
    if len(said) + len(answered) > MAX_MESSAGES:
        raise UnreadableError("too_many_messages")
    return Chat(
        assistant_id=identifier(chat.get("assistantId"))
        or identifier(assistant.get("id"))
        or identifier(envelope.get("assistantId")),
        external_id=label(chat.get("externalChatId")),
        status=label(chat.get("status")),
        cost=_cost(chat.get("cost")),
        variables=_variables(overrides.get("variableValues")),
        input=said,
        output=answered,
        created_at=timestamp(chat.get("createdAt")),
        updated_at=timestamp(chat.get("updatedAt")),
        session_name=label(session.get("name")),
        session_status=label(session.get("status")),
    )


def _first_dict(*values: Any) -> dict[str, Any]:
    for value in values:
        if isinstance(value, dict):
            return value
    return {}


def identifier(value: Any) -> str | None:
    """An id of any reasonable form as text; None where there is none."""
    if isinstance(value, str):
        return _storable_id(value) if value.strip() else None
    if isinstance(value, int) and not isinstance(value, bool):
        return _storable_id(str(value))
    return None


def _storable_id(value: str) -> str:
    # Replacing characters would let two ids collide, so an id that Postgres cannot hold is refused.
    if len(value) <= MAX_ID and value.isascii() and "\x00" not in value and value[0] != OURS:
        return value
    if len(value) > MAX_ID or value[0] == OURS or _UNSTORABLE.search(value) or len(value.encode()) > MAX_ID:
        raise UnreadableError("unusable_id")
    return value


def label(value: Any) -> str | None:
    """A short text such as a name or a status; None where there is none."""
    if isinstance(value, str) and value:
        return storable(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def storable(text: str) -> str:
    """A copy that a Postgres text column can hold: U+0000 and lone surrogates become U+FFFD."""
    if text.isascii() and "\x00" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)


def messages_of(value: Any, default_role: str) -> tuple[Message, ...]:
    """The messages in a text, an object or a list of either."""
    if isinstance(value, str):
        return (Message(default_role, storable(value)),) if value else ()
    items = value if isinstance(value, list) else [value]
    return tuple(message for item in items for message in _message(item, default_role))


def _message(item: Any, default_role: str) -> Iterator[Message]:
    if isinstance(item, str):
        if item:
            yield Message(default_role, storable(item))
    elif isinstance(item, dict) and ("content" in item or "role" in item):
        yield Message(label(item.get("role")) or default_role, _text(item.get("content")))


def _text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts that carry text, or whatever else as JSON."""
    if isinstance(content, str):
        return storable(content)
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) if isinstance(part, dict) else _text(part) for part in content)
    return storable(json.dumps(content, ensure_ascii=False))


def _cost(value: Any) -> Decimal | None:
    text = str(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    if not text.isascii() or len(text) > _MAX_COST_TEXT:
        return None
    try:
        cost = Decimal(text)
    except InvalidOperation:
        return None
    if not cost:
        return Decimal(0)
    return cost if cost.is_finite() and cost.adjusted() in _COST_MAGNITUDES else None


def _variables(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not value:
        return None
    cleaned: dict[str, Any] = _storable_json(value, MAX_VARIABLE_DEPTH)
    return cleaned


def _storable_json(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(k): _storable_json(v, depth - 1) for k, v in value.items()} if depth else None
    if isinstance(value, list):
        return [_storable_json(item, depth - 1) for item in value] if depth else None
    return value


def timestamp(value: Any) -> datetime | None:
    """A time in UTC from ISO 8601 text or from an epoch number in seconds, milliseconds or finer; None if neither."""
    try:
        if isinstance(value, str):
            if not _DIGITS.fullmatch(value):
                parsed = datetime.fromisoformat(value.upper())
                if parsed.tzinfo is UTC:
                    return parsed
                return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return _from_epoch(value)
    except (ValueError, OverflowError):
        return None


def _from_epoch(value: float) -> datetime:
    for limit, unit in ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6)):
        if abs(value) < limit:
            # Integers stay exact; timedelta rounds to microseconds.
            return _EPOCH + timedelta(seconds=value / unit)
    return _EPOCH + timedelta(seconds=value / 1e9)
