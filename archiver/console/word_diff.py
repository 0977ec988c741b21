"""Compare two texts word by word. Pure."""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Literal

import msgspec

MAX_WORDS = 600  # of the differing part of a text; longer parts are not compared word by word

Kind = Literal["same", "removed", "added"]

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


class Part(msgspec.Struct, frozen=True):
    """A part of both texts, or of only the earlier or only the later one."""

    kind: Kind
    text: str


def compare(before: str, after: str) -> Sequence[Part]:
    """Return the parts in order: all except the added ones form `before`, all except the removed ones `after`."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    start = _common(old, new)
    end = _common(old[start:][::-1], new[start:][::-1])
    middle = _middle(old[start : len(old) - end], new[start : len(new) - end])
    parts = [Part("same", "".join(old[:start])), *middle, Part("same", "".join(old[len(old) - end :]))]
    return [part for part in parts if part.text]


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    """Return the number of leading words that both texts share."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((place for place, (mine, other) in pairs if mine != other), min(len(old), len(new)))


def _middle(old: Sequence[str], new: Sequence[str]) -> Iterator[Part]:
    if max(len(old), len(new)) > MAX_WORDS:
        yield Part("removed", "".join(old))
        yield Part("added", "".join(new))
        return
    for kind, first, last, other_first, other_last in SequenceMatcher(None, old, new).get_opcodes():
        if kind == "equal":
            yield Part("same", "".join(old[first:last]))
            continue
        yield Part("removed", "".join(old[first:last]))
        yield Part("added", "".join(new[other_first:other_last]))
