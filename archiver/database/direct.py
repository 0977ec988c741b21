"""Statements of every batch, past SQLAlchemy's engine: that costs several times what the driver does."""

import logging
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import msgspec
import psycopg
from sqlalchemy import AdaptedConnection, Connection

from archiver.database.errors import as_of_engine

# Where the first of several fails it warns of the others that they were not run, which is no news to the caller.
logging.getLogger("psycopg").addFilter(lambda record: not str(record.msg).startswith("error ignored terminating"))


class Rows:
    """The rows of one kind of statement, as named tuples; their names are those of its first answer."""

    def __init__(self) -> None:
        self._make: Callable[[Iterable[Any]], Any] | None = None

    def of(self, cursor: Any, answered: Iterable[Any]) -> list[Any]:
        """All that it answered."""
        if self._make is None:
            make_kind: Any = namedtuple
            self._make = make_kind("Row", [column.name for column in cursor.description], rename=True)._make
        return list(map(self._make, answered))


class Statement(msgspec.Struct, frozen=True, gc=False):
    """What is to be executed: Postgres' own words, with $1 for the first parameter."""

    text: str
    parameters: Sequence[Any]
    rows: Rows


class Direct:
    """A statement in Postgres' own words, with $1 for its first parameter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rows = Rows()

    def of(self, *parameters: Any) -> Statement:
        """With these parameters, for `execute`."""
        return Statement(self._text, parameters, self._rows)

    def execute(self, connection: Connection, *parameters: Any) -> list[Any]:
        """What it returns, as named tuples. Fails as any other statement of the connection."""
        (answered,) = execute(connection, self.of(*parameters))
        return answered


def execute(connection: Connection, *statements: Statement) -> list[list[Any]]:
    """Run statements, one after the other and in one round trip, within the connection's transaction, begun if it is
    not. Answers the rows of each. After the first that fails none is run.
    """
    if not statements:
        return []
    if not connection.in_transaction():
        connection.begin()
    adapted: Any = connection.connection.dbapi_connection
    driver: Any = connection.connection.driver_connection
    try:
        if isinstance(adapted, AdaptedConnection):
            return adapted.run_async(partial(_execute_async, statements=statements))
        return _execute(driver, statements)
    except psycopg.Error as error:
        raise as_of_engine(connection, statements[-1].text, error) from error
    except Exception:
        raise
    except BaseException as error:  # cancelled: nobody knows what the server does with it
        connection.invalidate(error)
        raise


async def _execute_async(driver: psycopg.AsyncConnection[Any], statements: Sequence[Statement]) -> list[list[Any]]:
    cursors = [driver.cursor() for _ in statements]
    async with driver.pipeline() if _is_several(driver, statements) else nullcontext():
        for cursor, statement in zip(cursors, statements, strict=True):
            await cursor.execute(statement.text, statement.parameters)
    return [
        [] if cursor.rownumber is None else statement.rows.of(cursor, await cursor.fetchall())
        for cursor, statement in zip(cursors, statements, strict=True)
    ]


def _execute(driver: psycopg.Connection[Any], statements: Sequence[Statement]) -> list[list[Any]]:
    cursors = [driver.cursor() for _ in statements]
    with driver.pipeline() if _is_several(driver, statements) else nullcontext():
        for cursor, statement in zip(cursors, statements, strict=True):
            cursor.execute(statement.text, statement.parameters)
    return [
        [] if cursor.rownumber is None else statement.rows.of(cursor, cursor.fetchall())
        for cursor, statement in zip(cursors, statements, strict=True)
    ]


def _is_several(driver: psycopg.BaseConnection[Any], statements: Sequence[Statement]) -> bool:
    """Whether there is more than one to send: the driver begins the transaction with a statement of its own."""
    return len(statements) > 1 or driver.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
