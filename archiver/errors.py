"""The error tree: each error that this program raises on purpose has the base `ArchiverError`.

An error is defined in the module that raises it. The command line prints one as a sentence and exits 1; the HTTP
layer alone knows status codes.
"""


class ArchiverError(Exception):
    """Base of all errors. `message` is the text of an error that is raised without one."""

    message = ""

    def __str__(self) -> str:
        """Return the text, without type and location."""
        return super().__str__() or self.message


class SettingsError(ArchiverError):
    """A setting is missing or wrong; the text names it and says what to do."""
