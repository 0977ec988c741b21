"""The error of the embedded Postgres."""

from archiver.errors import ArchiverError


class EmbeddedError(ArchiverError):
    """The embedded Postgres cannot be used; the message says why and what to do."""
