"""The error of the embedded Postgres."""

from archiver.errors import ArchiverError


class EmbeddedError(ArchiverError):
    """The embedded Postgres cannot be used; the message names the setting to change."""
