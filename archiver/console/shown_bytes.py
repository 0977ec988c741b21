"""Show untrusted bytes as text if they are UTF-8, otherwise in hexadecimal, up to a limit."""

import codecs

import msgspec

MOST = 200_000  # bytes on a page; a download has all


class ShownBytes(msgspec.Struct, frozen=True):
    """The beginning of a body as text. `size`: of the whole body, in bytes."""

    text: str
    is_text: bool
    is_cut: bool
    size: int


def shown_bytes(beginning: bytes, size: int) -> ShownBytes:
    """Return the first bytes of a body of this size as text."""
    shown = beginning[:MOST]
    is_cut = size > len(shown)
    try:
        # The cut may be within a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(shown, final=not is_cut)
    except UnicodeDecodeError:
        return ShownBytes(shown.hex(" "), is_text=False, is_cut=is_cut, size=size)
    return ShownBytes(text, is_text=True, is_cut=is_cut, size=size)
