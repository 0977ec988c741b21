"""Delete old deliveries, deliveries of removed subscriptions, and their attempts, in batches."""

from collections.abc import Sequence

from sqlalchemy import Connection, TextClause, text

from archiver.database import as_json

Key = tuple[int, int]  # subscription_id, cursor
BATCH_SIZE = 1_000

_SELECT = """
    SELECT subscription_id, cursor FROM archiver.deliveries
     WHERE {which} AND (subscription_id, cursor) NOT IN (SELECT t.* FROM json_to_recordset(:but) AS t
                                                         (subscription_id bigint, cursor bigint))
     LIMIT :most FOR UPDATE SKIP LOCKED
"""
_SELECT_ENDED = text(_SELECT.format(which="ended_at < now() - :days * interval '1 day'"))
# Finds the distinct subscription ids by index, one after another.
_SELECT_REMOVED = text(
    _SELECT.format(
        which="""subscription_id = (
                WITH RECURSIVE known AS (
                    SELECT min(subscription_id) AS id FROM archiver.deliveries
                     UNION ALL
                    SELECT (SELECT min(d.subscription_id) FROM archiver.deliveries d
                             WHERE d.subscription_id > known.id)
                      FROM known WHERE known.id IS NOT NULL
                )
                SELECT min(id) FROM known
                 WHERE NOT EXISTS (SELECT FROM archiver.subscriptions s WHERE s.id = known.id)
            )"""
    )
)
_SELECT_OF = text(_SELECT.format(which="subscription_id = :id"))
_DELETE = text(
    """
    WITH old AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:keys) AS t (subscription_id bigint, cursor bigint)
    ), deleted AS MATERIALIZED (
        DELETE FROM archiver.deliveries d USING old
         WHERE d.subscription_id = old.subscription_id AND d.cursor = old.cursor
           AND (d.ended_at IS NOT NULL
                OR NOT EXISTS (SELECT FROM archiver.subscriptions s WHERE s.id = d.subscription_id))
        RETURNING d.subscription_id, d.cursor
    ), attempts AS (
        DELETE FROM archiver.attempts a USING deleted g
         WHERE a.subscription_id = g.subscription_id AND a.cursor = g.cursor
    )
    SELECT count(*) FROM deleted
    """
)


def select_ended(connection: Connection, days: int, but: Sequence[Key] = ()) -> list[Key]:
    """Return some deliveries that ended more than `days` ago, except those in `but`."""
    return _select(connection, _SELECT_ENDED, but, days=days)


def select_removed(connection: Connection, but: Sequence[Key] = ()) -> list[Key]:
    """Return some deliveries whose subscription was removed, except those in `but`."""
    return _select(connection, _SELECT_REMOVED, but)


def _select(connection: Connection, query: TextClause, but: Sequence[Key], **values: int) -> list[Key]:
    rows = connection.execute(query, {**values, "but": _json(but), "most": BATCH_SIZE})
    return [(row.subscription_id, row.cursor) for row in rows]


def delete_deliveries(connection: Connection, keys: Sequence[Key]) -> int:
    """Delete these deliveries, except those now scheduled for a retry; return the number deleted."""
    return int(connection.scalar(_DELETE, {"keys": _json(keys)}) or 0)


def delete_of_subscription(connection: Connection, subscription_id: int) -> int:
    """Delete some deliveries of a removed subscription; return the number deleted."""
    return delete_deliveries(connection, _select(connection, _SELECT_OF, (), id=subscription_id))


def _json(keys: Sequence[Key]) -> str:
    return as_json([{"subscription_id": key[0], "cursor": key[1]} for key in keys])
