"""Facts from sources other than webhooks: history responses and registered sessions. Pure."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from archiver import events
from archiver.errors import ArchiverError
from archiver.events import Event, Message, UnreadableError

READ = "history.read"  # the messages of the session
GONE = "history.gone"  # 404 or 410
UNREADABLE = "history.unreadable"  # a response of unknown form
UNAVAILABLE = "history.unavailable"  # no response before the session expired
REDACTED = "history.redacted"  # the content of all readings of a session, without erased turns
READINGS = frozenset({READ, GONE, UNREADABLE, UNAVAILABLE, REDACTED})
REGISTERED = "session.registered"

SOURCE = "history"
APPLICATION = "application"

NO_ID = "no_session_id"  # the code of a registration without an id, which is never quarantined

MAX_MESSAGES = 200_000  # per session
MAX_REGISTRATIONS = 1_000  # per request

_GONE = frozenset({404, 410})
_PARTIAL_CONTENT = 206
# Fields by which a response says that it is not whole, in lower case without `_`, and objects that hold such fields.
_MORE = frozenset({"hasmore", "hasnextpage", "nextcursor", "nextpage", "nextpagetoken", "truncated", "istruncated"})
_PAGES = frozenset({"totalpages", "pagecount", "numpages"})  # a number above 1 says the same
_TOTALS = frozenset(
    {"total", "totalcount", "totalmessages", "totalitems", "totalresults"}
)  # so does one above those shown
_DIGITS = 10
_PAGINATION = ("pagination", "paging", "pageInfo", "page_info", "meta")
# The same content is the same fact, regardless of other fields of a response, such as access times and request ids.
_SNAPSHOT_FIELDS = ("id", "messages", "name", "status", "assistantId", "createdAt")


class SessionSnapshot(msgspec.Struct, frozen=True, gc=False):
    """The content of a session in a reading or registration; a field that it lacks is None."""

    messages: tuple[Message, ...] | None = None
    name: str | None = None
    status: str | None = None
    assistant_id: str | None = None
    created_at: datetime | None = None
    is_partial: bool = False


EMPTY_SNAPSHOT = SessionSnapshot()


def parse_history(session_id: str, status: int, body: bytes) -> Event:
    """Return the event of a response to `GET /chats/session/{id}`; `body`: the exact bytes.

    Never raises: a response that cannot be parsed is also a fact.
    """
    if status in _GONE:
        return _event(GONE, session_id, body, [status])
    is_whole = status in range(200, 300) and status != _PARTIAL_CONTENT
    session = _session(session_id, _decoded(body)) if is_whole else None
    if session is None:
        return _event(UNREADABLE, session_id, body, [status, hashlib.sha256(body).hexdigest()])
    return _event(READ, session_id, body, [{name: session[name] for name in _SNAPSHOT_FIELDS if name in session}])


def unavailable_event(session_id: str) -> Event:
    """Return the event that records that a session expired before any response."""
    return _event(UNAVAILABLE, session_id, json.dumps({"sessionId": session_id}).encode(), [])


def redacted_event(session_id: str, snapshot: "SessionSnapshot", through: datetime) -> Event:
    """Return the event that replaces all readings of a session after erasures up to `through`."""
    session = {
        "id": session_id,
        "messages": [_redacted(message) for message in snapshot.messages or ()],
        "name": snapshot.name,
        "status": snapshot.status,
        "assistantId": snapshot.assistant_id,
        "createdAt": snapshot.created_at.isoformat() if snapshot.created_at else None,
    }
    event = _event(REDACTED, session_id, json.dumps({"session": session}).encode(), [session, through.isoformat()])
    return msgspec.structs.replace(event, occurred_at=through)


def _redacted(message: Message) -> dict[str, Any]:
    """Return a message in a form that parses to the same message."""
    if message.kind == "text":
        return {"role": message.role, "content": message.content}
    if message.kind == "refusal":
        return {"role": message.role, "content": None, "refusal": message.content}
    if message.kind == "tool_call":
        return {"role": message.role, "content": message.content, "tool_calls": [{}]}
    return {"role": message.role, "content": json.loads(message.content) if message.content.strip() else ""}


def register(session: Mapping[str, Any]) -> Event:
    """Return the event that records that the application opened a session.

    Raises `UnreadableError` if its id is missing or unusable.
    """
    session_id = events.identifier(session.get("id"))
    if session_id is None:
        raise UnreadableError(NO_ID)
    return _event(REGISTERED, session_id, json.dumps(session).encode(), [dict(session)])


class InvalidRegistrationError(ArchiverError):
    """A body does not register sessions; the message says what is wrong."""


def registrations(body: bytes) -> list[Event]:
    """Return an event for each session in `{"ids": [...]}` or `{"sessions": [{"id", ...}]}`.

    Raises `InvalidRegistrationError`.
    """
    try:
        document = events.decode(body)
    except UnreadableError:
        raise InvalidRegistrationError("The body is not JSON.") from None
    ids = document.get("ids", []) if isinstance(document, dict) else None
    objects = document.get("sessions", []) if isinstance(document, dict) else None
    if not isinstance(ids, list) or not isinstance(objects, list) or not ids + objects:
        raise InvalidRegistrationError('Send at least one id, as {"ids": ["..."]} or {"sessions": [{"id": "..."}]}.')
    if len(ids) + len(objects) > MAX_REGISTRATIONS:
        raise InvalidRegistrationError(f"Send at most {MAX_REGISTRATIONS} sessions at a time.")
    rows = [{"id": session_id} for session_id in ids] + objects
    return [_registration(number, session) for number, session in enumerate(rows, 1)]


def _registration(number: int, session: Any) -> Event:
    try:
        return register(session if isinstance(session, dict) else {})
    except UnreadableError as error:
        reason = "It has no id." if str(error) == NO_ID else events.REASONS[str(error)]
        raise InvalidRegistrationError(f"Session {number}: {reason}") from None


def parse_snapshot(kind: str, session_id: str, body: bytes, removed: int = 0) -> SessionSnapshot:
    """Return the content of a history response or registration; empty if it cannot be parsed.

    `removed`: the number of messages that the response had in addition to those in `body`.
    """
    if kind == REGISTERED:
        document = _decoded(body)
        return _snapshot(document, None) if isinstance(document, dict) else EMPTY_SNAPSHOT
    document = _decoded(body) if kind in (READ, REDACTED) else None
    session = _session(session_id, document)
    if session is None:
        return EMPTY_SNAPSHOT
    messages = _messages(session["messages"]) or ()
    has_more = _has_more(document, session, len(messages) + removed)
    return msgspec.structs.replace(_snapshot(session, messages), is_partial=has_more)


def message(content: bytes) -> tuple[Message, ...]:
    """Return the messages in one element of a response, usually one; empty if there are none."""
    return _messages([_decoded(content)]) or ()


def _event(kind: str, session_id: str, body: bytes, fact: list[Any]) -> Event:
    key = events.digest([kind, *fact])
    return Event(kind, body, key, session_id, chat_id=None, chat=None, occurred_at=None)


def _decoded(body: bytes) -> Any:
    try:
        return events.decode(body)
    except UnreadableError:
        return None


def _session(session_id: str, document: Any) -> dict[str, Any] | None:
    """Return the session object of a response; None unless it is valid and is the requested session."""
    data = document.get("data") if isinstance(document, dict) else None
    for place in (document, data):
        for candidate in (place.get("session"), place) if isinstance(place, dict) else ():
            if isinstance(candidate, dict) and _messages(candidate.get("messages")) is not None:
                return candidate if candidate.get("id") is None or str(candidate["id"]) == session_id else None
    return None


def _has_more(document: Any, session: Mapping[str, Any], shown: int) -> bool:
    """Return whether a response with `shown` messages says that it is one of several pages, or truncated."""
    data = document.get("data")
    outer = [place for place in (document, data, session) if isinstance(place, dict)]
    inner = [place[name] for place in outer for name in _PAGINATION if isinstance(place.get(name), dict)]
    fields = [(name.replace("_", "").lower(), value) for place in (*outer, *inner) for name, value in place.items()]
    return any(
        (name in _MORE and bool(value) and value not in ("false", "False"))
        or (name in _PAGES and _number(value) > 1)
        or (name in _TOTALS and _number(value) > shown)
        for name, value in fields
    )


def _number(value: Any) -> int:
    """Return a whole number that is one in JSON or text; 0 for anything else."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < _DIGITS else 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _messages(value: Any) -> tuple[Message, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        return None
    # A message without content, such as a tool call, counts too.
    if not all(events.role_of(item) is not None for item in value):
        return None
    return events.messages_of(value, "")


def _snapshot(session: Mapping[str, Any], messages: tuple[Message, ...] | None) -> SessionSnapshot:
    return SessionSnapshot(
        messages,
        name=events.label(session.get("name")),
        status=events.label(session.get("status")),
        assistant_id=events.label(session.get("assistantId")),
        created_at=events.timestamp(session.get("createdAt")),
    )
