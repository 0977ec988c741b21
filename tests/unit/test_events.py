"""Bytes to `Event` or `Malformed`: every accepted envelope, and any other bytes (I4)."""

import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archiver.events import (
    MAX_DEPTH,
    MAX_ID,
    MAX_MESSAGES,
    MAX_VARIABLE_DEPTH,
    REASONS,
    Chat,
    Event,
    Malformed,
    Message,
    parse,
)
from tests.support import payloads
from tests.support.payloads import created, envelope

AT = 1_705_311_000_000
AT_TIME = datetime(2024, 1, 15, 9, 30, tzinfo=UTC)


def read(document: Any) -> Event:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    event = parse(body)
    assert isinstance(event, Event), event
    return event


def refused(document: Any) -> str:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    malformed = parse(body)
    assert isinstance(malformed, Malformed), malformed
    assert malformed.body == body
    assert malformed.detail == REASONS[malformed.reason]
    return malformed.reason


def read_chat(**fields: Any) -> Chat:
    chat = read({"type": "chat.created", "chat": {"id": "1"} | fields}).chat
    assert chat is not None
    return chat


CHAT = payloads.chat()
ENVELOPES = {
    "message": {"message": {"type": "chat.created", "timestamp": AT, "chat": CHAT, "customer": {"x": 1}}},
    "message, event": {"message": {"event": "chat.created", "timestamp": AT, "chat": CHAT}},
    "flat type, chat": {"type": "chat.created", "timestamp": AT, "chat": CHAT},
    "flat type, data": {"type": "chat.created", "timestamp": AT, "data": CHAT},
    "flat event, chat": {"event": "chat.created", "timestamp": AT, "chat": CHAT},
    "flat event, data": {"event": "chat.created", "timestamp": AT, "data": CHAT},
    "data.chat": {"type": "chat.created", "timestamp": "2024-01-15T09:30:00Z", "data": {"chat": CHAT}},
    "event, data.chat": {"event": "chat.created", "timestamp": AT, "data": {"chat": CHAT}},
    "a message beside the type": {"type": "chat.created", "timestamp": AT, "message": "Chat created", "chat": CHAT},
    "an empty type": {"type": "", "event": "chat.created", "timestamp": AT, "chat": CHAT},
    "a type that is no text": {"type": 7, "event": " chat.created ", "timestamp": AT, "chat": CHAT},
}


@pytest.mark.parametrize("document", ENVELOPES.values(), ids=ENVELOPES)
def test_every_envelope_gives_the_same_event(document: dict[str, Any]) -> None:
    event = read(document)
    reference = read(payloads.created(at=AT))
    assert msgspec.structs.replace(event, body=b"") == msgspec.structs.replace(reference, body=b"")
    assert event.occurred_at == AT_TIME


def test_a_whole_chat_is_read() -> None:
    event = read(payloads.created("chat-9", "session-9", AT, externalChatId="ext"))
    assert (event.type, event.session_id, event.chat_id) == ("chat.created", "session-9", "chat-9")
    assert event.chat == Chat(
        assistant_id="assistant-1",
        external_id="ext",
        status="completed",
        cost=Decimal("0.0125"),
        variables={"customerTier": "Premium"},
        input=(Message("user", "question of chat-9"),),
        output=(Message("assistant", "answer to chat-9"),),
        created_at=datetime(2024, 1, 15, 9, 30, tzinfo=UTC),
        updated_at=datetime(2024, 1, 15, 9, 30, 1, tzinfo=UTC),
    )


def test_a_chat_of_nothing_but_its_id_is_enough() -> None:
    chat = read_chat()
    assert (chat.input, chat.output) == ((), ())
    assert [chat.cost, chat.variables, chat.status, chat.assistant_id, chat.created_at] == [None] * 5


@pytest.mark.parametrize(
    "document",
    [
        {"type": "chat.deleted", "chat": {"id": "7", "sessionId": "s"}},
        {"type": "chat.deleted", "chat": {"chatId": "7", "session": "s"}},
        {"type": "chat.deleted", "chat": {"id": "7", "session": {"id": "s"}}},
        {"type": "chat.deleted", "chat": "7", "sessionId": "s"},
        {"type": "chat.deleted", "chat": 7, "session": "s"},
        {"type": "chat.deleted", "data": "7", "session": {"id": "s"}},
        {"type": "chat.deleted", "chatId": 7, "sessionId": "s"},
        {"type": "chat.deleted", "data": {"chatId": "7", "sessionId": "s"}},
        {"type": "chat.deleted", "chat": None, "data": {"chat": {"id": "7"}}, "sessionId": "s"},
    ],
    ids=json.dumps,
)
def test_ids_are_found_wherever_they_stand(document: dict[str, Any]) -> None:
    event = read(document)
    assert (event.chat_id, event.session_id) == ("7", "s")


def test_labels_and_assistant_are_found_beside_the_chat() -> None:
    event = read(
        {
            "type": "chat.created",
            "chat": {"id": "1"},
            "session": {"id": "s", "name": "Call\x00", "status": "active"},
            "assistant": {"id": "a"},
            "assistantOverrides": {"variableValues": {"tier": 1}},
        }
    )
    assert event.chat is not None
    assert (event.session_id, event.chat.session_name, event.chat.session_status) == ("s", "Call\ufffd", "active")
    assert (event.chat.assistant_id, event.chat.variables) == ("a", {"tier": 1})


@pytest.mark.parametrize(
    ("given_input", "messages"),
    [
        ("hello", [("user", "hello")]),
        ("", []),
        (None, []),
        ([], []),
        (5, [("user", "5")]),
        ({"role": "system", "content": "be kind"}, [("system", "be kind")]),
        (["a", "b"], [("user", "a"), ("user", "b")]),
        ([{"role": "user", "content": "a"}, {"content": "b"}], [("user", "a"), ("user", "b")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], [("user", "ab")]),
        ([{"role": "user", "content": [{"type": "image", "url": "u"}]}], [("user", "", "image")]),
        ([{"role": "user", "content": None}], [("user", "", "null")]),
        ([{"role": "tool", "content": {"é": [1]}}], [("tool", '{"é": [1]}', "object")]),
        (
            [{"role": None, "content": 1.5}, {"unrelated": 1}, 3, None],
            [("user", "1.5"), ("user", '{"unrelated": 1}', "object"), ("user", "3")],
        ),
        ([{"role": "us\x00er", "content": "a\x00b"}], [("us\ufffder", "a\ufffdb")]),
    ],
    ids=repr,
)
def test_input_is_a_text_or_a_message_or_a_list(given_input: Any, messages: list[Any]) -> None:
    assert read_chat(input=given_input).input == tuple(Message(*message) for message in messages)


def test_output_without_roles_is_the_assistants() -> None:
    assert read_chat(output="hello").output == (Message("assistant", "hello"),)


def test_a_turn_of_too_many_messages_is_refused_and_the_longest_allowed_is_not() -> None:
    limit = [{"content": "x"}] * (MAX_MESSAGES - 1)
    assert len(read_chat(input="q", output=limit).output) == MAX_MESSAGES - 1
    assert refused({"type": "chat.created", "chat": {"id": "1", "input": ["q", "q"], "output": limit}}) == (
        "too_many_messages"
    )


@pytest.mark.parametrize(
    ("value", "chat_id"),
    [
        ("chat-1", "chat-1"),
        (17, "17"),
        (-17, "-17"),
        (0, "0"),
        (2**63, str(2**63)),
        (2**200, str(2**200)),
        (str(uuid.UUID(int=7)), str(uuid.UUID(int=7))),
        ("ид-1 😀", "ид-1 😀"),
        ("x" * MAX_ID, "x" * MAX_ID),
    ],
    ids=lambda value: str(value)[:20],
)
def test_ids_come_in_many_forms(value: Any, chat_id: str) -> None:
    event = read({"type": "chat.created", "chat": {"id": value, "sessionId": value}})
    assert (event.chat_id, event.session_id) == (chat_id, chat_id)


@pytest.mark.parametrize("value", ["a\x00b", "\ud800", "x" * (MAX_ID + 1), "\udfff" * 3], ids=ascii)
@pytest.mark.parametrize("name", ["id", "sessionId"])
def test_an_id_that_cannot_be_stored_is_refused(name: str, value: str) -> None:
    assert refused({"type": "chat.created", "chat": {"id": "1", "sessionId": "s"} | {name: value}}) == "unusable_id"


def test_two_integer_ids_beyond_a_double_stay_apart() -> None:
    one, other = 10**22 + 1, 10**22 + 2
    for surrogate in ("", "\ud800"):  # the latter takes the other decoder
        ids = {read({"type": "chat.created", "x": surrogate, "chat": {"id": n}}).chat_id for n in (one, other)}
        assert ids == {str(one), str(other)}


@pytest.mark.parametrize("value", [None, "", "  ", True, False, 1.5, [], {}, [1]], ids=repr)
def test_a_chat_event_without_a_usable_id_is_refused(value: Any) -> None:
    assert refused({"type": "chat.created", "chat": {"id": value}}) == "no_chat_id"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_json"),
        (b" ", "not_json"),
        (b"hello", "not_json"),
        (b'{"type": "chat.created"', "not_json"),
        (b'{"type": "chat.created", "chat": {"id": "\xff"}}', "not_json"),
        (b'{"type": "chat.created", "chat": {"id": "1", "\xff": 1}}', "not_json"),
        (b"\xff\xfe\xfd", "not_json"),
        (b"\x00\x00\x00\x00", "not_json"),
        (b'{"type": "chat.created"} {}', "not_json"),
        (b"[]", "not_an_object"),
        (b"null", "not_an_object"),
        (b"1e400", "not_an_object"),
        (b"NaN", "not_an_object"),
        (b"9" * 5000, "not_an_object"),
        (b'"chat.created"', "not_an_object"),
        (b"{}", "no_event_type"),
        (b'{"type": null, "event": 5}', "no_event_type"),
        (b'{"type": " "}', "no_event_type"),
        (b'{"message": {"type": {}}}', "no_event_type"),
        (b'{"type": "a\\u0000b"}', "unusable_id"),
        (b'{"type": "chat.created"}', "no_chat_id"),
        (b'{"type": "chat.created", "chat": []}', "no_chat_id"),
        (b"[" * 100_000, "nested_too_deeply"),
        (b'{"a":' * 100_000, "nested_too_deeply"),
        (
            b'{"type":"chat.created","chat":{"id":"1","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
            "nested_too_deeply",
        ),
        (b'{"x":"\\ud800","y":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested_too_deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_i4_what_cannot_be_read_says_why_and_keeps_its_bytes(body: bytes, reason: str) -> None:
    assert refused(body) == reason


def test_a_reason_holds_nothing_of_the_body() -> None:
    malformed = parse(b'{"type": "chat.created", "chat": {"secret": "hunter2"')
    assert isinstance(malformed, Malformed)
    assert "hunter2" not in malformed.reason + malformed.detail


def test_unknown_types_and_fields_are_kept_and_read_as_no_chat() -> None:
    event = read({"type": "assistant.renamed", "brand": "new", "chat": {"id": 5, "sessionId": "s", "new": [1]}})
    assert (event.type, event.chat_id, event.session_id, event.chat) == ("assistant.renamed", "5", "s", None)
    assert read({"event": "ping"}).chat_id is None
    assert read_chat(brand={"new": [1]}) == read_chat()


@pytest.mark.parametrize(
    ("value", "cost"),
    [
        ("0.0125", Decimal("0.0125")),
        ('"0.0125"', Decimal("0.0125")),
        ('" 1.50 "', Decimal("1.50")),
        ("3", Decimal(3)),
        ("0", Decimal(0)),
        ("-1", Decimal(-1)),
        ("1e-7", Decimal("1e-7")),
        ("0.1", Decimal("0.1")),  # not the double nearest to it
        ('"1e-7"', Decimal("1e-7")),
        ("999999999999", Decimal(999999999999)),
        ("1000000000000", None),
        ('"NaN"', None),
        ('"sNaN"', None),
        ('"Infinity"', None),
        ("NaN", None),
        ("Infinity", None),
        ("-Infinity", None),
        ("1e400", None),
        ("9" * 300, None),
        ("9" * 5000, None),
        ("-" + "9" * 5000, None),
        ('"' + "9" * 5000 + '"', None),
        ("true", None),
        ("null", None),
        ('"free"', None),
        ('""', None),
        ("[]", None),
        ("{}", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_cost_is_a_finite_number_or_nothing(value: str, cost: Decimal | None) -> None:
    event = read(b'{"type": "chat.created", "chat": {"id": "1", "cost": %s}}' % value.encode())
    assert event.chat is not None
    assert event.chat.cost == cost


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2024-01-15T09:30:00Z", AT_TIME),
        ("2024-01-15T09:30:00.000Z", AT_TIME),
        ("2024-01-15T09:30:00.123456789Z", AT_TIME.replace(microsecond=123456)),
        ("2024-01-15T10:30:00+01:00", AT_TIME),
        ("2024-01-14T23:30:00-1000", AT_TIME),
        ("2024-01-15T09:30:00", AT_TIME),
        ("2024-01-15 09:30", AT_TIME),
        ("2024-01-15", AT_TIME.replace(hour=0, minute=0)),
        (1_705_311_000, AT_TIME),
        (1_705_311_000.5, AT_TIME.replace(microsecond=500_000)),
        (1_705_311_000_000, AT_TIME),
        (1_705_311_000_123, AT_TIME.replace(microsecond=123_000)),
        (1_705_311_000_123_456, AT_TIME.replace(microsecond=123_456)),
        (1_705_311_000_123_456_000, AT_TIME.replace(microsecond=123_456)),
        ("1705311000", AT_TIME),
        ("1705311000.5", AT_TIME.replace(microsecond=500_000)),
        ("1705311000000", AT_TIME),
        ("1705311000123456", AT_TIME.replace(microsecond=123_456)),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-01:00", None),
        (-(10**30), None),
        (10**30, None),
        (10**300, None),
        (10**4000, None),
        (1e300, None),
        ("9" * 19, datetime(2286, 11, 20, 17, 46, 40, tzinfo=UTC)),
        ("9" * 20, None),
        ("yesterday", None),
        ("2024-13-45T99:00:00Z", None),
        ("", None),
        (True, None),
        ([], None),
        ({}, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_times_are_iso_text_or_epoch_numbers(value: Any, time: datetime | None) -> None:
    body = {"type": "chat.created", "timestamp": value, "chat": {"id": "1", "createdAt": value, "updatedAt": value}}
    event = read(body)
    assert event.chat is not None
    assert (event.occurred_at, event.chat.created_at, event.chat.updated_at) == (time, time, time)


@settings(deadline=None)
@given(st.datetimes(datetime(2015, 1, 1), datetime(2200, 1, 1)))  # noqa: DTZ001
def test_epochs_of_every_unit_are_exact(moment: datetime) -> None:
    time = moment.replace(tzinfo=UTC)
    microseconds = int((time - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 1_000_000 + time.microsecond
    milliseconds = microseconds // 1000
    in_milliseconds = time.replace(microsecond=time.microsecond // 1000 * 1000)
    assert read({"event": "x", "timestamp": microseconds}).occurred_at == time
    assert read({"event": "x", "timestamp": milliseconds}).occurred_at == in_milliseconds
    assert read({"event": "x", "timestamp": str(milliseconds)}).occurred_at == in_milliseconds


def test_nul_and_lone_surrogates_become_replacement_characters_in_texts_but_not_in_bytes() -> None:
    body = (
        b'{"type":"chat.created","chat":{"id":"1","input":"\\u0000\\ud800\\udc00\\udfff","status":"\\u0000",'
        b'"externalChatId":"\\ud800","assistantOverrides":{"variableValues":{"\\u0000":["\\ud800",{"k":"\\u0000"}]}}}}'
    )
    event = read(body)
    assert event.body == body
    assert event.chat is not None
    assert event.chat.input == (Message("user", "\ufffd\U00010000\ufffd"),)
    assert (event.chat.status, event.chat.external_id) == ("\ufffd", "\ufffd")
    assert event.chat.variables == {"\ufffd": ["\ufffd", {"k": "\ufffd"}]}


def test_variables_below_a_depth_are_cut_and_the_rest_is_kept() -> None:
    deep: Any = "bottom"
    for _ in range(MAX_VARIABLE_DEPTH + 10):
        deep = {"d": deep}
    variables = read_chat(assistantOverrides={"variableValues": {"deep": deep, "tier": "gold"}}).variables
    assert variables is not None
    assert variables["tier"] == "gold"
    assert b"bottom" not in msgspec.json.encode(variables)


@pytest.mark.parametrize("value", [None, [], "x", {}, 5], ids=repr)
def test_variables_are_an_object_or_nothing(value: Any) -> None:
    assert read_chat(assistantOverrides={"variableValues": value}).variables is None
    assert read_chat(assistantOverrides=value).variables is None


def test_ten_megabytes_of_text_are_read() -> None:
    for unit in ("x", "é", "\x00", "\ud800"):
        event = read(
            {"type": "chat.created", "chat": {"id": "1", "input": unit * 5_000_000, "output": "y" * 5_000_000}}
        )
        assert event.chat is not None
        assert len(event.chat.input[0].content) == 5_000_000


def test_of_duplicate_keys_the_last_counts_in_both_decoders() -> None:
    for extra in (b"", b',"x":"\\ud800"', b',"x":NaN'):
        event = read(b'{"type":"chat.created","chat":{"id":"1","id":"2","input":"a","input":"b"%s}}' % extra)
        assert event.chat is not None
        assert (event.chat_id, event.chat.input) == ("2", (Message("user", "b"),))


def test_a_byte_order_mark_does_not_hide_an_event() -> None:
    assert read(b"\xef\xbb\xbf" + payloads.created()).chat_id == "chat-1"


@pytest.mark.parametrize("number", ["1" * 20, "1" * 400, "1" * 4301, "1" * 100_000, "1e400", "-1e400", "1e-400"])
@pytest.mark.parametrize("extra", ["", ', "y": "\\ud800"'], ids=["", "surrogate"])
def test_numbers_beyond_every_size_stay_encodable(number: str, extra: str) -> None:
    body = (
        f'{{"type": "chat.created", "n": {number}, "chat": {{"id": "1", "input": {number}, "status": {number},'
        f' "createdAt": {number}, "cost": {number}, "assistantOverrides": {{"variableValues": {{"n": {number}}}}}'
        f"{extra}}}}}"
    )
    event = read(body.encode())
    assert event.chat is not None
    msgspec.json.encode(event.chat.variables)


# The dedupe key


def key(document: Any) -> bytes:
    return read(document).dedupe_key


def test_i3_the_same_fact_in_a_new_envelope_has_the_same_key() -> None:
    keys = {key(document) for document in ENVELOPES.values()}
    keys |= {key(payloads.created(at=AT + n)) for n in range(3)}
    assert len(keys) == 1


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("text", ["plain", "é😀", "\x00", "\ud800"], ids=ascii)
def test_i3_neither_key_order_nor_white_space_nor_escapes_change_the_key(text: str) -> None:
    document = {"type": "chat.created", "chat": payloads.chat(input=text, n=[{"b": 1, "a": 2}])}
    reference = key(document)
    assert key(shuffled(document)) == reference
    assert key(json.dumps(document, indent=4).encode()) == reference
    if "\ud800" not in text:
        assert key(json.dumps(document, ensure_ascii=False).encode()) == reference


def test_i3_an_oddity_of_the_envelope_that_takes_the_other_decoder_does_not_change_the_key() -> None:
    chat = b'{"id":"1","sessionId":"s","cost":0.1,"n":[1,-0.0,1e5,18446744073709551616,"\xc3\xa9"],"\xc3\xa9":null}'
    keys = {
        key(b'{"type":"chat.created","chat":%s%s}' % (chat, extra))
        for extra in (b"", b',"x":"\\ud800"', b',"x":NaN', b',"x":1e400', b',"timestamp":5')
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"input": "another"},
        {"output": []},
        {"status": "archived"},
        {"cost": 0.5},
        {"cost": None},
        {"updatedAt": "2024-01-15T09:30:09Z"},
        {"sessionId": "session-2"},
        {"unknown": 1},
        {"input": "\ud800"},
        {"id": "chat-2"},
    ],
    ids=ascii,
)
def test_i3_a_change_of_content_changes_the_key(change: dict[str, Any]) -> None:
    assert key({"type": "chat.created", "chat": payloads.chat(**change)}) != key(
        {"type": "chat.created", "chat": CHAT}
    )


def test_i3_types_do_not_share_keys() -> None:
    assert key({"type": "chat.created", "chat": {"id": "1"}}) != key({"type": "chat.deleted", "chat": {"id": "1"}})


def test_i3_order_within_a_list_is_content() -> None:
    assert key({"type": "chat.created", "chat": {"id": "1", "input": ["a", "b"]}}) != (
        key({"type": "chat.created", "chat": {"id": "1", "input": ["b", "a"]}})
    )


def test_i3_an_unknown_event_without_a_chat_is_known_by_its_bytes() -> None:
    assert key(b'{"type":"ping","n":1}') == key(b'{"type":"ping","n":1}')
    assert len({key(b'{"type":"ping","n":%d}' % n) for n in range(5)}) == 5
    assert key(b'{"type":"ping"}') != key(b'{"type":"pong"}')


# Whatever comes


def is_storable(text: str | None) -> bool:
    """Whether a Postgres text column takes it."""
    if text is None:
        return True
    text.encode()  # raises for a lone surrogate
    return "\x00" not in text


def texts(event: Event) -> list[str | None]:
    result: list[str | None] = [event.type, event.session_id, event.chat_id]
    if event.chat is not None:
        chat = event.chat
        result += [chat.assistant_id, chat.external_id, chat.status, chat.session_name, chat.session_status]
        for message in event.chat.input + event.chat.output:
            result += [message.role, message.content]
    return result


def check_any(body: bytes) -> None:
    result = parse(body)
    assert result.body == body
    if isinstance(result, Malformed):
        assert result.reason in REASONS
        return
    assert result == parse(body)
    assert all(map(is_storable, texts(result)))
    assert len(result.dedupe_key) == 32
    assert result.occurred_at is None or result.occurred_at.tzinfo is UTC
    if result.chat is not None:
        assert result.chat_id
        assert result.chat.cost is None or result.chat.cost.is_finite()
        assert b"\\u0000" not in msgspec.json.encode(result.chat.variables)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfe{\x00}\x00")
def test_i4_no_bytes_raise(body: bytes) -> None:
    check_any(body)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(payloads.created()) - 1), st.binary(max_size=3))
def test_i4_no_damage_to_a_body_raises(place: int, damage: bytes) -> None:
    body = payloads.created()
    check_any(body[:place] + damage + body[place + 1 :])


_ANY_TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["\ud800", "\x00", "1705311000", "2024-01-15", "\\"]
)
_ANY_NUMBER = st.floats() | st.integers(-(10**25), 10**25) | st.sampled_from([10**401, -(10**320), 2**64, 0])
_ANY_JSON = st.recursive(
    st.none() | st.booleans() | _ANY_TEXT | _ANY_NUMBER,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
_NAMES = [
    *("type", "event", "timestamp", "chat", "chatId", "data", "message", "session", "sessionId", "assistant", "id"),
    *("input", "output", "role", "content", "text", "cost", "status", "name", "createdAt", "updatedAt"),
    *("assistantId", "assistantOverrides", "variableValues", "externalChatId"),
]
_ANY_OBJECT = st.recursive(
    _ANY_JSON | st.sampled_from(["chat.created", "chat.deleted"]),
    lambda inner: st.dictionaries(st.sampled_from(_NAMES), inner, max_size=7) | st.lists(inner, max_size=3),
    max_leaves=15,
)


@settings(max_examples=200, deadline=None)
@given(_ANY_JSON)
def test_i4_no_json_raises(document: Any) -> None:
    check_any(json.dumps(document).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    event_type=st.sampled_from(["chat.created", "chat.deleted", "other"]),
    chat=st.dictionaries(st.sampled_from(_NAMES), _ANY_OBJECT, max_size=10),
    envelope=st.dictionaries(st.sampled_from(_NAMES), _ANY_OBJECT, max_size=4),
)
def test_i4_a_chat_with_any_fields_can_be_stored(
    event_type: str, chat: dict[str, Any], envelope: dict[str, Any]
) -> None:
    chat = {"id": "chat-1"} | chat
    check_any(json.dumps({"message": envelope | {"type": event_type, "chat": chat}}).encode())


@pytest.mark.parametrize("cost", ["1e999999999", "-9e9999999"])
def test_a_cost_beyond_decimal_does_not_raise(cost: str) -> None:
    event = parse(created(cost=cost))
    assert isinstance(event, Event)
    assert event.chat is not None
    assert event.chat.cost is None


@pytest.mark.parametrize(("levels", "is_read"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_a_body_has_at_most_200_levels(levels: int, is_read: bool) -> None:
    inner = levels - 2  # the body and the chat
    body = b'{"type":"chat.created","chat":{"id":"1","x":%s,"y":[]}}' % (b"[" * inner + b"]" * inner)
    assert MAX_DEPTH == 200
    assert isinstance(parse(body), Event) == is_read


def deeper(frames: int, call: Callable[[], Any]) -> Any:
    return deeper(frames - 1, call) if frames else call()


def test_parse_does_not_depend_on_the_callers_stack() -> None:
    for depth in (300, 500, 700, 900):
        body = b'{"type":"chat.created","chat":{"id":"1","x":%s}}' % (b"[" * depth + b"]" * depth)
        assert len({type(deeper(frames, partial(parse, body))) for frames in (0, 100, 300, 500)}) == 1


def test_a_chat_id_in_the_envelope_alone_is_the_same_fact_in_a_new_envelope() -> None:
    keys = set()
    for at in (AT, AT + 1):
        event = parse(envelope("chat.deleted", at, chatId="1"))
        assert not isinstance(event, Malformed)
        keys.add(event.dedupe_key)
    assert len(keys) == 1


def test_what_stands_beside_data_chat_is_read() -> None:
    event = parse(b'{"type":"chat.created","data":{"sessionId":"s","chat":{"id":"1"}}}')
    assert isinstance(event, Event)
    assert event.session_id == "s"


def test_i4_a_flat_chat_event_with_a_message_of_its_own_is_a_chat_event() -> None:
    event = parse(b'{"type":"chat.created","message":{"type":"text"},"chat":{"id":"a","sessionId":"s"}}')
    assert isinstance(event, Event)
    assert (event.type, event.chat_id) == ("chat.created", "a")


def test_i3_facts_that_differ_in_what_is_no_number_differ() -> None:
    keys = set()
    for cost in (b"NaN", b"null", b"1e400", b"9" * 5000, b"8" * 5000):
        event = parse(b'{"type":"chat.created","chat":{"id":"a","cost":%s}}' % cost)
        assert isinstance(event, Event)
        assert event.chat is not None
        assert event.chat.cost is None
        keys.add(event.dedupe_key)
    assert len(keys) == 5


@pytest.mark.parametrize("value", [{}, [], 1, None, True])
def test_i4_a_type_that_is_no_text_does_not_raise(value: Any) -> None:
    body = json.dumps({"type": value, "event": value, "message": {"type": value}}).encode()
    assert isinstance(parse(body), Malformed)
