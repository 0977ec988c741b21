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

# Where the first of several fails the driver warns of the others that they were not run: no news to the caller.
logging.getLogger("psycopg").addFilter(
    lambda record: not any(isinstance(each, psycopg.errors.PipelineAborted) for each in record.args or ())
)


class Rows:
    """The rows of one kind of statement, as named tuples; their names are those of its first answer."""

    def __init__(self) -> None:
        self._make: Callable[[Iterable[Any]], Any] | None = None

    def of(self, cursor: Any, answered: Sequence[Any]) -> list[Any]:
        """All that it answered."""
        if not answered:
            return []
        if self._make is None:
            make_kind: Any = namedtuple
            self._make = make_kind("Row", [column.name for column in cursor.description], rename=True)._make
        return list(map(self._make, answered))


class Statement(msgspec.Struct, frozen=True, gc=False):
    """A statement with its parameters, for `execute`."""

    text: str
    parameters: Sequence[Any]
    rows: Rows


class Direct:
    """A statement in Postgres' own words, with $1 for its first parameter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rows = Rows()

    def bind(self, *parameters: Any) -> Statement:
        """With these parameters."""
        return Statement(self._text, parameters, self._rows)

    def execute(self, connection: Connection, *parameters: Any) -> list[Any]:
        """What it returns, as named tuples. Fails as any other statement of the connection."""
        (answered,) = execute(connection, self.bind(*parameters))
        return answered


def execute(connection: Connection, *statements: Statement) -> list[list[Any]]:
    """Run statements within the connection's transaction, begun if it is not; several travel together, in one round
    trip. Each sees what those before it did, and what others had committed when it began. Answers the rows of each.
    After the first that fails none is run.
    """
    if not statements:
        return []
    if not connection.in_transaction():
        connection.begin()
    adapted: Any = connection.connection.dbapi_connection
    driver: Any = connection.connection.driver_connection
    cursors = [driver.cursor() for _ in statements]
    try:
        if isinstance(adapted, AdaptedConnection):
            answers = adapted.run_async(partial(_run_async, cursors=cursors, statements=statements))
        else:
            answers = _run(driver, cursors, statements)
    except psycopg.Error as error:
        undone = (each for each, cursor in zip(statements, cursors, strict=True) if cursor.pgresult is None)
        raise as_of_engine(connection, next(undone, statements[-1]).text, error) from error
    except Exception:
        raise
    except BaseException as error:  # cancelled: nobody knows what the server does with it
        connection.invalidate(error)
        raise
    each_answered = zip(statements, cursors, answers, strict=True)
    return [statement.rows.of(cursor, answered) for statement, cursor, answered in each_answered]


async def _run_async(
    driver: psycopg.AsyncConnection[Any], cursors: Sequence[Any], statements: Sequence[Statement]
) -> list[Any]:
    async with driver.pipeline() if len(statements) > 1 else nullcontext():
        for cursor, statement in zip(cursors, statements, strict=True):
            await cursor.execute(statement.text, statement.parameters)
    return [() if cursor.rownumber is None else await cursor.fetchall() for cursor in cursors]


def _run(driver: psycopg.Connection[Any], cursors: Sequence[Any], statements: Sequence[Statement]) -> list[Any]:
    with driver.pipeline() if len(statements) > 1 else nullcontext():
        for cursor, statement in zip(cursors, statements, strict=True):
            cursor.execute(statement.text, statement.parameters)
    return [() if cursor.rownumber is None else cursor.fetchall() for cursor in cursors]
