"""Decode JSON tolerantly, and compute the digest that identifies a fact."""

import hashlib
import json
import math
from typing import Any

import msgspec

from archiver.events.shapes import MAX_DEPTH, UnreadableError

_MAX_DIGITS = 400  # digits of an integer; longer ones stay text


class Exact(float):
    """A JSON number with a fraction or exponent: nearest double, and the digits as sent."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "Exact":
        """Return the number in this text. Raises `ValueError` if a double cannot hold it."""
        value = super().__new__(cls, text)
        if not math.isfinite(value):
            raise ValueError("beyond a double")
        value.text = text
        return value


_DECODER = msgspec.json.Decoder(float_hook=Exact)


def decode(body: bytes) -> Any:
    """Parse JSON leniently: lone surrogates, NaN, numbers of any length; fractions are `Exact`.

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
    # The standard library is slower and more liberal: lone surrogates, NaN, numbers out of range.
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


# Unsupported numbers stay text, so that facts that differ only in them remain different.


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= _MAX_DIGITS else text


def _float(text: str) -> Exact | str:
    try:
        return Exact(text)
    except ValueError:
        return text


def digest(fact: list[Any]) -> bytes:
    """Return the SHA-256 over the canonical JSON of a fact, in which numbers with a fraction or an exponent are
    doubles.
    """
    try:
        canonical = msgspec.json.encode(fact, order="deterministic", enc_hook=float)
    except (UnicodeEncodeError, OverflowError):
        canonical = json.dumps(fact, sort_keys=True, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(canonical).digest()
