"""The text of a message, in whatever shape it is written; what holds none is shown as such and counted."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from archiver import events
from archiver.archive.rebuild import rebuild
from archiver.events import Event, Message, responses
from archiver.telemetry import metrics
from tests.support import servers
from tests.support.histories import TIMING, Archive
from tests.support.ingestion import take
from tests.support.payloads import chat, event

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

CALL = {"id": "call_1", "type": "function", "function": {"name": "price", "arguments": '{"of": "tea"}'}}

TEXT_PART = {"type": "text", "text": "Hi"}

# What a platform writes as `output`, and the messages in it.
SHAPES: dict[str, tuple[Any, list[tuple[str, str, str]]]] = {
    "text": ("Hello", [("assistant", "Hello", "text")]),
    "number": (5, [("assistant", "5", "text")]),
    "decimal number": ([2.5], [("assistant", "2.5", "text")]),
    "role and content": ({"role": "assistant", "content": "Hello"}, [("assistant", "Hello", "text")]),
    "refusal beside null": (
        [{"role": "assistant", "content": None, "refusal": "I cannot."}],
        [("assistant", "I cannot.", "refusal")],
    ),
    "refusal alone": ([{"role": "assistant", "refusal": "I cannot."}], [("assistant", "I cannot.", "refusal")]),
    "refusal beside empty": ([{"content": "", "refusal": "I cannot."}], [("assistant", "I cannot.", "refusal")]),
    "refusal beside text": (
        [{"role": "assistant", "content": "Let me see.", "refusal": "I cannot."}],
        [("assistant", "Let me see.\nI cannot.", "refusal")],
    ),
    "null refusal": ([{"role": "assistant", "content": "Hello", "refusal": None}], [("assistant", "Hello", "text")]),
    "refusal part": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}],
        [("assistant", "I cannot.", "refusal")],
    ),
    "bot and message": ([{"role": "bot", "message": "Hello", "time": 1.5}], [("assistant", "Hello", "text")]),
    "gemini": ([{"role": "model", "parts": [{"text": "Hel"}, {"text": "lo"}]}], [("assistant", "Hello", "text")]),
    "gemini candidates": (
        {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hello"}]}, "finishReason": "STOP"}]},
        [("assistant", "Hello", "text")],
    ),
    "gemini call": (
        [{"role": "model", "parts": [{"functionCall": {"name": "price", "args": {}}}]}],
        [("assistant", "", "tool_call")],
    ),
    "output_text without role": ([{"type": "output_text", "text": "Hello"}], [("assistant", "Hello", "text")]),
    "text alone": ({"text": "Hello"}, [("assistant", "Hello", "text")]),
    "transcript alone": ([{"transcript": "Hello"}], [("assistant", "Hello", "text")]),
    "spoken": (
        [{"role": "assistant", "content": None, "audio": {"id": "a", "data": "UklGRg==", "transcript": "Hello"}}],
        [("assistant", "Hello", "text")],
    ),
    "input_audio": (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}]}],
        [("user", "", "other")],
    ),
    "transcript of audio": (
        [
            {
                "role": "user",
                "content": [{"type": "input_audio", "input_audio": {"data": "UklG", "transcript": "Hello"}}],
            }
        ],
        [("user", "Hello", "text")],
    ),
    "caption": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}, "caption": "My cat"}]}],
        [("user", "My cat", "text")],
    ),
    "caption in an image": (
        [{"from": "491", "type": "image", "image": {"id": "1", "mime_type": "image/jpeg", "caption": "My cat"}}],
        [("assistant", "My cat", "text")],
    ),
    "slack, blocks alone": (
        [
            {
                "type": "message",
                "bot_id": "B1",
                "text": "",
                "blocks": [
                    {"type": "section", "text": {"type": "mrkdwn", "text": "Shipped. "}},
                    {
                        "type": "actions",
                        "elements": [{"type": "button", "text": {"type": "plain_text", "text": "Track"}}],
                    },
                ],
            }
        ],
        [("assistant", "Shipped. Track", "text")],
    ),
    "slack, rich text": (
        [
            {
                "text": "",
                "blocks": [
                    {
                        "type": "rich_text",
                        "elements": [
                            {
                                "type": "rich_text_section",
                                "elements": [
                                    {"type": "text", "text": "Hi "},
                                    {"type": "link", "url": "x", "text": "you"},
                                ],
                            }
                        ],
                    }
                ],
            }
        ],
        [("assistant", "Hi you", "text")],
    ),
    "slack, attachments alone": (
        [{"role": "user", "text": "", "attachments": [{"fallback": "Tea", "title": "Tea", "text": "Tea is hot."}]}],
        [("user", "Tea is hot.", "text")],
    ),
    "html beside an empty text": (
        [{"role": "bot", "text": "", "html": "<b>Hi</b>"}],
        [("assistant", "<b>Hi</b>", "text")],
    ),
    "langchain, serialised": (
        [
            {"lc": 1, "type": "constructor", "id": ["langchain"], "kwargs": {"content": "Hello", "type": "human"}},
            {
                "lc": 1,
                "type": "constructor",
                "id": ["langchain"],
                "kwargs": {"content": "Hi", "additional_kwargs": {}},
            },
        ],
        [("user", "Hello", "text"), ("assistant", "Hi", "text")],
    ),
    "blank content beside text": (
        [{"role": "bot", "content": " ", "message": "Hello"}],
        [("assistant", "Hello", "text")],
    ),
    "nested content": (
        [{"role": "assistant", "content": [[{"type": "text", "text": "Hel"}], {"content": [{"text": "lo"}]}]}],
        [("assistant", "Hello", "text")],
    ),
    "nested list": (
        [[["Hello"], [{"text": "World"}]]],
        [("assistant", "Hello", "text"), ("assistant", "World", "text")],
    ),
    "assistants api": (
        [{"role": "assistant", "content": [{"type": "text", "text": {"value": "Hello", "annotations": []}}]}],
        [("assistant", "Hello", "text")],
    ),
    "chat completion": (
        {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": "Hello"}}]},
        [("assistant", "Hello", "text")],
    ),
    "tool call": (
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
        [("assistant", "", "tool_call"), ("tool", "3", "text")],
    ),
    "tool call with text": (
        [{"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}],
        [("assistant", "Let me see.", "text")],
    ),
    "responses": (
        {
            "object": "response",
            "output": [
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "price", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]},
            ],
        },
        [
            ("assistant", "", "other"),
            ("assistant", "", "tool_call"),
            ("assistant", "3", "text"),
            ("assistant", "Hello", "text"),
        ],
    ),
    "anthropic": (
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t", "name": "price", "input": {"of": "tea"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"text": "3"}]}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "price", "input": {}}]},
        ],
        [("assistant", "Let me see.", "text"), ("user", "3", "text"), ("assistant", "", "tool_call")],
    ),
    "langchain": (
        [{"type": "human", "data": {"content": "Hello"}}, {"type": "ai", "content": "Hi"}],
        [("user", "Hello", "text"), ("assistant", "Hi", "text")],
    ),
    "langchain tuples": (
        [["human", "Hello"], ["ai", [{"type": "text", "text": "Hi"}]]],
        [("user", "Hello", "text"), ("assistant", "Hi", "text")],
    ),
    "two texts": (["agent", "please"], [("assistant", "agent", "text"), ("assistant", "please", "text")]),
    "capitals": (
        [{"Role": "user", "Content": "Hello"}, {"BODY": "Hi"}, {"Content": "no", "content": "yes"}],
        [("user", "Hello", "text"), ("assistant", "Hi", "text"), ("assistant", "yes", "text")],
    ),
    "gemini thoughts": (
        [{"role": "model", "parts": [{"text": "Hm", "thought": True}, {"text": "Hi"}]}],
        [("assistant", "Hi", "text")],
    ),
    "only gemini thoughts": (
        {"role": "model", "parts": [{"text": "Hm", "thought": True}]},
        [("assistant", '{"parts": [{"text": "Hm", "thought": true}]}', "other")],
    ),
    "sharegpt": (
        [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
        [("user", "Hello", "text"), ("assistant", "Hi", "text")],
    ),
    "chatgpt": (
        [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hel", "lo"]}}],
        [("user", "Hello", "text")],
    ),
    "sender": ([{"sender": "User", "body": "Hello"}], [("user", "Hello", "text")]),
    "sender of another kind": ([{"from": "+1 202 555 0143", "text": "Hello"}], [("assistant", "Hello", "text")]),
    "roles": (
        [
            {"role": role, "content": "x"}
            for role in ("Human", "AI", " bot ", "USER", "Assistant", "System", "narrator")
        ],
        [
            (role, "x", "text")
            for role in ("user", "assistant", "assistant", "user", "assistant", "system", "narrator")
        ],
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
        [("user", "", "other")],
    ),
    "image with text": (
        [{"role": "user", "content": [{"type": "image", "data": "UklG"}, {"type": "text", "text": "What is it?"}]}],
        [("user", "What is it?", "text")],
    ),
    "null": ([{"role": "assistant", "content": None}], [("assistant", "", "other")]),
    "role alone": ([{"role": "assistant", "id": "m", "createdAt": "2026-01-05"}], [("assistant", "", "other")]),
    "blank": ([{"role": "assistant", "content": " "}], [("assistant", " ", "other")]),
    "unknown": ([{"role": "assistant", "spoken": "Hello"}], [("assistant", '{"spoken": "Hello"}', "other")]),
    "unknown content": ([{"content": {"spoken": "Hello"}}], [("assistant", '{"spoken": "Hello"}', "other")]),
    "nothing": ([None, "", {}, [], False], []),
    "unknown part beside text": (
        [{"role": "assistant", "content": [TEXT_PART, {"type": "custom", "payload": {"words": "hello"}}]}],
        [("assistant", 'Hi\n{"payload": {"words": "hello"}}', "text")],
    ),
    "unknown parts between texts": (
        [{"role": "assistant", "content": [{"spoken": "a"}, TEXT_PART, [[{"spoken": ["b"]}]], "Ho"]}],
        [("assistant", 'HiHo\n{"spoken": "a"}\n{"spoken": ["b"]}', "text")],
    ),
    "unknown part beside a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}, {"spoken": "a"}]}],
        [("assistant", 'No.\n{"spoken": "a"}', "refusal")],
    ),
    "unknown part beside an image": (
        [{"role": "user", "content": [{"type": "image", "data": "UklG"}, {"spoken": "a"}]}],
        [("user", '{"spoken": "a"}', "other")],
    ),
    "unknown parts beside a tool call": (
        [{"role": "assistant", "content": [{"spoken": "a"}, {"spoken": "b"}], "tool_calls": [CALL]}],
        [("assistant", '[{"spoken": "a"}, {"spoken": "b"}]', "other")],
    ),
    "unknown part with a name": (
        [{"role": "assistant", "content": [TEXT_PART, {"type": "profile", "id": "p", "name": "Ann", "phone": "1"}]}],
        [("assistant", 'Hi\n{"phone": "1", "name": "Ann"}', "text")],
    ),
    "unknown part without text in its field": (
        [{"role": "assistant", "content": [TEXT_PART, {"type": "card", "text": "", "title": "Tea"}]}],
        [("assistant", 'Hi\n{"text": "", "title": "Tea"}', "text")],
    ),
    "unknown part with an image": (
        [{"role": "assistant", "content": [TEXT_PART, {"type": "card", "image": "data:,x", "title": "Tea"}]}],
        [("assistant", 'Hi\n{"title": "Tea"}', "text")],
    ),
    "vercel": (
        [
            {
                "role": "assistant",
                "content": "Hi",
                "parts": [
                    {"type": "step-start"},
                    TEXT_PART,
                    {"type": "tool-price", "toolCallId": "t", "state": "output-available", "output": {"usd": 3}},
                    {"type": "tool-invocation", "toolInvocation": {"toolName": "price", "args": {"of": "tea"}}},
                    {"type": "dynamic-tool", "toolName": "price", "input": {"of": "tea"}},
                    {"type": "file", "mediaType": "image/png", "url": "data:,x"},
                    {"type": "source-url", "sourceId": "1", "url": "https://tea.example", "title": "Tea"},
                    {"type": "data-weather", "id": "w", "data": {"city": "Paris"}},
                ],
            }
        ],
        [
            (
                "assistant",
                'Hi\n{"url": "https://tea.example", "title": "Tea"}\n{"data": {"city": "Paris"}}',
                "text",
            )
        ],
    ),
    "parts without content": (
        [
            {
                "role": "assistant",
                "content": [
                    TEXT_PART,
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "json", "rows": ["x"]}]},
                    {"type": "server_tool_use", "id": "t", "name": "search", "input": {"query": "tea"}},
                    {"type": "redacted_thinking", "data": "RXh"},
                    {"toolResult": {"toolUseId": "t", "content": [{"json": {"usd": "3"}}]}},
                    {"functionResponse": {"name": "price", "response": {"usd": "3"}}},
                    {"cachePoint": {"type": "default"}},
                    {"type": "custom", "id": "p", "status": "done", "payload": {"words": [" ", None, False]}},
                    {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
                    {"inlineData": {"mimeType": "image/png", "data": "UklG"}, "thoughtSignature": "RXh"},
                ],
            }
        ],
        [("assistant", "Hi", "text")],
    ),
}


def read_event(**fields: Any) -> Event:
    read = events.parse(event("chat.created", 1_767_603_600_000, chat(**fields)))
    assert isinstance(read, Event)
    return read


def kinds(messages: tuple[Message, ...] | None) -> list[tuple[str, str, str]]:
    return [(message.role, message.content, message.kind) for message in messages or ()]


@pytest.mark.parametrize(("output", "messages"), SHAPES.values(), ids=SHAPES)
def test_the_text_is_found_in_every_shape(output: Any, messages: list[tuple[str, str, str]]) -> None:
    content = read_event(input=None, output=output).chat
    assert content is not None
    assert kinds(content.output) == messages


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (name, SHAPES[name][1])
        for name in (
            "anthropic",
            "chatgpt",
            "langchain",
            "langchain tuples",
            "roles",
            "unknown parts between texts",
            "vercel",
        )
    ],
)
def test_a_history_is_read_like_a_webhook(name: str, messages: list[tuple[str, str, str]]) -> None:
    body = json.dumps({"session": {"id": "s", "messages": SHAPES[name][0]}}).encode()
    observed = responses.parse_history("s", 200, body)
    assert observed.type == responses.READ
    assert kinds(responses.parse_snapshot(observed.type, "s", body).messages) == messages


_words = st.text("abc <>&\"'\\/{}[]é\u00a0\n", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
_leaves = _words | st.integers(0, 9)
_fields = st.sampled_from(["content", "parts", "text", "message", "output_text", "transcript", "value", "body"])
_containers = st.recursive(
    st.builds(lambda name, leaf: {name: leaf}, _fields, _leaves),
    lambda inner: st.builds(lambda name, value: {"type": "x", name: value}, _fields, inner | st.lists(inner)),
    max_leaves=6,
)


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for name, inner in value.items() if name != "type" for text in texts(inner)]
    return [text for inner in value for text in texts(inner)] if isinstance(value, list) else [str(value)]


@settings(deadline=None, max_examples=200)
@given(st.lists(_containers, max_size=4))
@example([{"text": {"text": "a"}}, {"content": [{"parts": [{"value": 0}]}]}])
def test_no_text_in_a_field_that_is_known_disappears(parts: list[Any]) -> None:
    content = read_event(input=None, output=[{"role": "assistant", "content": parts}]).chat
    assert content is not None
    (message,) = content.output
    assert message.content == "".join(text for part in parts for text in texts(part))
    assert message.kind == ("text" if parts and message.content else "other")


_names = st.text("payload", min_size=1, max_size=6).map(lambda name: f"x{name}")
_unknown = st.dictionaries(
    _names,
    st.recursive(
        _words | st.integers() | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | _fields, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
).map(lambda fields: {"type": "custom", "id": "p"} | fields)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def nested(part: Any, levels: int) -> Any:
    for _ in range(levels):
        part = [part]
    return part


@settings(deadline=None, max_examples=200)
@given(st.lists(_unknown, max_size=4), st.sampled_from([0, 1, 5, 40]), st.booleans())
@example([{"type": "custom", "payload": {"words": "hello"}}], 0, False)
def test_no_text_of_an_unknown_part_disappears(unknown: list[Any], levels: int, is_history: bool) -> None:
    content = [TEXT_PART, *(nested(part, levels) for part in unknown), {"type": "image", "data": "UklG"}]
    body = json.dumps({"session": {"id": "s", "messages": [{"role": "assistant", "content": content}]}}).encode()
    found = (
        responses.parse_snapshot(responses.READ, "s", body).messages
        if is_history
        else events.messages_of([{"role": "assistant", "content": content}], "assistant")
    )
    (message,) = found or ()
    assert message.content.startswith("Hi")
    assert "UklG" not in message.content
    for part in unknown:
        for text in strings({name: value for name, value in part.items() if name not in {"type", "id"}}):
            assert json.dumps(text, ensure_ascii=False) in message.content
    assert events.messages_of([{"role": "assistant", "content": message.content}], "")[0].content == message.content


@pytest.mark.parametrize("deep", [*range(28, 40), 150])
def test_what_is_nested_too_deeply_is_a_message_without_text(deep: int) -> None:
    nested: Any = "Hello"
    for _ in range(deep):
        nested = [nested]
    content = read_event(input=None, output={"role": "assistant", "content": nested}).chat
    assert content is not None
    (message,) = content.output
    assert message.kind in {"text", "other"}
    assert message.content == "Hello" or "Hello" in message.content


CHAT = chat("c1", "s1")


@pytest.mark.parametrize(
    "document",
    [
        {"type": "chat.created", "data": json.dumps(CHAT)},
        {"type": "chat.created", "data": json.dumps({"chat": CHAT})},
        {"type": "chat.created", "chat": " " + json.dumps(CHAT)},
        {"type": "chat.created", "data": {"chat": json.dumps(CHAT)}},
        {"message": json.dumps({"type": "chat.created", "chat": CHAT})},
        json.dumps({"type": "chat.created", "chat": CHAT}),
    ],
    ids=lambda document: str(document)[:40],
)
def test_an_object_may_be_json_text(document: Any) -> None:
    read = events.parse(json.dumps(document).encode())
    reference = events.parse(json.dumps({"type": "chat.created", "chat": CHAT}).encode())
    assert isinstance(read, Event)
    assert isinstance(reference, Event)
    assert (read.session_id, read.chat_id, read.chat) == ("s1", "c1", reference.chat)
    assert read.dedupe_key == reference.dedupe_key


@pytest.mark.parametrize("text", ["{", "{not json}", "{}x", "{" + "[" * 500, "{\ud800}"], ids=ascii)
def test_what_only_looks_like_json_text_is_an_id_as_before(text: str) -> None:
    read = events.parse(json.dumps({"type": "chat.deleted", "chat": text}).encode())
    assert isinstance(read, Event) == ("\ud800" not in text)
    assert not isinstance(read, Event) or read.chat_id == text


@on_one_version
def test_messages_without_text_are_marked_in_webhooks_and_histories(archive: Archive) -> None:
    texts: list[dict[str, Any]] = [
        {"role": "user", "content": "What does tea cost?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": None, "refusal": "I must not say."},
        {"role": "assistant", "content": {"spoken": "Hello"}},
    ]
    body = json.dumps({"session": {"id": "session-1", "messages": [*texts, *texts]}}).encode()
    content = chat(input=texts[0]["content"], output=texts[1:])
    shown = [
        ("user", "What does tea cost?", "text"),
        ("assistant", "", "tool_call"),
        ("tool", "3", "text"),
        ("assistant", "I must not say.", "refusal"),
        ("assistant", '{"spoken": "Hello"}', "other"),
    ]
    query = "SELECT role, content, content_kind FROM analytics.messages ORDER BY position"
    archive.webhook(1, event("chat.created", None, content))  # type: ignore[arg-type]  # it reports no time
    assert archive.rows(query) == shown
    archive.reading(10, body)
    assert archive.rows(query) == [*shown, *shown]
    assert archive.rows("SELECT count(*) FROM archiver.messages WHERE source = 'history'") == [(5,)]
    archived = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == archived


def test_a_redacted_history_keeps_what_its_messages_are() -> None:
    texts = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": [{"spoken": "Hello"}]},
        {"role": "assistant", "content": None},
    ]
    body = json.dumps({"session": {"id": "s", "messages": texts}}).encode()
    before = responses.parse_snapshot(responses.READ, "s", body)
    redacted = responses.redacted_event("s", before, datetime(2026, 1, 5, tzinfo=UTC))
    assert kinds(responses.parse_snapshot(redacted.type, "s", redacted.body).messages) == kinds(before.messages)


def counted(shape: str) -> float:
    return REGISTRY.get_sample_value("archiver_messages_without_text_total", {"shape": shape}) or 0


@on_one_version
def test_messages_without_text_are_counted_once_by_what_they_are(engine: Engine) -> None:
    shapes = ("tool_call", "image", "null", "object")
    before = {shape: counted(shape) for shape in shapes}
    output = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": [{"type": "image", "data": "UklG"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "spoken": "secret words"},
    ]
    body = event("chat.created", 1_767_603_600_000, chat(output=output))
    take(engine, body)
    take(engine, body)  # a redelivery
    assert {shape: counted(shape) - before[shape] for shape in shapes} == {
        "tool_call": 2,
        "image": 1,
        "null": 1,
        "object": 1,
    }
    assert b"secret" not in metrics()
