"""The command line: parses arguments and prints results; loaded lazily."""

import codecs
import errno
import os
import sys
from collections.abc import Sequence
from io import RawIOBase, TextIOWrapper
from pathlib import Path

import click
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver.cli.adopt import adopt
from archiver.cli.backfill import command as backfill
from archiver.cli.demo import demo, simulate
from archiver.cli.erasure import command as erase
from archiver.cli.export import command as export
from archiver.cli.followups import followups
from archiver.cli.holds import acts, hold
from archiver.cli.quarantine import quarantine
from archiver.cli.retention import command as retention
from archiver.cli.seals import group as seals
from archiver.cli.seals import prove, seal, verify
from archiver.cli.serve import migrate, serve
from archiver.cli.status import doctor, status
from archiver.cli.worker import rebuild, worker
from archiver.database import CERTIFICATE_ADVICE, is_untrusted, sqlstate
from archiver.database.lock_waits import INSUFFICIENT_PRIVILEGE, LockTimeoutError
from archiver.database.roles import AUDITOR, WRITER
from archiver.database.schema import SchemaError
from archiver.embedded import EmbeddedError
from archiver.inbound.spool import SpoolError
from archiver.settings import SettingsError
from archiver.version import describe


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(message=describe())
def cli() -> None:
    """Keep every CallHQ conversation, once, in Postgres.

    Settings come from the environment, each also as NAME_FILE naming a file that holds the value. Without
    DATABASE_URL an embedded Postgres under ARCHIVER_HOME is used.

    Exit codes: 0 done, 1 something was found or failed, 2 wrong usage.
    """


_COMMANDS = (
    *(serve, worker, migrate, backfill, rebuild, quarantine),
    *(seal, verify, prove, seals, erase, hold, retention, export, acts),
    *(followups, adopt, status, doctor, demo, simulate),
)
for _command in _COMMANDS:
    cli.add_command(_command)
cli.add_command(acts, "audit")  # acts is the older name


def main() -> None:
    """The `archiver` command."""
    try:
        _escape_unencodable()  # which writes what waits
        _require_complete_writes()
        _require_text(sys.argv[1:])
        try:
            _run()
        finally:
            sys.stdout.flush()  # here, where a failure can be reported
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_FAULTS:
            raise
        # Python would flush it once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader closed the pipe
            sys.exit(1)
        _fail(f"Cannot write: {error.strerror}.")


_OUTPUT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EAGAIN}


def _escape_unencodable() -> None:
    """Let stdout and stderr escape characters that their encoding lacks, as JSON does."""
    codecs.register_error("archiver", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="archiver")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    escaped = (f"\\u{int.from_bytes(units[at : at + 2]):04x}" for at in range(0, len(units), 2))
    return "".join(escaped), error.end


def _require_complete_writes() -> None:
    """Let stdout complete every write.

    The caller may have closed it. And under PYTHONUNBUFFERED, which images for containers like to set, what a
    pipe does not take at once is lost.
    """
    given = sys.stdout
    if given is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for as long as the program runs
    elif isinstance(given, TextIOWrapper) and isinstance(given.buffer, RawIOBase):
        sys.stdout = open(  # noqa: SIM115  # likewise
            given.fileno(), "w", buffering=1, encoding=given.encoding, errors=given.errors, closefd=False
        )


def _require_text(arguments: Sequence[str]) -> None:
    """Reject arguments that are not valid text, which could not be recorded or printed."""
    for argument in arguments:
        if any("\ud800" <= each <= "\udfff" for each in argument):
            click.echo(f"archiver: {argument[:80]!a} is not UTF-8", err=True)
            sys.exit(2)


def _run() -> None:
    try:
        cli()
    except (SettingsError, SchemaError, EmbeddedError, SpoolError, LockTimeoutError) as error:
        _fail(str(error))
    except DBAPIError as error:
        _end_if_interrupted(error)
        _fail(_explain(error))
    except (PoolTimeoutError, SQLAlchemyError) as error:
        _end_if_interrupted(error)
        _fail(
            f"The database did not answer ({type(error).__name__}).\nCheck DATABASE_URL, then run `archiver doctor`."
        )


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


def _explain(error: DBAPIError) -> str:
    text, state = str(error.orig).strip(), sqlstate(error)
    if state == INSUFFICIENT_PRIVILEGE:
        role = _role(sys.argv[1:])
        return (
            f"The database refused: {text.splitlines()[0]}.\nThis command needs the role {role}: as an administrator"
            f" run GRANT {role} TO the_user; or see `archiver doctor`."
        )
    if is_untrusted(error):
        return f"The database cannot be trusted: {text}\n{CERTIFICATE_ADVICE}"
    # Without a SQLSTATE the message is the driver's, or the server's reason for refusing the connection.
    is_from_server = state is not None or "FATAL: " in text
    what = "refused" if is_from_server else "cannot be reached"
    return f"The database {what}: {text}\nCheck DATABASE_URL, then run `archiver doctor`."


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"archiver: {line}", err=True)
    sys.exit(1)
