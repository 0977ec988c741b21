"""Whether bytes that nobody could read are about what was erased: they hold one of its ids, whole. Pure."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress

from archiver import events

_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def of_any(marks: Iterable[str]) -> Callable[[bytes], bool]:
    """Whether bytes hold any of these, as text or as JSON writes it."""
    needles = sorted({form for mark in marks for form in _forms(mark)})
    return lambda body: any(_holds(body, needle) for needle in needles)


def of_variable(name: str, value: str) -> Callable[[bytes], bool]:
    """Whether bytes hold both a variable's name and its value."""
    of_name, of_value = of_any([name]), of_any([value])
    return lambda body: of_name(body) and of_value(body)


_PIECES = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\.)*"|[A-Za-z0-9_-]+')
_WORDS = re.compile(rb"[A-Za-z0-9_-]+")


def ids(body: bytes) -> set[str]:
    """Whatever in these bytes may be an id: each word, and each string as JSON has it."""
    found = {word.decode() for word in _WORDS.findall(body)}
    for piece in _PIECES.findall(body):
        if piece.startswith(b'"'):
            with suppress(ValueError):
                found.add(json.loads(piece))
    return {each for each in found if _is_id(each)}


def _is_id(told: str) -> bool:
    try:
        return events.identifier(told) is not None
    except events.UnreadableError:
        return False


def _forms(mark: str) -> Iterable[bytes]:
    yield mark.encode(errors="surrogatepass")
    for is_ascii in (True, False):
        yield json.dumps(mark, ensure_ascii=is_ascii)[1:-1].encode(errors="surrogatepass")


def _holds(body: bytes, needle: bytes) -> bool:
    place = body.find(needle)
    while place >= 0:
        end = place + len(needle)
        if _ends(body[place - 1 : place], needle[0]) and _ends(body[end : end + 1], needle[-1]):
            return True
        place = body.find(needle, place + 1)
    return False


def _ends(beside: bytes, edge: int) -> bool:
    """Whether a word ends between these two: `chat-1` is not in `chat-12`."""
    return not beside or beside[0] not in _WORD or edge not in _WORD
