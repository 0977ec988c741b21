"""The index of full-text search, brought up to date and searched."""

import asyncio
from functools import partial
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy import event as engine_event

from archiver import database
from archiver.database import transaction
from archiver.telemetry.duty_health import Duty
from archiver.worker.indexing import Indexing
from tests.support.feeds import publish
from tests.support.rows import rows


def index(engine: Engine, language: str | None = None, steps: int | None = None, role: str = "") -> None:
    """All that is committed, or so many pages, as this role; `language` restarts the index."""
    publish(engine)

    async def run() -> None:
        asynchronous = database.connect_async(engine.url, pool_size=1)
        if role:
            engine_event.listen(asynchronous.sync_engine, "begin", partial(_set_role, role))
        indexing = Indexing(asynchronous, Duty("search"))
        try:
            if language is not None:
                await indexing.switch_off()
                await indexing.switch_on(language)
            done = 0
            while done != steps and await indexing.step():
                done += 1
            if steps is None:
                await indexing.rebuild()
        finally:
            await asynchronous.dispose()

    asyncio.run(run())


def _set_role(role: str, connection: Any) -> None:
    connection.exec_driver_sql(f"SET LOCAL ROLE {role}")


def found(engine: Engine, query: str, **arguments: Any) -> list[tuple[Any, ...]]:
    """The rows of `analytics.search`."""
    named = ", ".join(f"{name} => :{name}" for name in arguments)
    statement = f"SELECT * FROM analytics.search(:query{', ' if named else ''}{named})"
    with transaction(engine) as connection:
        return [tuple(row) for row in connection.execute(text(statement), {"query": query, **arguments})]


def keys(engine: Engine, query: str, **arguments: Any) -> list[tuple[str, str, int]]:
    """Session, turn and ordinal of each match, in order."""
    return [(row[0], row[1], row[2]) for row in found(engine, query, **arguments)]


def matches(engine: Engine, query: str, language: str = "simple") -> list[tuple[str, str, int]]:
    """The same without the index."""
    statement = text(
        "SELECT session_id, turn_id, ordinal FROM analytics.messages"
        f" WHERE to_tsvector('{language}', content) @@ websearch_to_tsquery('{language}', :query)"
    )
    with transaction(engine) as connection:
        return sorted(tuple(row) for row in connection.execute(statement, {"query": query}))


def lexemes(engine: Engine) -> set[str]:
    return {row[0] for row in rows(engine, "SELECT word FROM ts_stat('SELECT lexemes FROM archiver.search')")}
