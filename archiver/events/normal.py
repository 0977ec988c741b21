"""The normalised form of a text: equal for texts that differ only in how a system wrote the same words. Pure."""

import html
import unicodedata

# A byte order mark and a zero width space show nothing and separate nothing.
_INVISIBLE = str.maketrans("", "", "\ufeff\u200b")
_LAYERS = 3  # of HTML entities: `&amp;amp;lt;`


def normal_text(text: str) -> str:
    """Return the form under which two texts are compared; it is never stored or shown.

    HTML entities are unescaped, Unicode is composed (NFC, Unicode Standard Annex 15; compatibility characters stay
    apart), each run of white space, line ends and no-break spaces included, becomes one space, and the ends are
    trimmed. Letter case, punctuation and digits stay.
    """
    if text.isascii() and "&" not in text:
        return " ".join(text.split())
    for _ in range(_LAYERS):
        plain = html.unescape(text)
        if plain == text:
            break
        text = plain
    return " ".join(unicodedata.normalize("NFC", text.translate(_INVISIBLE)).split())
