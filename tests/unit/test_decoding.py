"""A body is searched by its decoded text, in any encoding, within limits of time and memory."""

import base64
import gzip
import html
import json
import unicodedata
import zlib
from collections.abc import Callable
from random import Random
from time import process_time
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archiver.compliance.erasure import decoding, mentions
from archiver.compliance.erasure.decoding import decode
from tests.support.encodings import of_every_character

MARK = "s-1+ж/é&z"  # each of its characters is escaped by some writer
DOCUMENT = {"sessionId": MARK, "n": 12345678901234567890, "said": ["näh", None, True]}
PLAIN = json.dumps(DOCUMENT, ensure_ascii=False)


def raw_deflate(body: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(body) + deflate.flush()


WRITTEN: dict[str, bytes] = {
    "json": json.dumps(DOCUMENT).encode(),
    "php": json.dumps(DOCUMENT).replace("/", "\\/").encode(),
    "dotnet": PLAIN.replace("+", "\\u002B").replace("&", "\\u0026").encode(),
    "go": PLAIN.replace("&", "\\u0026").encode(),
    "every character": of_every_character(MARK).encode(),
    "json twice": json.dumps({"payload": json.dumps({"inner": json.dumps(DOCUMENT)})}).encode(),
    "json five times": json.dumps(json.dumps(json.dumps(json.dumps(json.dumps(DOCUMENT))))).encode(),
    "a key": json.dumps({MARK: 1}).encode(),
    "an equal name": b'{"id": ' + json.dumps(MARK).encode() + b', "id": "other"}',
    "lines": b'{"a": 1}\n' + json.dumps(DOCUMENT).encode() + b'\n{"b": 2}\n',
    "jsonp": b"callback(" + json.dumps(DOCUMENT).encode() + b");",
    "broken": json.dumps(DOCUMENT)[:-1].encode() + b" broken",
    "broken outside": json.dumps({"payload": json.dumps(DOCUMENT)}).encode()[:-1],
    "broken outside, twice": json.dumps([json.dumps({"payload": json.dumps(DOCUMENT)})]).encode()[:-1],
    "cut off": json.dumps({"payload": json.dumps([MARK, "x" * 50])}).encode()[:-20],
    "an odd quote": b'{"said": "6" wide", "id": ' + json.dumps(MARK).encode() + b"}",
    "composed otherwise": unicodedata.normalize("NFD", PLAIN).encode(),
    "html": html.escape(PLAIN).encode(),
    "xml": f"<a id='x'>{html.escape(MARK)}</a>".encode(),
    "form": urlencode({"payload": PLAIN}).encode(),
    "form of escapes": urlencode({"a": "1", "payload": json.dumps(DOCUMENT)}).encode(),
    "form, unescaped": b"a=b&payload=" + of_every_character(MARK).encode(),
    "path": ("/s?id=" + quote(MARK, safe="")).encode(),
    "plus": ("id is " + quote_plus(MARK)).encode(),
    "percent twice": quote(quote(MARK, safe=""), safe="").encode(),
    "percent of latin-1": quote("é-1", safe="", encoding="latin-1").encode() + b" " + PLAIN.encode(),
    "utf-8 with mark": PLAIN.encode("utf-8-sig"),
    "utf-16 with mark": PLAIN.encode("utf-16"),
    "utf-16-le": PLAIN.encode("utf-16-le"),
    "utf-16-be": PLAIN.encode("utf-16-be"),
    "utf-32 with mark": PLAIN.encode("utf-32"),
    "utf-32-le": PLAIN.encode("utf-32-le"),
    "utf-32-be": PLAIN.encode("utf-32-be"),
    "gzip": gzip.compress(PLAIN.encode()),
    "gzip, several members": gzip.compress(PLAIN[:9].encode()) + gzip.compress(PLAIN[9:].encode()),
    "gzip of gzip of utf-16": gzip.compress(gzip.compress(PLAIN.encode("utf-16-le"))),
    "zlib": zlib.compress(PLAIN.encode()),
    "deflate": raw_deflate(PLAIN.encode()),
    "base64": json.dumps({"body": base64.b64encode(PLAIN.encode()).decode()}).encode(),
    "base64url": base64.urlsafe_b64encode(PLAIN.encode()).rstrip(b"="),
    "base64 of gzip": json.dumps({"data": base64.b64encode(gzip.compress(PLAIN.encode())).decode()}).encode(),
    "base64 in lines": base64.encodebytes(PLAIN.encode() * 3),
    "base64 in lines of a form": (
        b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        + base64.encodebytes(b"x" * 40 + PLAIN.encode()).replace(b"\n", b"\r\n")
        + b"--b--\r\n"
    ),
    "buffer of Node.js": json.dumps({"body": {"type": "Buffer", "data": list(PLAIN.encode())}}).encode(),
    "buffer of gzip": json.dumps({"type": "Buffer", "data": list(gzip.compress(PLAIN.encode()))}).encode(),
    "utf-8 read as latin-1": json.dumps({"body": PLAIN.encode().decode("latin-1")}).encode(),
    "utf-8 read as latin-1 twice": PLAIN.encode().decode("latin-1").encode().decode("latin-1").encode(),
    "gzip read as latin-1": json.dumps({"body": gzip.compress(PLAIN.encode()).decode("latin-1")}).encode(),
    "utf-8 read as windows-1252": json.dumps({"body": f"“{MARK}".encode().decode("cp1252")}).encode(),
    "code points": PLAIN.replace(MARK, "".join(f"\\u{{{ord(each):x}}}" for each in MARK)).encode(),
    "escape of JavaScript": quote(PLAIN.replace("ж", "@"), encoding="latin-1").replace("%40", "%u0436").encode(),
    "data url": b"data:application/json;base64," + base64.b64encode(PLAIN.encode()),
    "a control character": PLAIN.encode() + b"\x01",
    "surrogates of their own": b'{"a": "\xed\xa0\x80", "id": ' + json.dumps(MARK).encode() + b"}",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_i8_it_is_found_however_it_was_written(name: str) -> None:
    body = decode(WRITTEN[name])
    assert mentions.of_any([MARK])(body)
    assert body.is_whole
    assert not mentions.of_any([MARK + "2", "2" + MARK])(body)


DAMAGED: dict[str, bytes] = {
    "one byte": PLAIN.encode() + b"\xff",
    "gzip cut off": gzip.compress(PLAIN.encode() + Random(7).randbytes(4000))[:-1000],
    "utf-16 cut off": PLAIN.encode("utf-16-le") + b"x",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_i8_of_what_is_damaged_the_rest_is_searched_and_it_is_reported(name: str) -> None:
    body = decode(DAMAGED[name])
    assert mentions.of_any([MARK])(body)
    assert not body.is_whole


@pytest.mark.parametrize(
    "body",
    [
        Random(7).randbytes(4000),
        b"\x28\xb5\x2f\xfd" + Random(7).randbytes(400),
        PLAIN.replace("ж", "").encode("latin-1"),
        b"\x1f\x8b\x08\x00" + Random(7).randbytes(40),
        json.dumps(PLAIN).encode("cp037"),
    ],
)
def test_i8_what_cannot_be_decoded_is_reported(body: bytes) -> None:
    assert not decode(body).is_whole


@pytest.mark.parametrize("body", [b"", b" ", b"{", b"nothing of anybody", "Grüße 👩‍👩‍👧".encode(), b"\xef\xbb\xbf"])
def test_what_is_short_or_plain_is_whole(body: bytes) -> None:
    assert decode(body).is_whole


def test_a_number_is_found_as_it_was_sent() -> None:
    assert mentions.of_any(["12345678901234567890"])(decode(PLAIN.encode()))


def test_words_end_where_an_id_ends() -> None:
    body = decode(b'{"id": "chat-12"}')
    assert mentions.of_any(["chat-12"])(body)
    assert not mentions.of_any(["chat-1", "hat-12", "12"])(body)


def test_a_bomb_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_CHARACTERS", 1_000_000)
    bomb = gzip.compress(gzip.compress(bytes(300_000_000), 9), 9)
    body = decode(bomb)
    assert not body.is_whole
    assert sum(map(len, body.texts)) <= 1_000_000


def test_i12_quotes_without_end_take_time_in_proportion() -> None:
    def seconds(quotes: int) -> float:
        started = process_time()
        assert "erased-1" in decode(b'{"id": "erased-1", "a": "' + b'\\"' * quotes).words
        return process_time() - started

    few = min(seconds(50_000) for _ in range(3))
    assert seconds(500_000) < 40 * few  # 100 times if it grew with the square


def test_nesting_is_bounded() -> None:
    body = b"deepest"
    for _ in range(60):
        body = gzip.compress(body)
    assert not decode(body).is_whole
    assert decode(b"[" * 100_000).texts
    assert decode(b'{"a":' * 5_000 + b'"s-1"' + b"}" * 5_000).words >= {"s-1"}


Writer = Callable[[str], str]
WRITERS: dict[str, Writer] = {
    "json": json.dumps,
    "json, unescaped": lambda text: json.dumps({"a": [text]}, ensure_ascii=False),
    "every character": of_every_character,
    "form": lambda text: urlencode({"a": "1", "payload": text}),
    "percent": lambda text: quote(text, safe=""),
    "html": html.escape,
    "base64": lambda text: "data:," + base64.b64encode(text.encode()).decode(),
    "base64 of gzip": lambda text: base64.b64encode(gzip.compress(text.encode())).decode(),
    "broken": lambda text: '{"x": ' + json.dumps(text) + " broken",
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
PACKERS: tuple[Callable[[bytes], bytes], ...] = (bytes, gzip.compress, zlib.compress, raw_deflate)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(sorted(WRITERS)), max_size=4),
    st.sampled_from(ENCODINGS),
    st.lists(st.sampled_from(PACKERS), max_size=2),
    st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=3, max_size=12),
)
@example(["json", "broken", "json", "html"], "utf-16-le", [raw_deflate], "çé1")
def test_i8_it_is_found_through_any_layers(
    writers: list[str], encoding: str, packers: list[Callable[[bytes], bytes]], mark: str
) -> None:
    texts = f"this is about {mark}, is it not"
    for name in writers:
        texts = WRITERS[name](texts)
    body = texts.encode(encoding)
    for pack in packers:
        body = pack(body)
    result = decode(body)
    assert mentions.of_any([mark])(result)
    assert mentions.of_variable("about", mark)(result)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_decoding_ends_for_any_bytes(body: bytes) -> None:
    assert isinstance(decode(body).is_whole, bool)
    mentions.ids(decode(body))
