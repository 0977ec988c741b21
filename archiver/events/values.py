"""Single values of a document: ids, texts, messages, costs."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from archiver.events.shapes import MAX_ID, Message, UnreadableError

OURS = "\x1f"  # begins the keys that we make ourselves, for turns that only history knows; so no id may
MAX_VARIABLE_DEPTH = 64
_MAX_COST_TEXT = 40  # characters
_COST_MAGNITUDES = range(-30, 12)  # powers of ten
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def identifier(value: Any) -> str | None:
    """An id of any reasonable form as text; None where there is none."""
    if isinstance(value, str):
        return storable_id(value) if value.strip() else None
    if isinstance(value, int) and not isinstance(value, bool):
        return storable_id(str(value))
    return None


def storable_id(value: str) -> str:
    """The id; raises `UnreadableError` for one that Postgres cannot hold."""
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


def cost_of(value: Any) -> Decimal | None:
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


def variables_of(value: Any) -> dict[str, Any] | None:
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
