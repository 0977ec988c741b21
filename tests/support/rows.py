"""The tables as a superuser may treat them: looked into, and emptied, guards or none."""

from typing import Any

from sqlalchemy import Engine, text

from archiver.database import transaction

DERIVED = ("messages", "chats", "sessions")


def rows(engine: Engine, query: str) -> list[Any]:
    with transaction(engine) as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def execute(engine: Engine, *statements: str, unguarded: bool = False) -> None:
    """`unguarded`: past the triggers, as only a superuser can."""
    with engine.begin() as connection:
        if unguarded:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in statements:
            connection.execute(text(statement))


def empty(engine: Engine, *names: str) -> None:
    """Remove all rows; the session that stands for none stays."""
    deletes = [
        f"DELETE FROM archiver.{name}" + (" WHERE session_id <> ''" if name == "sessions" else "") for name in names
    ]
    execute(engine, *deletes, unguarded=True)
