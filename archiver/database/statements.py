"""Statements that bypass SQLAlchemy's engine, which takes several times the driver's time, and their parameters."""

import logging
from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import chain
from operator import itemgetter
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import psycopg
from sqlalchemy import AdaptedConnection, Connection, bindparam, create_engine
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.sql.dml import ReturningInsert

from archiver.database.errors import as_of_engine

# If the first of several statements fails, the driver warns that the others did not run, which the caller knows.
logging.getLogger("psycopg").addFilter(
    lambda record: not any(isinstance(each, psycopg.errors.PipelineAborted) for each in record.args or ())
)


class Rows:
    """A converter of a statement's result rows to named tuples, whose names come from the first result."""

    def __init__(self) -> None:
        self._make: Callable[[Iterable[Any]], Any] | None = None

    def of(self, cursor: Any, answered: Sequence[Any]) -> list[Any]:
        """Return the rows as named tuples."""
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


class RawStatement:
    """A statement in the syntax of Postgres, with parameters $1, $2 ..."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rows = Rows()

    def bind(self, *parameters: Any) -> Statement:
        """Return the statement with these parameters."""
        return Statement(self._text, parameters, self._rows)

    def execute(self, connection: Connection, *parameters: Any) -> list[Any]:
        """Return the result rows as named tuples. Raises SQLAlchemy's errors."""
        (answered,) = execute(connection, self.bind(*parameters))
        return answered


def as_json(values: Collection[Any]) -> str:
    """Return keys or rows as one parameter, for `json_array_elements_text` or `json_to_recordset`.

    The driver would write an array item by item, in Python.
    """
    return msgspec.json.encode(values).decode()


class _Deferred(msgspec.Struct, frozen=True):
    """A statement that waits for the next round trip. `on_answer`: called with its rows and the time it was sent."""

    statement: Statement
    on_answer: Callable[[Sequence[Any], float], None] | None = None


_deferred: WeakKeyDictionary[Connection, list[_Deferred]] = WeakKeyDictionary()


def defer(
    connection: Connection, *statements: Statement, on_answer: Callable[[Sequence[Any], float], None] | None = None
) -> None:
    """Run statements before the next one of the transaction, or before its COMMIT, in the same round trip.

    Their errors are raised there. `on_answer`: called with the rows of each and the time at which it was sent, on
    `time.monotonic`.
    """
    waiting = _deferred.setdefault(connection, [])
    waiting += [_Deferred(statement, on_answer) for statement in statements]


def flush(connection: Connection) -> None:
    """Run the deferred statements of the transaction."""
    if _deferred.get(connection):
        _execute(connection, ())


def flush_first(connection: Connection, *_: object) -> None:
    """Run the deferred statements before a statement of the engine, as its listener for `before_cursor_execute`."""
    flush(connection)


def discard(connection: Connection) -> None:
    """Forget the deferred statements of a transaction, as the engine's listener for `rollback`."""
    _deferred.pop(connection, None)


def driver_connection(connection: Connection) -> Any:
    """Return the driver's connection, for statements that bypass the engine, after the deferred ones."""
    flush(connection)
    return connection.connection.driver_connection


def commit(connection: Connection) -> None:
    """Commit the transaction together with its deferred statements, in one round trip.

    Without any, the commit is left to the engine.
    """
    if _deferred.get(connection):
        try:
            _execute(connection, (_COMMIT.bind(),))
        except _LostAfterCommitError as lost:
            connection.invalidate(lost)
            connection.rollback()  # sends nothing; the engine would otherwise commit again


class _LostAfterCommitError(Exception):
    """The connection was lost after Postgres had answered the COMMIT."""


_COMMIT = RawStatement("COMMIT")


def execute(connection: Connection, *statements: Statement) -> list[list[Any]]:
    """Run statements in the connection's transaction, in one round trip; return the rows of each."""
    return _execute(connection, statements) if statements else []


def _execute(connection: Connection, statements: Sequence[Statement]) -> list[list[Any]]:
    deferred = _deferred.pop(connection, ())
    together = [*(each.statement for each in deferred), *statements]
    if not connection.in_transaction():
        connection.begin()
    adapted: Any = connection.connection.dbapi_connection
    driver: Any = connection.connection.driver_connection
    cursors = [driver.cursor() for _ in together]
    sent_at = monotonic()
    try:
        if isinstance(adapted, AdaptedConnection):
            answers = adapted.run_async(partial(_run_async, cursors=cursors, statements=together))
        else:
            answers = _run(driver, cursors, together)
    except psycopg.Error as error:
        if _is_committed(cursors[-1]):
            raise _LostAfterCommitError from error
        undone = (each for each, cursor in zip(together, cursors, strict=True) if cursor.pgresult is None)
        raise as_of_engine(connection, next(undone, together[-1]).text, error) from error
    except Exception:
        raise
    except BaseException as error:  # cancelled: the state of the server is unknown
        connection.invalidate(error)
        raise
    each_answered = zip(together, cursors, answers, strict=True)
    rows = [statement.rows.of(cursor, answered) for statement, cursor, answered in each_answered]
    for each, answered in zip(deferred, rows, strict=False):
        if each.on_answer is not None:
            each.on_answer(answered, sent_at)
    return rows[len(deferred) :]


def _is_committed(cursor: Any) -> bool:
    return cursor.pgresult is not None and cursor.pgresult.command_status == b"COMMIT"


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


# Placeholders as in Postgres ($1): otherwise the driver would parse each long statement again, in Python.
PARAMSTYLE = "numeric_dollar"
DIALECT = create_engine("postgresql+psycopg://", paramstyle=PARAMSTYLE).dialect


class BulkInsert:
    """A Core INSERT with ON CONFLICT and RETURNING, for many rows in one statement.

    It uses multi-row VALUES, rendered once for each number of rows. SQLAlchemy's own feature for this
    (insertmanyvalues) processes each parameter of each row several times, which took half of the time per event.
    """

    ROWS = 1_000  # per statement; Postgres allows at most 65,535 parameters

    def __init__(self, statement: Insert | ReturningInsert[Any], columns: Sequence[str]) -> None:
        of_one = statement.values({name: bindparam(name) for name in columns})
        text_of_one = str(of_one.compile(dialect=DIALECT))
        self._head, _, rest = text_of_one.partition(" VALUES (")
        self._tail = rest.partition(")")[2]
        self._names = self._head.rpartition("(")[2].rstrip(")").split(", ")
        self._values = itemgetter(*self._names)
        self._render = lru_cache(maxsize=128)(self._text)
        self._rows = Rows()

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Insert the rows and return the RETURNING rows in any order: match them by key."""
        answered: list[Any] = []
        for statement in self.bind(rows):
            answered += execute(connection, statement)[0]
        return answered

    def bind(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Statement]:
        """Yield the statements that insert these rows, for `execute`."""
        for start in range(0, len(rows), self.ROWS):
            page = rows[start : start + self.ROWS]
            values = tuple(chain.from_iterable(map(self._values, page)))
            # Times and decimals are passed as text, for two reasons: the driver would convert them slowly, in Python;
            # and a value then has the same type as a null, so that one prepared statement serves both.
            parameters = msgspec.to_builtins(values, builtin_types=(bytes,))
            yield Statement(self._render(len(page)), parameters, self._rows)

    def _text(self, count: int) -> str:
        width = len(self._names)
        rows = (
            "(" + ", ".join(f"${number}" for number in range(first, first + width)) + ")"
            for first in range(1, count * width + 1, width)
        )
        return f"{self._head} VALUES {', '.join(rows)}{self._tail}"
