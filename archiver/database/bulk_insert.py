"""Insert many rows with one statement."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, create_engine
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.sql.dml import ReturningInsert

from archiver.database import raw_statement

# Placeholders as Postgres has them ($1): otherwise the driver would parse each long statement again, in Python.
PARAMSTYLE = "numeric_dollar"
DIALECT = create_engine("postgresql+psycopg://", paramstyle=PARAMSTYLE).dialect


class BulkInsert:
    """A Core INSERT with ON CONFLICT and RETURNING, for many rows in one statement.

    Written as multi-row VALUES, rendered once for each number of rows. SQLAlchemy's own way to the same statement
    (insertmanyvalues) handles each parameter of each row several times, which cost half of what an event costs here.
    """

    ROWS = 1_000  # of one statement: Postgres takes at most 65,535 parameters

    def __init__(self, statement: Insert | ReturningInsert[Any], columns: Sequence[str]) -> None:
        of_one = statement.values({name: bindparam(name) for name in columns})
        text_of_one = str(of_one.compile(dialect=DIALECT))
        self._head, _, rest = text_of_one.partition(" VALUES (")
        self._tail = rest.partition(")")[2]
        self._names = self._head.rpartition("(")[2].rstrip(")").split(", ")
        self._values = itemgetter(*self._names)
        self._render = lru_cache(maxsize=128)(self._text)
        self._rows = raw_statement.Rows()

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Insert the rows and return the RETURNING rows in any order: match them by key."""
        answered: list[Any] = []
        for statement in self.bind(rows):
            answered += raw_statement.execute(connection, statement)[0]
        return answered

    def bind(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[raw_statement.Statement]:
        """The statements that insert these rows, for `execute`."""
        for start in range(0, len(rows), self.ROWS):
            page = rows[start : start + self.ROWS]
            values = tuple(chain.from_iterable(map(self._values, page)))
            # Postgres reads times and decimals as text as well, with two gains: the driver writes them in Python,
            # slowly; and a value has the type of a null, so that a statement prepared for one serves the other.
            parameters = msgspec.to_builtins(values, builtin_types=(bytes,))
            yield raw_statement.Statement(self._render(len(page)), parameters, self._rows)

    def _text(self, count: int) -> str:
        width = len(self._names)
        rows = (
            "(" + ", ".join(f"${number}" for number in range(first, first + width)) + ")"
            for first in range(1, count * width + 1, width)
        )
        return f"{self._head} VALUES {', '.join(rows)}{self._tail}"
