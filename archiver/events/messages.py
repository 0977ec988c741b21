"""Extract the messages of a turn from any known format. Pure.

A value is a text, a number, a list of values, or an object that carries values in fields such as `content`, `parts`
or `text`. A message is a text, or an object whose role is its own or that of its place. One that holds no text is a
message all the same: `Message.shape` says what it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from archiver.events.documents import Exact
from archiver.events.shapes import Message, Shape
from archiver.events.values import label, storable

MAX_NESTING = 32  # nesting levels searched for text

_ROLES = {
    **dict.fromkeys(("human", "customer", "caller", "client", "visitor", "end_user", "enduser"), "user"),
    **dict.fromkeys(("ai", "bot", "model", "agent", "chatbot", "llm"), "assistant"),
    **{role: role for role in ("user", "assistant", "system", "developer", "tool", "function")},
}
# Fields that may name the author instead of `role`; they count only if they contain the name of a role.
_AUTHORS = ("author", "sender", "speaker", "from", "type")

# Fields with text. The first non-empty one counts; the others repeat it in another form.
_TEXTS = (
    *("content", "parts", "text", "message", "output_text", "input_text", "transcript", "value", "body"),
    *("utterance", "response", "answer", "summary", "output", "result", "caption"),
)
# fields with objects that contain texts; a plain text there is encoded bytes
_CARRIERS = ("data", "audio", "input_audio")
_LISTS = ("messages", "choices", "candidates", "output", "items")  # fields of an object that wraps messages
_CALLS = ("tool_calls", "toolCalls", "function_call", "functionCall", "tool_use", "toolUse")
_CALL_TYPES = ("_call", "tool_use", "tool-call", "tool_calls")  # ends of `type`
# Kinds of content other than text, by a word in `type` or by the name of the field.
_MEDIA: dict[str, Shape] = {"image": "image", "audio": "audio", "video": "video", "file": "file", "document": "file"}
_MEDIA_FIELDS: dict[str, Shape] = {
    **dict.fromkeys(("image", "image_url", "imageurl", "input_image"), "image"),
    **dict.fromkeys(("audio", "input_audio"), "audio"),
    **dict.fromkeys(("file", "file_data", "filedata", "inline_data", "inlinedata", "document"), "file"),
    **dict.fromkeys(("video", "video_url"), "video"),
}
_METADATA = frozenset({"role", "id", "type", "name", "index", "status", "object", "time", "timestamp", "metadata"})
_METADATA_ENDS = ("At", "_at", "Id", "_id")
_STRONGEST: tuple[Shape, ...] = ("refusal", "text", "tool_call")  # for a list of different shapes


class _Text(NamedTuple):
    text: str
    shape: Shape


_NULL, _UNKNOWN = _Text("", "null"), _Text("", "object")


def messages_of(value: Any, default_role: str) -> tuple[Message, ...]:
    """Return the messages in a value: a text, a number, a message, an answer that wraps messages, or a list of
    these.
    """
    if isinstance(value, str):
        return (_message_of(default_role, value),) if value else ()
    return tuple(_messages(value, default_role, MAX_NESTING))


def known_role(role: str) -> str | None:
    """Return the canonical role, such as `assistant` for `AI`; None if unknown."""
    return _ROLES.get(role) or _ROLES.get(role.strip().lower())


def role_of(item: Any) -> str | None:
    """Return the role of an object's author, `user` and `assistant` under any of their usual names; None without
    one.
    """
    if not isinstance(item, Mapping):
        return None
    role = item.get("role")
    if isinstance(role, str) and role.strip():
        return known_role(role) or label(role)
    for name in _AUTHORS:
        author = item.get(name)
        if isinstance(author, Mapping):
            author = author.get("role")
        if isinstance(author, str) and (known := known_role(author)):
            return known
    return None


def _message_of(role: str, text: str) -> Message:
    return Message(role, storable(text), "text" if text.strip() else "empty")


def _messages(value: Any, default_role: str, depth: int) -> Iterator[Message]:
    if isinstance(value, list) and depth:
        for item in value:
            yield from _messages(item, default_role, depth - 1)
    elif isinstance(value, dict) and depth:
        yield from _message(value, default_role, depth - 1)
    elif value is not None and not isinstance(value, bool) and value != "":
        text_of_item = _text_of(value, depth)
        yield Message(default_role, text_of_item.text, text_of_item.shape)


def _message(item: dict[str, Any], default_role: str, depth: int) -> Iterator[Message]:
    role = role_of(item)
    content = item.get("content")
    if isinstance(content, str) and content.strip() and "refusal" not in item:  # the usual case
        yield _message_of(role or default_role, content)
    elif role is None and (inner := _wrapped(item)) is not None:
        yield from _messages(inner, default_role, depth)
    elif item:
        text_of_item = _of_object(item, depth)
        if text_of_item.shape == "object":
            text_of_item = _as_json(item)
        yield Message(role or default_role, text_of_item.text, text_of_item.shape)


def _wrapped(item: dict[str, Any]) -> Any:
    """Return the messages that an object without a role wraps; None if it wraps none."""
    if "type" not in item:
        for name in _LISTS:
            if isinstance(item.get(name), list):
                return item[name]
    inner = (item.get(name) for name in ("message", "content", "data"))
    return next((value for value in inner if role_of(value) is not None), None)


def _as_json(item: dict[str, Any]) -> _Text:
    """Return an unknown object as JSON text, so that no content is lost."""
    content = item.get("content")
    if content is None:
        content = {
            name: value
            for name, value in item.items()
            if name not in _METADATA and not name.endswith(_METADATA_ENDS) and value is not None
        }
    return _Text(storable(json.dumps(content, ensure_ascii=False)), "object") if content else _NULL


def _text_of(value: Any, depth: int) -> _Text:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _Text(storable(value), "text" if value.strip() else "empty")
    if isinstance(value, list):
        return _joined([_text_of(part, depth - 1) for part in value]) if depth else _UNKNOWN
    if isinstance(value, dict):
        return _of_object(value, depth - 1) if depth else _UNKNOWN
    return _Text(value.text if isinstance(value, Exact) else json.dumps(value), "text")


def _joined(parts: Sequence[_Text]) -> _Text:
    text = "".join(part.text for part in parts)
    shapes: list[Shape] = [part.shape for part in parts if part.shape != "object"]
    shapes = shapes or ["object" if parts else "empty"]
    return _Text(text, next((shape for shape in _STRONGEST if shape in shapes), shapes[0]))


def _of_object(item: dict[str, Any], depth: int) -> _Text:
    result = [_text_of(item[name], depth) for name in _TEXTS if name in item]
    result += [_text_of(item[name], depth) for name in _CARRIERS if isinstance(item.get(name), dict | list)]
    words = next((each for each in result if each.shape in {"text", "refusal"}), None)
    given = item.get("refusal")
    refusal = _NULL if isinstance(given, bool) else _text_of(given, depth)
    if refusal.shape == "text":
        text = refusal.text if words is None or words.text == refusal.text else f"{words.text}\n{refusal.text}"
        return _Text(text, "refusal")
    if words is not None:
        return _Text(words.text, "refusal") if given is True else words
    return _without_text(item, result)


def _without_text(item: dict[str, Any], found: Sequence[_Text]) -> _Text:
    kind = str(item.get("type") or "").lower()
    if any(item.get(name) for name in _CALLS) or kind.endswith(_CALL_TYPES):
        return _Text("", "tool_call")
    media = [shape for word, shape in _MEDIA.items() if word in kind]
    media += [_MEDIA_FIELDS[field.lower()] for field in item if field.lower() in _MEDIA_FIELDS]
    if media:
        return _Text("", media[0])
    nothing = _NULL if found or "refusal" in item else _UNKNOWN
    return next((each for each in found if each.shape != "null"), nothing)
