"""Decode JSON tolerantly, and compute the digest that identifies a fact."""

import hashlib
import json
import math
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Context, Decimal, InvalidOperation
from typing import Any

import msgspec

from archiver.events.shapes import MAX_DEPTH, UnreadableError

_MAX_DIGITS = 400  # digits of an integer; longer integers stay text


class Exact(float):
    """A JSON number with a fraction or exponent: the nearest double; `text` is the number as sent."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "Exact":
        """Return the number in this text. Raises `ValueError` if it is beyond the range of a double."""
        value = super().__new__(cls, text)
        if not math.isfinite(value):
            raise ValueError("beyond a double")
        value.text = text
        return value


class Beyond(str):
    """A JSON number beyond the range of a double, or an integer of more than 400 digits: the string as sent."""

    __slots__ = ()


_DECODER = msgspec.json.Decoder(float_hook=Exact)


def decode(body: bytes) -> Any:
    """Parse JSON; accept lone surrogates, NaN and numbers of any length. Numbers with a fraction are `Exact`.

    Raises `UnreadableError`.
    """
    try:
        document = _load(body)
    except RecursionError:
        raise UnreadableError("nested_too_deeply") from None
    # Parsing must not depend on the stack depth of the caller; few bodies have enough brackets to need this check.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _depth(document) > MAX_DEPTH:
        raise UnreadableError("nested_too_deeply")
    return document


def _load(body: bytes) -> Any:
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    # The standard library is slower, but accepts lone surrogates, NaN and numbers out of range.
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


# Unsupported numbers remain text, so that facts that differ only in them remain different.


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= _MAX_DIGITS else Beyond(text)


def _float(text: str) -> Exact | str:
    try:
        return Exact(text)
    except ValueError:
        return Beyond(text)


def digest(fact: list[Any]) -> bytes:
    """Return the SHA-256 over the canonical JSON of a fact.

    A number with a fraction or an exponent counts as the nearest double if its digits are those of this double,
    rounded to the same number of digits: `0.1`, `0.10` and `0.10000000000000001` are equal. Any other number keeps
    its digits.
    """
    try:
        canonical = msgspec.json.encode(fact, order="deterministic", enc_hook=_canonical)
    except (UnicodeEncodeError, OverflowError):
        canonical = json.dumps(_plain(fact), sort_keys=True, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(canonical).digest()


_SHORT = 16  # a double preserves the digits of any number with at most this many characters and no exponent
_MAX_DOUBLE_DIGITS = 767  # significant digits of a double, written in full


def _canonical(number: Exact | Beyond) -> float | msgspec.Raw:
    if isinstance(number, Exact) and _holds(number):
        return float(number)
    return msgspec.Raw(_digits(number).encode())


def _holds(number: Exact) -> bool:
    """Return whether the digits of a number are those of the nearest double, rounded either way in a tie."""
    text = number.text
    if len(text) <= _SHORT and "e" not in text and "E" not in text:
        return True
    try:
        sent = Decimal(text)
    except InvalidOperation:  # an exponent of 19 digits
        return False
    digits = min(len(sent.as_tuple().digits), _MAX_DOUBLE_DIGITS)
    exact = Decimal(float(number))
    return any(sent == Context(digits, each).plus(exact) for each in (ROUND_HALF_UP, ROUND_HALF_DOWN))


def _digits(number: Exact | Beyond) -> str:
    """Return a number as JSON, in the same form however it was written."""
    text = number.text if isinstance(number, Exact) else str(number)
    try:
        sent = Decimal(text)
    except InvalidOperation:
        return text
    sign, digits, exponent = sent.as_tuple()
    significant = "".join(map(str, digits)).rstrip("0")
    zeros = len(digits) - len(significant)
    return f"{'-' * sign}{significant or '0'}e{int(exponent) + zeros}"


def _plain(value: Any) -> Any:
    """Return a copy for the encoder of the standard library, which has no hook for subclasses of its types."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Beyond) or (isinstance(value, Exact) and not _holds(value)):
        return {_NUMBER: _digits(value)}
    return value


_NUMBER = "\x1fnumber"  # no platform sends a field with this name
