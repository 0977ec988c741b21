"""Databases for the benchmarks."""

import psycopg

from archiver import database, embedded, schema


def migrated(postgres: embedded.Postgres, name: str) -> str:
    """The URL of a new, migrated one."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = postgres.database_url(name)
    engine = database.connect(database.database_url(url))
    schema.upgrade(engine)
    engine.dispose()
    return url
