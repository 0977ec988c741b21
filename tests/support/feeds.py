"""The change feed as consumers see it, and what is published for them."""

from typing import Any

from sqlalchemy import Engine

from archiver.database import transaction
from archiver.outbound import feed
from tests.support.rows import rows


def publish(engine: Engine) -> int:
    """All that is committed; answers how many changes."""
    total = 0
    while True:
        with transaction(engine) as connection:
            published = feed.publish(connection)
        if not published:
            return total
        total += published


def published(engine: Engine, after: int = 0) -> list[tuple[Any, ...]]:
    """Type, session and chat of each change after a cursor, in order, once all is published."""
    publish(engine)
    query = f"SELECT type, session_id, chat_id FROM analytics.changes WHERE cursor > {after} ORDER BY cursor"
    return rows(engine, query)


def cursor(engine: Engine) -> int:
    """The newest."""
    publish(engine)
    return int(rows(engine, "SELECT coalesce(max(cursor), 0) FROM analytics.changes")[0][0])
