"""Statements of every batch, past SQLAlchemy's engine: that costs several times what the driver does."""

from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError


class Direct:
    """A statement in Postgres' own words, with $1 for its first parameter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rows = Rows()

    def execute(self, connection: Connection, *parameters: Any) -> list[Any]:
        """What it returns, as named tuples. Fails as any other statement of the connection."""
        return execute(connection, self._text, parameters, self._rows)


class Rows:
    """The rows of one kind of statement, as named tuples; their names are those of its first answer."""

    def __init__(self) -> None:
        self._make: Callable[[Iterable[Any]], Any] | None = None

    def of(self, cursor: Any) -> list[Any]:
        """All that it answered."""
        if self._make is None:
            if cursor.description is None:
                return []
            make_kind: Any = namedtuple
            self._make = make_kind("Row", [column.name for column in cursor.description], rename=True)._make
        return list(map(self._make, cursor.fetchall()))


def execute(connection: Connection, text: str, parameters: Sequence[Any], rows: Rows) -> list[Any]:
    """Run a statement within the connection's transaction, begun if it is not, and answer its rows."""
    if not connection.in_transaction():
        connection.begin()
    cursor = connection.connection.cursor()
    try:
        cursor.execute(text, parameters)
        return rows.of(cursor)
    except psycopg.Error as error:
        driver: Any = connection.connection.driver_connection
        is_lost = driver.closed
        if is_lost:
            connection.invalidate(error)
        raise DBAPIError.instance(
            text, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=is_lost
        ) from error
    except Exception:
        raise
    except BaseException as error:  # cancelled: nobody knows what the server does with it
        connection.invalidate(error)
        raise
    finally:
        cursor.close()
