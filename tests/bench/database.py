"""Databases for the benchmarks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from archiver import database, embedded
from archiver.database import schema
from tests.support import servers


@contextmanager
def server() -> Iterator[tuple[embedded.Postgres, Path]]:
    """An embedded Postgres and its home, which is gone afterwards, data and all."""
    with tempfile.TemporaryDirectory(prefix="bench ") as folder:
        home = Path(folder)
        home.chmod(0o711)  # else, as root, the data would lie elsewhere, and outlive it
        with embedded.running(home) as postgres:
            yield postgres, home


def migrated(postgres: embedded.Postgres, name: str) -> str:
    """The URL of a new, migrated one."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = postgres.database_url(name)
    engine = database.connect(database.database_url(url))
    schema.upgrade(engine)
    servers.let_writer_in(url)
    engine.dispose()
    return url
