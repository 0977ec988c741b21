"""`archiver users`: the users of the console."""

import sys
from pathlib import Path

import click

from archiver import database, settings
from archiver.cli import connection, options
from archiver.cli.output import Table, console, print_json
from archiver.console import accounts
from archiver.errors import SettingsError
from archiver.ledger import audit_log
from archiver.settings.console_roles import ROLES, Role

MAX_FILE = 8_192  # bytes


@click.group()
def users() -> None:
    """Manage the users of the console."""


_name_argument = click.argument("name", metavar="NAME")
_password_option = click.option(
    "--password-file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="File whose first line is the password; - reads stdin.  [default: ask]",
)


@users.command()
@_name_argument
@click.option(
    "--role",
    type=click.Choice(ROLES),
    required=True,
    help="viewer: figures without content; reader: also conversations; auditor: also seals, audit log, holds and"
    " exact bytes; operator: as reader, also follow-ups.",
)
@_password_option
@options.actor_option
def add(*, name: str, role: Role, password_file: Path | None, actor: str | None) -> None:
    """Add a user, who may then log in at /console."""
    password_hash = accounts.hash_password(_password(password_file))
    with connection.ready(settings.read()) as engine, database.transaction(engine) as opened:
        accounts.insert_user(opened, name, role, password_hash, actor or audit_log.actor())
    click.echo(f"User {name} may log in as {role}.")


@users.command()
@_name_argument
@_password_option
@options.actor_option
def reset(*, name: str, password_file: Path | None, actor: str | None) -> None:
    """Set a new password and end the user's logins."""
    password_hash = accounts.hash_password(_password(password_file))
    with connection.ready(settings.read()) as engine, database.transaction(engine) as opened:
        accounts.reset_password(opened, name, password_hash, actor or audit_log.actor())
    click.echo(f"User {name} has a new password.")


@users.command()
@_name_argument
@click.option("--undo", is_flag=True, help="Allow a disabled user to log in again.")
@options.actor_option
def disable(*, name: str, undo: bool, actor: str | None) -> None:
    """Forbid a user to log in and end the user's logins."""
    change = accounts.enable if undo else accounts.disable
    with connection.ready(settings.read()) as engine, database.transaction(engine) as opened:
        change(opened, name, actor or audit_log.actor())
    click.echo(f"User {name} may log in again." if undo else f"User {name} may no longer log in.")


@users.command("list")
@options.json_option
def list_(*, as_json: bool) -> None:
    """List the users of the console."""
    with connection.opened(settings.read()) as opened:
        found = accounts.select_users(opened)
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("There are no users. To add one: archiver users add NAME --role reader")
        return
    table = Table("name", "role", "added", "changed", "disabled", "logs in with")
    for each in found:
        disabled = f"{each.disabled_at:%Y-%m-%d %H:%M}" if each.disabled_at else ""
        table.add_row(
            each.name,
            each.role,
            f"{each.added_at:%Y-%m-%d}",
            f"{each.changed_at:%Y-%m-%d %H:%M}",
            disabled,
            each.issuer or "password",
        )
    console().print(table)


def _password(file: Path | None) -> str:
    """Read a password from the file or from stdin; without a file, ask for it twice on the terminal."""
    if file is None:
        if not sys.stdin.isatty():
            raise click.UsageError("without a terminal, --password-file FILE is required; - reads stdin")
        answer: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        return answer
    try:
        given = sys.stdin.buffer.read(MAX_FILE) if str(file) == "-" else _read(file)
        return given.decode().split("\n", 1)[0].removesuffix("\r")
    except OSError as error:
        raise SettingsError(f"cannot read the password from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the password in {file} is not UTF-8: save the file as UTF-8") from None


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MAX_FILE)
