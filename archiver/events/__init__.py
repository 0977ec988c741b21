"""Parse webhook bodies into `Event` or `Malformed`: the only place that knows their format. Pure.

Upstream documents no webhook body, so every field except the event type and the chat's id is optional,
several envelopes are accepted, and unknown fields remain in the bytes.
"""

from typing import Any

from archiver.events.delivery import WEBHOOK, Content, Delivery, has_event
from archiver.events.documents import decode, digest
from archiver.events.messages import known_role, messages_of, role_of
from archiver.events.shapes import (
    EMPTY_CHAT,
    MAX_DEPTH,
    MAX_ID,
    MAX_MESSAGES,
    REASONS,
    SHAPES,
    Chat,
    Event,
    Kind,
    Malformed,
    Message,
    UnreadableError,
)
from archiver.events.times import CLOCK_TOLERANCE, EARLIEST, credible, plausible, timestamp
from archiver.events.values import (
    INTERNAL_PREFIX,
    MAX_VARIABLE_DEPTH,
    cost_of,
    identifier,
    label,
    storable,
    storable_id,
    variables_of,
)

__all__ = [
    "CHAT_EVENTS",
    "CLOCK_TOLERANCE",
    "CREATED",
    "DELETED",
    "EARLIEST",
    "EMPTY_CHAT",
    "INTERNAL_PREFIX",
    "MAX_DEPTH",
    "MAX_ID",
    "MAX_MESSAGES",
    "MAX_VARIABLE_DEPTH",
    "REASONS",
    "SHAPES",
    "WEBHOOK",
    "Chat",
    "Content",
    "Delivery",
    "Event",
    "Kind",
    "Malformed",
    "Message",
    "UnreadableError",
    "credible",
    "decode",
    "digest",
    "has_event",
    "identifier",
    "known_role",
    "label",
    "messages_of",
    "parse",
    "plausible",
    "restore",
    "role_of",
    "storable",
    "timestamp",
]

CREATED = "chat.created"
DELETED = "chat.deleted"
CHAT_EVENTS = frozenset({CREATED, DELETED})


def parse(body: bytes) -> Event | Malformed:
    """Parse one webhook body.

    Never raises, for any bytes. The accepted envelopes: `{"message": {"type", "timestamp", "chat"}}`,
    `{"type"|"event", "chat"|"data"}` and `{"type", "timestamp", "data": {"chat"}}`.
    """
    try:
        return _event(body, decode(body))
    except UnreadableError as error:
        reason = str(error)
    return Malformed(body=body, reason=reason, detail=REASONS[reason])


def restore(
    body: bytes, source: str, kind: str | None, session_id: str | None, dedupe_key: bytes | None
) -> Event | Malformed:
    """Return the content of a stored delivery from its bytes, its source and `Delivery.internal`.

    A webhook is parsed again; an internal fact is restored unchanged.
    """
    if source == WEBHOOK or kind is None or session_id is None or dedupe_key is None:
        return parse(body)
    return Event(kind, body, dedupe_key, session_id, chat_id=None, chat=None, occurred_at=None)


def _event(body: bytes, given: Any) -> Event:
    document = _object(given)
    if document is None:
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


def _object(value: Any) -> dict[str, Any] | None:
    """Return the value if it is an object, or the object that it contains as JSON text; None for anything else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        document = decode(value.encode(errors="surrogatepass"))
    except UnreadableError:
        return None
    return document if isinstance(document, dict) else None


def _envelope(document: dict[str, Any]) -> dict[str, Any]:
    message = _object(document.get("message"))
    is_flat = any(isinstance(name := document.get(key), str) and name in CHAT_EVENTS for key in ("type", "event"))
    if message is not None and ("type" in message or "event" in message) and not is_flat:
        return message
    return document


def _event_type(envelope: dict[str, Any]) -> str:
    for name in ("type", "event"):
        value = envelope.get(name)
        if isinstance(value, str) and value.strip():
            return storable_id(value.strip())
    raise UnreadableError("no_event_type")


def _chat_object(envelope: dict[str, Any]) -> dict[str, Any]:
    data = _object(envelope.get("data"))
    inner = [envelope.get("data")] if data is None else [data.get("chat"), data]
    for candidate in (envelope.get("chat"), *inner):
        result = _object(candidate)
        if result is not None:
            return result
        if candidate is not None and (bare := identifier(candidate)):
            return {"id": bare}
    return {}


# Fields that `_chat` reads outside the chat object; facts that differ in them are different facts.
_ENVELOPE_CHAT_FIELDS = frozenset({"assistant", "assistantId", "assistantOverrides", "session"})
_TIMES = ("timestamp", "createdAt")


def _chat_key(event_type: str, chat_id: str | None, chat: dict[str, Any], envelope: dict[str, Any]) -> bytes:
    """Return the dedupe key of a chat event: a digest that is the same for a retry in a new envelope."""
    if _ENVELOPE_CHAT_FIELDS.isdisjoint(envelope):
        return digest([event_type, chat_id, chat])
    beside = {name: envelope[name] for name in _ENVELOPE_CHAT_FIELDS if envelope.get(name) is not None}
    return digest([event_type, chat_id, chat, beside] if beside else [event_type, chat_id, chat])


def _other_key(event_type: str, envelope: dict[str, Any]) -> bytes:
    """Return the dedupe key of an event of unknown type, over all fields except the times of the envelope."""
    return digest([event_type, {name: value for name, value in envelope.items() if name not in _TIMES}])


def _session_id(chat: dict[str, Any], envelope: dict[str, Any]) -> str | None:
    for place in (chat, _object(envelope.get("data")) or {}, envelope):
        session = place.get("session")
        result = (
            identifier(place.get("sessionId")) or identifier(session) or identifier(_first_dict(session).get("id"))
        )
        if result:
            return result
    return None


def _chat(chat: dict[str, Any], envelope: dict[str, Any]) -> Chat:
    assistant = _first_dict(chat.get("assistant"), envelope.get("assistant"))
    session = _first_dict(chat.get("session"), envelope.get("session"))
    overrides = _first_dict(chat.get("assistantOverrides"), envelope.get("assistantOverrides"))
    input_messages, output_messages = (
        messages_of(chat.get("input"), "user"),
        messages_of(chat.get("output"), "assistant"),
    )
    if len(input_messages) + len(output_messages) > MAX_MESSAGES:
        raise UnreadableError("too_many_messages")
    return Chat(
        assistant_id=identifier(chat.get("assistantId"))
        or identifier(assistant.get("id"))
        or identifier(envelope.get("assistantId")),
        external_id=label(chat.get("externalChatId")),
        status=label(chat.get("status")),
        cost=cost_of(chat.get("cost")),
        variables=variables_of(overrides.get("variableValues")),
        input=input_messages,
        output=output_messages,
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
