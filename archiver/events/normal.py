"""Normalise text, so that different encodings of the same words are equal. Pure."""

import re
import unicodedata
from html import unescape
from itertools import chain

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_LAYERS = 8  # maximum passes of HTML unescaping; `&amp;amp;lt;` needs three
# Control characters that are not white space, soft hyphen, combining grapheme joiner, zero-width space and
# non-joiner, marks of direction, Mongolian vowel separator, word joiner, byte order mark and variation selectors show
# nothing and separate nothing.
_CONTROLS: dict[int, str | None] = dict.fromkeys(
    code for code in (*range(0x20), *range(0x7F, 0xA0)) if not chr(code).isspace()
)
_RANGES = (range(0x202A, 0x202F), range(0x2060, 0x2065), range(0x2066, 0x206A), range(0xFE00, 0xFE10))
_INVISIBLE: dict[int, str | None] = _CONTROLS | dict.fromkeys(
    [0x00AD, 0x034F, 0x061C, 0x180E, 0x200B, 0x200C, 0x200E, 0x200F, 0xFEFF, *chain.from_iterable(_RANGES)]
)
_TYPOGRAPHIC = {
    "'": "\u2018\u2019\u201a\u201b\u02bc\u00b4\u2032\u2039\u203a",
    '"': "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
    "...": "\u2026",
}
_FOLDED = _INVISIBLE | {ord(each): plain for plain, every in _TYPOGRAPHIC.items() for each in every}
# Sorting a run of combining marks takes quadratic time. No language needs more than 30 marks on one character
# (Unicode Standard Annex 15, section 13).
_MAX_MARKS = 30
_SYMBOLS = re.compile(rf"[^\w\s\x00-\x7f]{{{_MAX_MARKS + 1},}}")  # combining marks match neither \w nor \s
# Between two symbols the zero-width joiner combines emoji into one; next to a letter or a space it shows nothing.
_JOINER = re.compile("(?<![^\\w\\s])\u200d|\u200d(?![^\\w\\s])")


def normal_text(text: str) -> str:
    """Return the form in which two texts are compared; it is never stored or shown.

    HTML entities are unescaped, Unicode is composed (NFC, Unicode Standard Annex 15; compatibility characters remain
    distinct), typographic quotes, dashes and ellipses become ASCII, invisible and control characters are removed,
    each run of white space, line ends and no-break spaces included, becomes one space, and the ends are trimmed. Of
    more than 30 combining marks in a row the first 30 count. Letter case, other punctuation and digits are retained.
    """
    if "&" in text:
        text = _unescaped(text)
    if not text.isascii():
        text = _JOINER.sub("", text.translate(_FOLDED))
        text = unicodedata.normalize("NFC", _SYMBOLS.sub(_with_few_marks, text))
    elif text.isprintable() and "  " not in text:  # the usual case for short texts
        return text.strip()
    else:
        text = text.translate(_CONTROLS)
    return " ".join(text.split())


def _with_few_marks(symbols: re.Match[str]) -> str:
    normalised, marks = [], 0
    for symbol in symbols[0]:
        marks = marks + 1 if unicodedata.combining(symbol) else 0
        if marks <= _MAX_MARKS:
            normalised.append(symbol)
    return "".join(normalised)


def _unescaped(text: str) -> str:
    for _ in range(_LAYERS):
        plain = _ENTITY.sub(lambda entity: unescape(entity[0]), text)
        if plain == text:
            break
        text = plain
    return text
