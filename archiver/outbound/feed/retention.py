"""Delete old changes."""

from datetime import datetime

from sqlalchemy import Connection, text

PAGE = 5_000  # changes of one transaction

# The oldest ones up to the first that stays, so that what the feed holds has no gap; the newest one always stays: the
# next cursor is counted from it.
_DELETE = text(
    """
    WITH page AS MATERIALIZED (
        SELECT cursor, changed_at FROM archiver.changes
         WHERE cursor < (SELECT max(cursor) FROM archiver.changes) AND cursor <= :through
         ORDER BY cursor LIMIT :most
    )
    DELETE FROM archiver.changes
     WHERE cursor <= (SELECT max(cursor) FROM page)
       AND cursor < coalesce((SELECT min(cursor) FROM page WHERE changed_at >= :before), 9223372036854775807)
    """
).bindparams(most=PAGE)

_ALL = 2**63 - 1


def delete_old(connection: Connection, before: datetime, consumed: int | None = None) -> int:
    """Delete a page of the oldest changes, those made before this time; answers how many.

    `consumed`: the cursor up to which all consumers have read; None: there is no consumer.
    """
    through = _ALL if consumed is None else consumed
    return connection.execute(_DELETE, {"before": before, "through": through}).rowcount
