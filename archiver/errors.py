"""The root of the error tree: each error that this program raises on purpose derives from `ArchiverError`.

An error is defined in the module that raises it. A command prints it as a sentence and exits 1; only the HTTP layer
knows status codes.
"""


class ArchiverError(Exception):
    """Base of all errors. `message` is the default text."""

    message = ""

    def __str__(self) -> str:
        """Return the text, without type and location."""
        return super().__str__() or self.message


class SettingsError(ArchiverError):
    """A setting is missing or wrong; the message names it and says what to do."""
