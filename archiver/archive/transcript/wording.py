"""Decide whether two differently written messages have the same content.

`text_key` removes differences that carry no meaning: names and letter case of roles, and all that `events.normal`
removes. Two messages with the same key are equal regardless of their places. `are_similar` finds texts that a system
cut, masked or reformatted.
"""

import re
from collections.abc import Callable, Sequence

from archiver.events import known_role
from archiver.events.normal import normal_text

Key = tuple[str, str]  # role and content, without differences that carry no meaning

ASSISTANT = "assistant"


def normal_role(role: str) -> str:
    """Return the role, with one name each for `user` and `assistant`."""
    return known_role(role) or role.strip().lower()


def text_key(role: str, content: str) -> Key:
    """Return the key that equal messages share: role and normalised text."""
    return normal_role(role), normal_text(content)


def fragments_of(content: str) -> list[str]:
    """Return the lines of a text that are not blank: a history may join messages with line ends."""
    return [text for text in content.splitlines() if text.strip()]


def are_similar(one: str, other: str) -> bool:
    """Return whether two normalised texts are probably one text that was cut, masked or reformatted.

    Use it only if no other message is possible: by itself it is weak evidence. Texts with different numbers or words,
    and different short texts, are never similar.
    """
    if one == other or is_cut(one, other) or is_cut(other, one):
        return True
    if _is_masked(one, other) or _is_masked(other, one) or _has_masked_digits(one, other):
        return True
    if _has_masked_digits(other, one) or _unformatted(one) == _unformatted(other):
        return True
    return _has_letters(one) and (_plain(one) == _plain(other) or _lacks_symbols(one, other))


_CUT = 32  # minimum characters of a truncated text without a mark of truncation
_MARKED_CUT = 8  # with such a mark
_SHORT_CUT = 12  # if it ends within a word and there is more evidence
_SURE_CUT = 100  # if a number may also be cut
_CUT_MARK = re.compile(r"\s*(?:\.\.\.|[\[(]\s*(?:\.\.\.)?\s*(?:truncated|cut|more)[^\])]{0,80}[\])])$", re.IGNORECASE)
_CUT_ENTITY = re.compile(r"&#?\w*$")


def is_cut(short: str, whole: str) -> bool:
    """Return whether one text is the other, truncated."""
    beginning = _CUT_MARK.sub("", _CUT_MARK.sub("", short))
    is_marked = beginning != short
    beginning = _CUT_ENTITY.sub("", beginning)
    if len(beginning) < (_MARKED_CUT if is_marked else _CUT) or not whole.startswith(beginning):
        return False
    if len(whole) <= len(beginning):
        return is_marked
    splits_number = beginning[-1].isdigit() and whole[len(beginning)].isdigit()
    return not splits_number or len(beginning) >= _SURE_CUT


def is_short_cut(short: str, whole: str) -> bool:
    """Return whether one text may be the other, cut within a word; a text this short is no evidence by itself."""
    size = len(short)
    return _SHORT_CUT <= size < len(whole) and whole.startswith(short) and whole[size - 1 : size + 1].isalpha()


# Not masks: one mark between digits or by itself, a number sign before a digit, a single x: 2*4, press *, #12, 5x.
_MASK = re.compile(
    r"\[[^\[\]\s][^\[\]]{1,39}\]|<[^<>\s][^<>]{1,39}>|\{\{?[^{}]{2,40}\}\}?"  # [PHONE], <card>, {{email}}
    r"|[*\u2022\u25cf\u25cb\u25a0\u25aa\u2588\u2217\u00d7\uff0a#]{2,}"  # bullets, squares and the like
    r"|(?<=\d)[*#\u2022\u25cf](?!\d)|(?<!\d)[*\u2022\u25cf](?=\d)"
    r"|\b[xX]{2,}\b|(?<=\d)[xX]{2,}|[xX]{2,}(?=\d)"
)
_MASKS = 20  # of one text
_MASKABLE = 4_000  # characters
_LITERAL = 6  # letters and digits that must remain if more than digits was masked


def _is_masked(masked: str, whole: str) -> bool:
    """Return whether one text is the other with masks in place of digits or words."""
    if max(len(masked), len(whole)) > _MASKABLE:
        return False
    masks = [item[0] for item in _MASK.finditer(masked)]
    if not 0 < len(masks) <= _MASKS:
        return False
    literals = _MASK.split(masked)
    numbers = _ends_of_numbers(whole)
    if _fits(whole, literals, [numbers for _ in masks]):
        return True
    if sum(map(str.isalnum, "".join(literals))) < _LITERAL:
        return False
    return _fits(whole, literals, [_ends_of_words(whole, mask) for mask in masks])


_Ends = Callable[[int], range]  # the possible ends of a masked text that begins at this index


_DIGIT_MASK = re.compile(r"[xX_]|[^\w\s?!.,:;'\"()\-]")  # not punctuation, which users type themselves
_MASKED_DIGITS = 2  # at least: `press #` is not `press 1`


def _has_masked_digits(masked: str, whole: str) -> bool:
    """Return whether one text is the other with the same mark in place of each digit."""
    if len(masked) != len(whole):
        return False
    digits = [index for index, character in enumerate(whole) if character.isdecimal()]
    if len(digits) < _MASKED_DIGITS or not _DIGIT_MASK.match(mark := masked[digits[0]]):
        return False
    return masked == "".join(mark if character.isdecimal() else character for character in whole)


def _fits(whole: str, literals: Sequence[str], masks: Sequence[_Ends]) -> bool:
    """Return whether the text consists of these literals with masked texts between them.

    It examines each place once for each mask. A regular expression would try every division of the text between the
    masks, which may take days for a dozen of them, and users choose the texts.
    """
    places = [len(literals[0])] if whole.startswith(literals[0]) else []
    for literal, ends in zip(literals[1:], masks, strict=True):
        result: list[int] = []
        for place in places:
            reach = ends(place)
            result += range(max(reach.start, result[-1] + 1 if result else 0), reach.stop)
        places = [place + len(literal) for place in result if whole.startswith(literal, place)]
    return bool(places) and places[-1] == len(whole)


_NUMBER = re.compile(r"[\d\-\s().+/]+")
_NAME = 80  # characters that a mask with a name may stand for


def _ends_of_numbers(whole: str) -> _Ends:
    ends: dict[int, int] = {}
    for item in _NUMBER.finditer(whole):
        ends |= dict.fromkeys((index for index in range(*item.span()) if whole[index].isdecimal()), item.end())
    return lambda place: range(place + 1, ends.get(place, place) + 1)


def _ends_of_words(whole: str, mask: str) -> _Ends:
    if mask[0] in "[<{":
        return lambda place: range(place + 1, min(place + _NAME, len(whole)) + 1)
    size = len(mask)
    return lambda place: range(place + size, place + size + (whole.find(" ", place, place + size) < 0))


_ESCAPE = re.compile(r"\\(?=[!-/:-@\[-`{-~])")  # as in Markdown and JSON before punctuation
_EMPHASIS = re.compile(r"(?<![\w*_`])([*_]{1,3}|`)(?! )(?=[^*_`]*[^\W_])([^*_`]+)(?<! )\1(?![\w*_`])")
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>")
_DECORATION = re.compile(r"(?<!\d)[.,:;]|[.,:;](?!\d)|[*_`~!'\"()\s]")
_DROPPED = re.compile(r"[^\x00-\x7f\w]|\s")  # emoji and the like, but no letters, which carry meaning
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_UNITS = (("utf-32-le", 4), ("utf-16-le", 2), ("utf-8", 1))  # code units; a system may write one `?` for each
_LETTERS = 8


def _has_letters(text: str) -> bool:
    return sum(map(str.isalnum, text)) >= _LETTERS


def _unformatted(text: str) -> str:
    """Return the text without the backslashes and the emphasis of Markdown."""
    return _EMPHASIS.sub(r"\2", _ESCAPE.sub("", text))


def _plain(text: str) -> str:
    """Return the text without markup, white space, letter case and most punctuation."""
    return _DECORATION.sub("", _TAGS.sub("", _ESCAPE.sub("", text))).casefold()


def _lacks_symbols(one: str, other: str) -> bool:
    """Return whether the texts differ only because a system dropped non-ASCII symbols or wrote `?` for them."""
    if one.isascii() == other.isascii():
        return False
    plain, whole = (one, other) if one.isascii() else (other, one)
    is_dropped = _DROPPED.sub("", plain) == _DROPPED.sub("", whole)
    return is_dropped or any(plain == _in_ascii(whole, form, size) for form, size in _UNITS)


def _in_ascii(text: str, form: str, size: int) -> str:
    """Return the text with one `?` for each code unit of a non-ASCII character."""
    return _FOREIGN.sub(lambda found: "?" * (len(found[0].encode(form, "replace")) // size), text)
