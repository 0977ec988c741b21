"""Read rows with COPY one at a time, at low cost."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import error_from_result
from sqlalchemy import Connection

from archiver.database.errors import as_of_engine
from archiver.database.statements import driver_connection

Buffer = bytes | memoryview

_HEADER = 19  # bytes before the first row: signature, flags, length of the extension
_TRAILER = b"\xff\xff"


def rows(connection: Connection, query: sql.Composable) -> Generator[Any]:
    """Yield the bytes of each row of a binary COPY: the number of fields, then the fields.

    The connection cannot be used for anything else, not even a rollback, until the generator is exhausted or closed:
    use `contextlib.closing`. Source: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
    """
    driver = driver_connection(connection)
    with _driver_errors(connection), driver.cursor() as cursor, cursor.copy(query) as copy:
        row = copy.read()[_HEADER:]
        # Takes arrived data from libpq directly, at a third of the cost; if none has arrived, the driver waits for
        # it.
        arrived = driver.pgconn.get_copy_data
        while row != _TRAILER:
            if row:
                yield row
            size, row = arrived(1)
            if size == 0:
                row = copy.read()
            elif size < 0:  # no end marker: the COPY has failed
                result = driver.pgconn.get_result()
                while driver.pgconn.get_result():
                    pass  # otherwise nothing else could be sent, not even a rollback
                raise error_from_result(result)
        copy.read()  # ends the COPY


def lines(connection: Connection, query: sql.Composable) -> Generator[Buffer]:
    """Yield the lines of a text COPY. Close the generator after use."""
    driver = driver_connection(connection)
    with _driver_errors(connection), driver.cursor() as cursor, cursor.copy(query) as copy:
        while row := copy.read():
            yield row


def records(connection: Connection, query: sql.Composable, types: Sequence[str]) -> Generator[tuple[Any, ...]]:
    """Yield the rows of a query as Python values. `types`: its columns' types, by name. Close it after use."""
    driver = driver_connection(connection)
    whole = sql.SQL("COPY ({}) TO STDOUT (FORMAT BINARY)").format(query)
    with _driver_errors(connection), driver.cursor() as cursor, cursor.copy(whole) as copy:
        copy.set_types(types)
        yield from copy.rows()


@contextmanager
def _driver_errors(connection: Connection) -> Iterator[None]:
    """Convert the driver's errors in the block to the errors that any other statement raises."""
    try:
        yield
    except psycopg.Error as error:
        raise as_of_engine(connection, "COPY", error) from error
