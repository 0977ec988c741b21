"""The database of a command: the one that DATABASE_URL names, or the embedded one, started for as long as needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Engine

from archiver import database, embedded
from archiver.settings import Settings


@contextmanager
def database_url(configuration: Settings) -> Iterator[str]:
    """The URL to use; an embedded Postgres runs meanwhile where none is set."""
    if configuration.database_url is not None:
        yield configuration.database_url.get_secret_value()
        return
    with embedded.running(configuration.home) as postgres:
        yield postgres.url


@contextmanager
def engine(configuration: Settings) -> Iterator[Engine]:
    """An engine of one connection for a short command."""
    with database_url(configuration) as url:
        made = database.connect(
            database.database_url(url), pool_size=1, prepared_statements=configuration.prepared_statements
        )
        try:
            yield made
        finally:
            made.dispose()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")
