"""The command line: parses, prints, starts. What a command does lives below."""

import sys

import click
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver import __version__
from archiver.cli.demo import demo, simulate
from archiver.cli.inspection import doctor, status
from archiver.cli.quarantine import quarantine
from archiver.cli.serve import migrate, serve
from archiver.embedded import EmbeddedError
from archiver.schema import SchemaError
from archiver.settings import SettingsError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="archiver")
def cli() -> None:
    """Keep every CallHQ conversation, once, in Postgres.

    Settings come from the environment, each also as NAME_FILE naming a file that holds the value. Without
    DATABASE_URL an embedded Postgres under ARCHIVER_HOME is used.

    Exit codes: 0 done, 1 something was found or failed, 2 wrong usage.
    """


for _command in (serve, migrate, status, doctor, quarantine, demo, simulate):
    cli.add_command(_command)


def main() -> None:
    """The `archiver` command."""
    try:
        cli()
    except (SettingsError, SchemaError, EmbeddedError) as error:
        _fail(str(error))
    except DBAPIError as error:
        _fail(f"The database refused: {str(error.orig).strip()}\nCheck DATABASE_URL, then run `archiver doctor`.")
    except (PoolTimeoutError, SQLAlchemyError) as error:
        _fail(
            f"The database did not answer ({type(error).__name__}).\nCheck DATABASE_URL, then run `archiver doctor`."
        )


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"archiver: {line}", err=True)
    sys.exit(1)
