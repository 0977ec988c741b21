"""The command line: it parses arguments and prints results. A command is imported when it runs."""

import codecs
import errno
import os
import sys
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from io import RawIOBase, TextIOWrapper
from pathlib import Path
from typing import NoReturn

import click

COMMANDS = {  # by name: module and attribute in archiver.cli, and the first sentence of its help
    "acts": ("holds:acts", "List the audit log, oldest first: what was done to the archive, by whom and why."),
    "adopt": ("adopt:adopt", "Accept this database in place of the one that was served before."),
    "audit": ("holds:acts", "List the audit log, oldest first: what was done to the archive, by whom and why."),
    "backfill": ("backfill:command", "Fetch histories now and recover messages that webhooks lost."),
    "console": (
        "console:console",
        "Serve the console at /console, without receiving webhooks, until SIGTERM or Ctrl-C.",
    ),
    "demo": ("demo:demo", "Run a demo on this machine: a database, the receiver and a simulated CallHQ."),
    "doctor": ("status:doctor", "Check settings, spool, database, roles, schema and clock, and print remedies."),
    "erase": (
        "erasure:command",
        "Erase sessions and turns permanently from ledger, archive and quarantine, and refuse later deliveries.",
    ),
    "export": ("export:command", "Export conversations with proofs of their origin, or check such an export."),
    "followups": ("followups:followups", "Manage receivers of changes, or print the change feed."),
    "hold": ("holds:hold", "Manage legal holds: covered sessions are neither erased nor expired."),
    "migrate": ("serve:migrate", "Migrate the database to the schema of this version."),
    "prove": ("seals:prove", "Print the proof, as JSON, that EVENT (an id of archiver.events) is in its seal."),
    "quarantine": ("quarantine:quarantine", "Inspect and retry authentic deliveries that could not be archived."),
    "rebuild": ("worker:rebuild", "Rebuild sessions, chats and messages from the ledger while the receiver runs."),
    "retention": ("retention:command", "Expire content older than the retention settings allow."),
    "seal": ("seals:seal", "Seal all settled rows now."),
    "seals": ("seals:group", "List or export the chain of seals."),
    "serve": ("serve:serve", "Receive webhooks at POST /webhooks/callhq until SIGTERM or Ctrl-C."),
    "simulate": ("demo:simulate", "Run only the simulated CallHQ platform."),
    "status": ("status:status", "Show on one screen what the archive contains and what needs attention."),
    "users": ("users:users", "Manage the users of the console."),
    "verify": (
        "seals:verify",
        "Check seals and ledger: each row against its seal, each body against its digest, each seal against its"
        " chain.",
    ),
    "worker": ("worker:worker", "Run the background duties (histories, changes, seals, erasure) until SIGTERM."),
}


class LazyGroup(click.Group):
    """A group that imports the module of a command only on request, and lists the commands from `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return name, command and remaining arguments. The error for an unknown name suggests similar names."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command; return None if there is no command with that name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(f"archiver.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run a command. Its warnings and errors go to stderr; after an error the exit code is 1."""
        from archiver import telemetry  # noqa: PLC0415  # help does not need it
        from archiver.cli.failures import reported  # noqa: PLC0415  # with SQLAlchemy, which help does not need

        with reported():
            telemetry.configure_logs("warning", "auto")
            return super().invoke(ctx)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value and not ctx.resilient_parsing:  # true during shell completion
        from archiver.version import describe  # noqa: PLC0415  # only `--version` needs it

        click.echo(describe())
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Archive every CallHQ conversation in Postgres, exactly once.

    Settings come from environment variables. NAME_FILE may name a file that contains the value of NAME. Without
    DATABASE_URL, an embedded Postgres under ARCHIVER_HOME is used.

    Exit codes: 0 success, 1 a finding or a failure, 2 wrong usage.
    """


def main() -> None:
    """Run the `archiver` command and exit with its code."""
    try:
        _escape_unencodable()  # also flushes pending output
        _require_complete_writes()
        _require_text(sys.argv[1:])
        try:
            cli()
        finally:
            sys.stdout.flush()  # here, where a failure can be reported
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_FAULTS:
            raise
        # Python flushes stdout again at exit, and would report the error a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader closed the pipe
            sys.exit(1)
        fail(f"cannot write: {error.strerror}")


_OUTPUT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EAGAIN}


def _escape_unencodable() -> None:
    """Make stdout and stderr escape, as JSON does, the characters that their encoding lacks."""
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
    """Make stdout complete every write; discard the output if stdout is closed.

    Under PYTHONUNBUFFERED, which container images often set, a pipe that accepts only a part of a write loses the
    rest.
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
            complain(f"argument {argument[:80]!a} is not UTF-8")
            sys.exit(2)


def complain(message: str) -> None:
    """Print a message on stderr, with the name of the program before each line."""
    for line in message.rstrip("\n").split("\n"):
        shown = escaped(line, keep="\t")
        click.echo(f"archiver: {shown}", err=True)


def escaped(value: object, *, keep: str = "") -> str:
    """Return the value as text that cannot control a terminal: unprintable characters and line breaks are escaped.

    Commands apply this to every stored value that they print as text. `keep`: characters that are not escaped.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        each if _is_harmless(each) or each in keep else each.encode("unicode_escape").decode() for each in text
    )


_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def fail(message: str) -> NoReturn:
    """Print an error message and exit 1."""
    complain(message)
    sys.exit(1)
