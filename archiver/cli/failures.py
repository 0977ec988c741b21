"""Errors of a command, printed as sentences with advice."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import click
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from archiver import settings
from archiver.cli import fail
from archiver.database import CERTIFICATE_ADVICE, database_url, is_untrusted, sqlstate, what_to_check
from archiver.database.lock_waits import INSUFFICIENT_PRIVILEGE
from archiver.database.roles import AUDITOR, WRITER
from archiver.errors import ArchiverError, SettingsError


@contextmanager
def reported() -> Iterator[None]:
    """Print an error of the archiver or the database that the block raises, and exit 1."""
    try:
        yield
    except ArchiverError as error:
        fail(str(error))
    except SQLAlchemyError as error:
        _end_if_interrupted(error)
        fail(_explain(error))


_AUDITING = ("verify", "prove", "seals", "export", "acts", "audit", "status")
_AUDITING_PARTS = (("hold", "list"), ("quarantine", "list"), ("quarantine", "show"), ("erase", "--list"))


def _role(arguments: Sequence[str]) -> str:
    """Return the role that a refused command needs: auditor to read, writer to change."""
    is_part = any(arguments[0] == command and part in arguments for command, part in _AUDITING_PARTS)
    return AUDITOR if arguments[0] in _AUDITING or is_part else WRITER


def _end_if_interrupted(error: BaseException) -> None:
    """Exit if the error was caused by Ctrl-C rather than by the database."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            click.echo("Aborted!", err=True)
            sys.exit(1)
        cause = cause.__cause__ or cause.__context__


def _explain(error: SQLAlchemyError) -> str:
    if not isinstance(error, DBAPIError):
        return f"the database did not respond ({type(error).__name__}).\n{_advice()}"
    text, state = str(error.orig).strip(), sqlstate(error)
    if state == INSUFFICIENT_PRIVILEGE:
        role = _role(sys.argv[1:])
        return (
            f"the database refused: {text.splitlines()[0]}.\nThis command needs the role {role}: as an administrator"
            f" run GRANT {role} TO the_user; or see `archiver doctor`."
        )
    if is_untrusted(error):
        return f"the database cannot be trusted: {text}\n{CERTIFICATE_ADVICE}"
    # Without a SQLSTATE the message is the driver's, or the server's reason for refusing the connection.
    is_from_server = state is not None or "FATAL: " in text
    if is_from_server:
        return explain_refusal(text)
    return f"the database cannot be reached: {text}\n{_advice()}"


def _advice() -> str:
    """Return advice on what to check, including environment variables of libpq."""
    with suppress(SettingsError):
        configured = settings.read().database_url
        url = None if configured is None else database_url(configured.get_secret_value())
        return f"Check {what_to_check(url)}, then run `archiver doctor`."
    return "Check DATABASE_URL, then run `archiver doctor`."


def explain_refusal(text: str) -> str:
    """Return the server's message with advice."""
    advice = _advice()
    if "statement pooling mode" in text:  # PgBouncer's wording
        advice = "Set pool_mode = transaction (or session) in the configuration of PgBouncer."
    return f"the database refused: {text}\n{advice}"
