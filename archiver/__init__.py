"""callhq-archiver: every CallHQ conversation, once, in Postgres."""

__version__ = "0.1.0"
