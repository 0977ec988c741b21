"""The root of the error tree: each error that this program raises on purpose derives from `ArchiverError`.

An error is defined in the module that raises it. A command prints it after the name of the program and exits 1; only
the HTTP layer knows status codes.

A message says what is wrong, with which value, and what to do. It begins with a small letter or a name, because text
precedes it, and a message of one sentence has no full stop. Pages, responses and checks show it as `sentence(error)`.
"""


class ArchiverError(Exception):
    """Base of all errors. `message` is the default text."""

    message = ""

    def __str__(self) -> str:
        """Return the text, without type and location."""
        return super().__str__() or self.message


class SettingsError(ArchiverError):
    """A setting is missing or wrong; the message names it and says what to do."""


def sentence(message: object) -> str:
    """Return a message as a sentence with a full stop; its first letter becomes a capital, except that of a name."""
    text = str(message)
    first = text.split(" ", 1)[0].rstrip(",:;.")
    text = text[:1].upper() + text[1:] if first.isalpha() else text
    return text if text.endswith((".", "!", "?")) else f"{text}."
