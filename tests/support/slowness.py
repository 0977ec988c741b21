"""Rows that are slow on purpose: a trigger that sleeps, or fails, where a row is one of those that a test names."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text

from tests.support.rows import execute


def slow_rows(engine: Engine, table: str, column: str, value: str, action: str) -> None:
    """From now on Postgres runs `action`, PL/pgSQL, before it writes a row whose `column` has this value."""
    name = f"slow_{table.replace('.', '_')}"
    execute(
        engine,
        f"CREATE OR REPLACE FUNCTION public.{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF new.{column} = '{value}' THEN {action}; END IF; RETURN new; END $$",
        f"CREATE OR REPLACE TRIGGER {name} BEFORE INSERT OR UPDATE ON {table}"
        f" FOR EACH ROW EXECUTE FUNCTION public.{name}()",
    )


def quick_rows(engine: Engine, table: str) -> None:
    """Undo it."""
    execute(engine, f"DROP TRIGGER slow_{table.replace('.', '_')} ON {table}")


@contextmanager
def holding(engine: Engine, *statements: str) -> Iterator[Connection]:
    """A transaction of another program that stays open, with its locks."""
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
        yield connection
        connection.rollback()
