"""Extract the messages of a turn from any known format. Pure.

A value is a string, a number, a list of values, or an object that contains values in fields such as `content`,
`parts` or `text`. A message is a string, an object, or in a list also a pair of a role and a value. Its role is the
one that it names, or the default of its place, such as `user` in an input. An object without text is also a message:
`Message.shape` names its kind.
"""

import json
import re
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
    *("html", "blocks", "elements", "attachments"),  # of Slack and others, next to an empty `text`
)
# fields with objects that contain text; a plain string there is encoded bytes
_CARRIERS = ("data", "audio", "input_audio", "kwargs")
_LISTS = ("messages", "choices", "candidates", "output", "items")  # fields of an object that wraps messages
_CALLS = ("tool_calls", "toolCalls", "function_call", "functionCall", "tool_use", "toolUse")
_CALL_TYPES = ("_call", "tool_use", "tool-call", "tool_calls")  # ends of `type`
# Kinds of content other than text, by a word in `type` or by the name of the field.
_MEDIA: dict[str, Shape] = {"image": "image", "audio": "audio", "video": "video", "file": "file", "document": "file"}
_NO_MEDIA = "profile"
_MEDIA_FIELDS: dict[str, Shape] = {
    **dict.fromkeys(("image", "image_url", "imageurl", "input_image"), "image"),
    **dict.fromkeys(("audio", "input_audio"), "audio"),
    **dict.fromkeys(("file", "file_data", "filedata", "inline_data", "inlinedata", "document"), "file"),
    **dict.fromkeys(("video", "video_url"), "video"),
}
_METADATA = frozenset({"role", "id", "type", "name", "index", "status", "object", "time", "timestamp", "metadata"})
_METADATA_ENDS = ("At", "_at", "Id", "_id")
_KINDS_AND_IDS = frozenset({"type", "id", "role", "object", "index"})  # metadata inside an unknown part as well
# Fields of a part that are meant only for the platform that created it.
_NOTES = frozenset({"cache_control", "cachecontrol", "cachepoint", "signature", "thoughtsignature"})
_NOTES_BEGIN = ("providermetadata", "provider_metadata", "provideroptions", "provider_options")
# Kinds of parts that are the work of the assistant, not its words: tool calls, their results, reasoning.
_WORK = re.compile(
    r"(^|[-_.])(tool|function)([-_.]|$)|^tool(use|call|result|invocation)|[-_]call([-_]|s?$)|thinking|reasoning"
)
_WORK_FIELDS = (
    *_CALLS,
    *("toolResult", "tool_result", "toolInvocation", "tool_invocation", "functionResponse", "function_response"),
)
# Fields whose names are also accepted in capitals.
_NAMES = frozenset({*_TEXTS, *_CARRIERS, *_LISTS, *_AUTHORS, "role", "refusal"})
_PAIR = 2  # a role and a value
_REPEATED = ("content", "parts")  # if a message has both, one may contain parts that the other lacks
_SPOKEN = ("audio", "input_audio")
_STRONGEST: tuple[Shape, ...] = ("refusal", "text", "tool_call")  # for a list of different shapes


class _Text(NamedTuple):
    text: str
    shape: Shape
    unknown: tuple[str, ...] = ()  # parts in which no rule finds text, as JSON


_NULL, _UNKNOWN = _Text("", "null"), _Text("", "object")


def messages_of(value: Any, default_role: str) -> tuple[Message, ...]:
    """Return the messages in a string, a number, a message, an object that wraps messages, or a list of these."""
    if isinstance(value, str):
        return (_message_of(default_role, value),) if value else ()
    return tuple(_messages(value, default_role, MAX_NESTING))


def known_role(role: str) -> str | None:
    """Return the canonical role, such as `assistant` for `AI`; None if unknown."""
    return _ROLES.get(role) or _ROLES.get(role.strip().lower())


def role_of(item: Any) -> str | None:
    """Return the role of an object's or a pair's author, in its canonical form if known; None if there is none."""
    if not isinstance(item, Mapping):
        return known_role(item[0]) if _is_pair(item) else None
    item = _in_lower_case(item)
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


def _is_pair(item: Any) -> bool:
    """Return whether an item of a list is a pair of a known role and a value, as LangChain writes messages."""
    return (
        isinstance(item, list)
        and len(item) == _PAIR
        and isinstance(item[0], str)
        and isinstance(item[1], str | list | dict)
        and known_role(item[0]) is not None
    )


def _in_lower_case(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object with known field names in lower case, except those that it has in both forms."""
    if all(map(str.islower, item)):
        return item
    lower = {name: name.lower() for name in item if name.lower() in _NAMES and name.lower() not in item}
    return {lower.get(name, name): value for name, value in item.items()} if lower else item


def _message_of(role: str, text: str) -> Message:
    return Message(role, storable(text), "text" if text.strip() else "empty")


def _messages(value: Any, default_role: str, depth: int) -> Iterator[Message]:
    if isinstance(value, list) and depth:
        for item in value:
            if _is_pair(item):
                yield _shown(known_role(item[0]) or default_role, _text_of(item[1], depth - 1))
            else:
                yield from _messages(item, default_role, depth - 1)
    elif isinstance(value, dict) and depth:
        yield from _message(value, default_role, depth - 1)
    elif value is not None and not isinstance(value, bool) and value != "":
        yield _shown(default_role, _text_of(value, depth))


def _message(item: Mapping[str, Any], default_role: str, depth: int) -> Iterator[Message]:
    item = _in_lower_case(item)
    role = role_of(item)
    content = item.get("content")
    if isinstance(content, str) and content.strip() and "refusal" not in item and "parts" not in item:  # usual
        yield _message_of(role or default_role, content)
    elif role is None and (inner := _wrapped(item)) is not None:
        yield from _messages(inner, default_role, depth)
    elif item:
        text_of_item = _of_object(item, depth)
        if text_of_item.shape == "object":
            text_of_item = _as_json(item)
        yield _shown(role or default_role, text_of_item)


def _shown(role: str, found: _Text) -> Message:
    """Return the message with this text and, below it, each unknown part on its own line, or only the parts."""
    if not found.unknown:
        return Message(role, found.text, found.shape)
    if found.shape in {"text", "refusal"}:
        return Message(role, "\n".join((found.text, *found.unknown)), found.shape)
    is_one = len(found.unknown) == 1
    return Message(role, found.unknown[0] if is_one else f"[{', '.join(found.unknown)}]", "object")


def _wrapped(item: Mapping[str, Any]) -> Any:
    """Return the messages that an object without a role wraps; None if it wraps none."""
    if "type" not in item:
        for name in _LISTS:
            if isinstance(item.get(name), list):
                return item[name]
    inner = (item.get(name) for name in ("message", "content", "data", "kwargs"))
    return next((value for value in inner if isinstance(value, Mapping) and role_of(value) is not None), None)


def _as_json(item: Mapping[str, Any]) -> _Text:
    """Return an unknown object as JSON text, so that no content is lost."""
    content = item.get("content")
    if content is None:
        content = {name: value for name, value in item.items() if not _is_metadata(name) and value is not None}
    return _Text(_json(content), "object") if content else _NULL


def _is_metadata(name: str) -> bool:
    return name in _METADATA or name.endswith(_METADATA_ENDS)


def _json(value: Any) -> str:
    return storable(json.dumps(value, ensure_ascii=False))


def _text_of(value: Any, depth: int) -> _Text:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _Text(storable(value), "text" if value.strip() else "empty")
    if isinstance(value, list):
        return _joined([_text_of(part, depth - 1) for part in value]) if depth else _too_deep(value)
    if isinstance(value, dict):
        return _of_part(value, depth - 1) if depth else _too_deep(value)
    return _Text(value.text if isinstance(value, Exact) else json.dumps(value), "text")


def _joined(parts: Sequence[_Text]) -> _Text:
    text = "".join(part.text for part in parts)
    shapes: list[Shape] = [part.shape for part in parts if part.shape != "object"]
    shapes = shapes or ["object" if parts else "empty"]
    unknown = tuple(each for part in parts for each in part.unknown)
    return _Text(text, next((shape for shape in _STRONGEST if shape in shapes), shapes[0]), unknown)


def _too_deep(value: dict[str, Any] | list[Any]) -> _Text:
    return _Text("", "object", (_json(value),)) if _has_content(value) else _UNKNOWN


def _has_content(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_content(inner) for name, inner in value.items() if name not in _KINDS_AND_IDS)
    if isinstance(value, list):
        return any(map(_has_content, value))
    return bool(value.strip()) if isinstance(value, str) else not isinstance(value, bool | None)


def _of_part(item: Mapping[str, Any], depth: int) -> _Text:
    """Return the text of a part; content in which no rule finds text is returned as an unknown part.

    A part that Gemini marks as a thought has no text.
    """
    item = _in_lower_case(item)
    if item.get("thought") is True:
        return _UNKNOWN
    found = _of_object(item, depth)
    kind = _kind(item)
    if _WORK.search(kind) or any(item.get(name) for name in _WORK_FIELDS):
        return found._replace(unknown=())
    if found.shape in {"text", "refusal", "tool_call"}:
        return found
    if _media_of_kind(kind):
        return found._replace(unknown=())
    content = _content_of(item)
    if not content:
        return found
    shape = found.shape if found.shape in _MEDIA.values() else "object"
    return _Text(found.text, shape, (_json(content),))


def _content_of(part: Mapping[str, Any]) -> Any:
    """Return the content of an unknown part: its fields without metadata and media; None if there is none."""
    fields = {
        name: value
        for name, value in part.items()
        if not _is_metadata(name)
        and name.lower() not in _NOTES
        and not name.lower().startswith(_NOTES_BEGIN)
        and name.lower() not in _MEDIA_FIELDS
    }
    if not _has_content(fields):
        return None
    if "name" in part:
        fields["name"] = part["name"]
    return fields["content"] if fields.keys() == {"content"} else fields


def _of_object(item: Mapping[str, Any], depth: int) -> _Text:
    texts = {name: _text_of(item[name], depth) for name in _TEXTS if name in item}
    result = list(texts.values())
    result += [_carried(name, item[name], depth) for name in _CARRIERS if isinstance(item.get(name), dict | list)]
    result += [
        _text_of(value["caption"], depth)
        for name, value in item.items()
        if isinstance(value, dict) and "caption" in value and name.lower() in _MEDIA_FIELDS
    ]
    found = _of_fields(item, result, depth)
    repeated = (texts[name].unknown for name in _REPEATED if name in texts)
    unknown = tuple(dict.fromkeys(each for part in (*repeated, found.unknown) for each in part))
    return found._replace(unknown=unknown) if unknown else found


def _carried(name: str, value: Any, depth: int) -> _Text:
    found = _text_of(value, depth)
    return found._replace(unknown=()) if name in _SPOKEN else found


def _of_fields(item: Mapping[str, Any], result: Sequence[_Text], depth: int) -> _Text:
    words = next((each for each in result if each.shape in {"text", "refusal"}), None)
    given = item.get("refusal")
    refusal = _NULL if isinstance(given, bool) else _text_of(given, depth)
    if refusal.shape == "text":
        text = refusal.text if words is None or words.text == refusal.text else f"{words.text}\n{refusal.text}"
        return _Text(text, "refusal", () if words is None else words.unknown)
    if words is not None:
        return words._replace(shape="refusal") if given is True else words
    return _without_text(item, result)


def _without_text(item: Mapping[str, Any], found: Sequence[_Text]) -> _Text:
    kind = _kind(item)
    if any(item.get(name) for name in _CALLS) or kind.endswith(_CALL_TYPES):
        return _Text("", "tool_call")
    media = _media_of_kind(kind)
    media += [_MEDIA_FIELDS[field.lower()] for field in item if field.lower() in _MEDIA_FIELDS]
    if media:
        return _Text("", media[0])
    nothing = _NULL if found or "refusal" in item else _UNKNOWN
    return next((each for each in found if each.shape != "null"), nothing)


def _kind(item: Mapping[str, Any]) -> str:
    return str(item.get("type") or "").lower()


def _media_of_kind(kind: str) -> list[Shape]:
    kind = kind.replace(_NO_MEDIA, "")
    return [shape for word, shape in _MEDIA.items() if word in kind]
