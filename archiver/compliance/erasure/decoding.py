"""Decode the text in a body, through nested encodings, for searches. Pure.

Nested layers are decoded, up to `MAX_LAYERS`: UTF-8, UTF-16 and UTF-32 with and without a byte order
mark; gzip, zlib and deflate; JSON with any escapes, and JSON in its strings; JSON that is broken or cut off; forms
and percent encoding; HTML entities; base64, base64url and lists of byte values of text or of compressed text; bytes
decoded as Latin-1 or Windows-1252. Hexadecimal, quoted-printable, encrypted and proprietary encodings are not
decoded.
"""

import binascii
import json
import re
import sys
import zlib
from base64 import b64decode
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_plus

import msgspec

from archiver.events.normal import normal_text

MAX_LAYERS = 40  # nested
MAX_CHARACTERS = 32 * 1_048_576  # in all layers of one body together, or
MAX_GROWTH = 16  # times the length of the body, if that is more
MAX_TEXTS = 500_000

_WORDS = re.compile(r"[A-Za-z0-9_-]+")


class Decoded(msgspec.Struct, frozen=True, dict=True):
    """The texts of all layers. `is_whole`: every byte was decoded within the limits."""

    texts: tuple[str, ...]
    is_whole: bool

    @cached_property
    def words(self) -> frozenset[str]:
        """Return every run of ASCII letters, digits, `_` and `-`."""
        return frozenset(word for text in self.texts for word in _WORDS.findall(text))


def decode(body: bytes) -> Decoded:
    """Return the texts in a body. Never raises; the limits above bound time and memory."""
    walk = _Decoder(max(MAX_CHARACTERS, MAX_GROWTH * len(body)))
    walk.add_bytes(body, 0)
    walk.run()
    return Decoded(tuple(walk.texts), walk.is_whole)


class _Decoder:
    """A decoder of one body: the texts found so far, and those whose inner layers are still to be decoded."""

    def __init__(self, limit: int) -> None:
        self.texts: dict[str, None] = {}
        self.is_whole = True
        self._left = limit
        self._waiting: deque[tuple[str, int]] = deque()

    def run(self) -> None:
        while self._waiting:
            text, layer = self._waiting.popleft()
            for inner in _layers_of(text):
                if isinstance(inner, bytes):
                    self.add_bytes(inner, layer + 1)
                else:
                    self.add(inner, layer + 1)

    def add(self, text: str, layer: int) -> None:
        if not text or text in self.texts:
            return
        self._left -= len(text)
        if self._left < 0 or layer > MAX_LAYERS or len(self.texts) >= MAX_TEXTS:
            self.is_whole = False
            return
        self.texts[text] = None
        if len(text) >= _MIN_LENGTH and _HINT.search(text):
            self._waiting.append((text, layer))

    def add_bytes(self, body: bytes, layer: int) -> None:
        packed = _decompress(body, max(self._left, 0) + 1)
        if packed is not None:
            inner, is_whole = packed
            self.is_whole &= is_whole
            if layer < MAX_LAYERS:
                self.add_bytes(inner, layer + 1)
            else:
                self.is_whole = False
            return
        item, is_whole = _read(body)
        self.is_whole &= is_whole
        for text in item:
            self.add(text, layer)


# Text that is short or contains none of these has no further layer.
_MIN_LENGTH = 2
_HINT = re.compile(r'[\\"\[{%&+=\t\r\n\f\v]|  |[^\x00-\x7f]|[A-Za-z0-9/_-]{16}')


def _layers_of(text: str) -> Iterator[str | bytes]:
    document = _json_of(text)
    if document is not None:
        yield from _strings_of(document)
    else:
        yield normal_text(text)
        yield from _of_broken_json(text)
    yield from _of_form(text)
    yield from _of_base64(text)
    yield from _of_misread(text)


def _json_of(text: str) -> Any:
    """Parse JSON, with objects as lists of pairs so that repeated names are kept; None if it is not JSON."""
    start = text.lstrip("\ufeff \t\r\n")
    if start[:1] not in ('"', "[", "{"):
        return None
    try:
        return json.loads(start, strict=False, object_pairs_hook=_Pairs, **_NUMBERS)
    except (ValueError, RecursionError):
        return None


_NUMBERS: Any = {"parse_int": str, "parse_float": str, "parse_constant": str}


class _Pairs(list[Any]):
    """An object of a JSON document, as a list of pairs of name and value."""


def _strings_of(document: Any) -> Iterator[str | bytes]:
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            if not isinstance(item, _Pairs) and all(map(_is_byte, item)):
                yield from _if_text(bytes(map(int, item)))
            waiting.extend(reversed([each for pair in item for each in pair] if isinstance(item, _Pairs) else item))


def _is_byte(item: Any) -> bool:
    return isinstance(item, str) and _BYTE.fullmatch(item) is not None


_BYTE = re.compile(r"[0-9]{1,2}|1[0-9]{2}|2[0-4][0-9]|25[0-5]", re.ASCII)
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# The last piece may be unterminated. Without that alternative and `++`, each escaped quote in it would start a new
# search.
_QUOTED = re.compile(r'"((?:[^"\\]++|\\.)*+)(?:"|\\?\Z)', re.DOTALL)


def _of_broken_json(text: str) -> Iterator[str]:
    """Yield the quoted parts, even unterminated ones, and the whole text with escapes resolved."""
    if '"' in text:
        for piece in _QUOTED.findall(text):
            yield _unescape(piece)
    if "\\" in text:
        yield _unescape(text)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    plain = _ESCAPE.sub(_character, text)
    return _joined(plain)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _joined(text: str) -> str:
    """Join each pair of surrogates into one character."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _character(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3] or found[4]
    if digits is None:
        return _SHORT.get(found[5], found[5])
    code = int(digits, 16)
    return chr(code) if code <= sys.maxunicode else found[0]


_IS_FORM = re.compile(r"\s*[^\s=&{}\[\]\"<>]{1,200}=")
_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_PERCENT_U = re.compile(r"%u([0-9a-fA-F]{4})")  # from JavaScript's `escape`, for characters outside Latin-1


def _of_form(text: str) -> Iterator[str]:
    if _BASE64.fullmatch(text):  # here `=` is padding, and `+` is not a space
        return
    if _PERCENT.search(text):
        for encoding in ("utf-8", "latin-1"):
            yield unquote(text, encoding)
            yield unquote_plus(text, encoding)
    if "%u" in text:
        yield _joined(_PERCENT_U.sub(lambda found: chr(int(found[1], 16)), text))
    if _IS_FORM.match(text) or ("=" in text and "&" in text):
        with suppress(ValueError):
            for name, value in parse_qsl(text.strip(), keep_blank_values=True):
                yield name
                yield value


_BASE64 = re.compile(r"\s*([A-Za-z0-9+/_\r\n-]{16,}={0,2})\s*")
_BASE64_INSIDE = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")
# Lines of 64 or 76 characters, as PEM and MIME write them (RFC 7468, section 2; RFC 2045, section 6.8). A match
# can start only where a run of such characters starts: trying each character would double the cost of the search.
_BASE64_LINES = re.compile(r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{60,76}\r?\n)+[A-Za-z0-9+/]{1,76}={0,2}")


def _of_base64(text: str) -> Iterator[bytes]:
    """Yield the decoded bytes of the text if it is base64; otherwise, of each run of base64 characters in it."""
    whole = _BASE64.fullmatch(text)
    inside = () if whole else (*_BASE64_INSIDE.findall(text), *_BASE64_LINES.findall(text))
    for packed in [whole[1]] if whole else inside:
        plain = re.sub(r"[\r\n=]", "", packed).translate(_FROM_URL)
        with suppress(binascii.Error, ValueError):
            body = b64decode(plain + "=" * (-len(plain) % 4), validate=True)
            # A word may look like base64 by chance: only bytes that are compressed or text count.
            if _is_packed(body) or _makes_sense(body):
                yield body


_FROM_URL = str.maketrans("-_", "+/")


def _if_text(body: bytes) -> Iterator[bytes]:
    """Yield these bytes only if they are text or compressed: a list of numbers may look like bytes by chance."""
    if _is_packed(body) or _makes_sense(body):
        yield body


def _of_misread(text: str) -> Iterator[bytes]:
    """Yield the bytes of UTF-8 or of compressed text that a writer decoded as single-byte characters."""
    for encoding in () if text.isascii() else ("latin-1", "cp1252"):
        with suppress(UnicodeEncodeError):
            body = text.encode(encoding)
            if _strictly(body, "utf-8") is not None or (_is_packed(body) and _decompress(body, _AT_ONCE)):
                yield body


_GZIP = b"\x1f\x8b"
_ZLIB = re.compile(rb"\x78[\x01\x5e\x9c\xda]")
_ANY_FORMAT, _RAW = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS


def _is_packed(body: bytes) -> bool:
    return body.startswith(_GZIP) or _ZLIB.match(body) is not None


def _decompress(body: bytes, limit: int, layers: int = 4) -> tuple[bytes, bool] | None:
    """Return at most `limit` decompressed bytes and whether they are complete; None if the body is not compressed."""
    if _is_packed(body):
        unpacked, rest, is_whole = _inflate(body, _ANY_FORMAT, limit)
        pieces = [unpacked]
        while rest.startswith(_GZIP) and is_whole:  # concatenated members (RFC 1952, section 2.2)
            unpacked, rest, is_whole = _inflate(rest, _ANY_FORMAT, limit - sum(map(len, pieces)))
            pieces.append(unpacked)
        whole = b"".join(pieces)
        return (whole, is_whole and not rest.strip(b"\0")) if whole or is_whole else None
    if _strictly(body, "utf-8") is None:
        unpacked, rest, is_whole = _inflate(body, _RAW, limit)
        # Raw deflate has no signature, so its content must be text, here or a few layers below.
        if (
            is_whole
            and not rest
            and (_makes_sense(unpacked) or (layers and _decompress(unpacked, limit, layers - 1) is not None))
        ):
            return unpacked, True
    return None


def _inflate(body: bytes, window: int, limit: int) -> tuple[bytes, bytes, bool]:
    """Return the decompressed content, the bytes after the stream, and whether the stream is complete."""
    inflater = zlib.decompressobj(window)
    pieces = []
    try:
        while body and limit > 0 and not inflater.eof:
            piece = inflater.decompress(body, min(limit, _AT_ONCE))
            pieces.append(piece)
            limit -= len(piece)
            body = inflater.unconsumed_tail
    except zlib.error:
        return b"".join(pieces), b"", False
    return b"".join(pieces), inflater.unused_data, inflater.eof


_AT_ONCE = 65_536  # bytes per step; the data before a damaged byte is kept


_MARKS = (
    ("utf-8-sig", b"\xef\xbb\xbf"),
    ("utf-32", b"\xff\xfe\0\0"),
    ("utf-32", b"\0\0\xfe\xff"),
    ("utf-16", b"\xff\xfe"),
    ("utf-16", b"\xfe\xff"),
)
_UNMARKED = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


def _read(body: bytes) -> tuple[list[str], bool]:
    """Return the bytes as text in every possible encoding, and whether one encoding decodes all of them."""
    for encoding, mark in _MARKS:
        if body.startswith(mark):
            with suppress(UnicodeDecodeError):
                return [body.decode(encoding)], True
    plain = _strictly(body, "utf-8")
    if plain is not None and "\0" not in plain:
        return [plain], True
    result = [text for encoding in _UNMARKED if (text := _strictly(body, encoding)) is not None]
    # ASCII decoded as UTF-16 looks like Chinese: without a byte order mark, UTF-16 and UTF-32 require a NUL byte.
    if plain is not None or (b"\0" in body and any(map(_is_printable, result))):
        return result, True
    return [*result, *_leniently(body)], False


def _makes_sense(body: bytes) -> bool:
    """Return whether these bytes are certainly text."""
    item, is_whole = _read(body)
    return is_whole and bool(body) and any(map(_is_printable, item))


def _strictly(body: bytes, encoding: str) -> str | None:
    try:
        return _joined(body.decode(encoding, "surrogatepass"))
    except UnicodeDecodeError:
        return None


def _leniently(body: bytes) -> list[str]:
    """Return the possible texts of bytes that are damaged or in a single-byte encoding."""
    result = [body.decode("utf-8", "replace"), body.decode("latin-1")]
    if b"\0" in body:
        for encoding in _UNMARKED[1:]:
            width = 4 if "32" in encoding else 2
            result += [body[start:].decode(encoding, "replace") for start in range(width)]
    return result


_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"
)


def _is_printable(text: str) -> bool:
    """Return whether the text has no control, private-use or unassigned character."""
    if _UNPRINTABLE.search(text):
        return False
    return text.isascii() or all(each.isprintable() or each.isspace() or each in _ALLOWED for each in set(text))


# Format characters and the EBCDIC line end occur in normal text.
_FORMAT = (range(0x200B, 0x2010), range(0x202A, 0x202F), range(0x2060, 0x2065), (0xFEFF, 0xAD, 0x85))
_ALLOWED = frozenset(chr(code) for codes in _FORMAT for code in codes)
