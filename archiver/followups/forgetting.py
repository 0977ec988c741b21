"""What is dropped of deliveries, some at a time: those that ended long ago, those whose subscription was removed."""

from sqlalchemy import Connection, text

_FORGET = """
    WITH gone AS MATERIALIZED (
        DELETE FROM archiver.deliveries d USING (
            SELECT subscription_id, cursor FROM archiver.deliveries WHERE {which} LIMIT :most FOR UPDATE SKIP LOCKED
        ) AS old WHERE d.subscription_id = old.subscription_id AND d.cursor = old.cursor
        RETURNING d.subscription_id, d.cursor
    ), attempts AS (
        DELETE FROM archiver.attempts a USING gone g
         WHERE a.subscription_id = g.subscription_id AND a.cursor = g.cursor
    )
    SELECT count(*) FROM gone
"""
_FORGET_ENDED = text(_FORGET.format(which="ended_at < now() - :days * interval '1 day'"))
# Which there are, from one to the next by the index.
_FORGET_REMOVED = text(
    _FORGET.format(
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
_FORGET_OF = text(_FORGET.format(which="subscription_id = :id"))
AT_ONCE = 1_000


def forget_ended(connection: Connection, days: int) -> int:
    """Drop some of those that ended so long ago; answers how many."""
    return int(connection.scalar(_FORGET_ENDED, {"days": days, "most": AT_ONCE}) or 0)


def forget_removed(connection: Connection) -> int:
    """Drop some whose subscription was removed; answers how many."""
    return int(connection.scalar(_FORGET_REMOVED, {"most": AT_ONCE}) or 0)


def forget_of(connection: Connection, subscription_id: int) -> int:
    """Drop some of a subscription that was removed; answers how many."""
    return int(connection.scalar(_FORGET_OF, {"id": subscription_id, "most": AT_ONCE}) or 0)
