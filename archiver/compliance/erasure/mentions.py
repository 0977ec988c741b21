"""Decide whether a body mentions an id or value as a whole word. Pure."""

import re
from collections.abc import Callable, Iterable

from archiver import events
from archiver.compliance.erasure.decoding import Decoded
from archiver.events.normal import normal_text

_WORD = re.compile(r"[A-Za-z0-9_-]+")
_EDGE = re.compile(r"[A-Za-z0-9_-]")


def of_any(marks: Iterable[str]) -> Callable[[Decoded], bool]:
    """Return a check for bodies that mention any of these as a whole word: `chat-1` does not match `chat-12`.

    A word is compared as given and in its normalised form, because a writer may have composed, escaped or wrapped it.
    """
    forms = {form for mark in marks for form in (mark, normal_text(mark))} - {""}
    words = {form for form in forms if _WORD.fullmatch(form)}
    phrases = [_phrase(form) for form in sorted(forms - words)]
    return lambda body: (
        not words.isdisjoint(body.words) or any(phrase.search(text) for phrase in phrases for text in body.texts)
    )


def _phrase(form: str) -> re.Pattern[str]:
    before = r"(?<![A-Za-z0-9_-])" if _EDGE.match(form[0]) else ""
    after = r"(?![A-Za-z0-9_-])" if _EDGE.match(form[-1]) else ""
    return re.compile(before + re.escape(form) + after)


def of_variable(name: str, value: str) -> Callable[[Decoded], bool]:
    """Return a check for bodies that contain both the name and the value of a variable."""
    of_name, of_value = of_any([name]), of_any([value])
    return lambda body: of_name(body) and of_value(body)


def ids(body: Decoded) -> set[str]:
    """Return all possible ids: each word, and each text as a whole."""
    return {each for each in (*body.words, *body.texts) if _is_id(each)}


def _is_id(text: str) -> bool:
    try:
        return events.identifier(text) is not None
    except events.UnreadableError:
        return False
