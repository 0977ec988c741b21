"""Determine up to which id each sealed table is settled (no lower id can appear).

If no transaction is writing, a table lock shows it immediately. If long or overlapping transactions are writing,
their end shows it: the ids that were visible before these transactions were listed are settled when the last of them
has ended, regardless of later writes.
"""

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver.database import is_lock_timeout, run_until_locked, transaction

# Writers queue behind a waiting lock, so the wait is short and repeated.
LOCK_SECONDS = 0.005
ATTEMPTS = 60
PAUSE_SECONDS = 0.03

Settled = dict[str, int]

_SELECT_WRITTEN = text(
    """
    SELECT (SELECT coalesce(max(id), 0) FROM archiver.events) AS events_through,
           (SELECT coalesce(max(id), 0) FROM archiver.acts) AS acts_through,
           (SELECT coalesce(max(id), 0) FROM archiver.erasures) AS erasures_through,
           (SELECT coalesce(max(id), 0) FROM archiver.removals) AS removals_through
    """
)
# A transaction acquires the table lock before an id, and holds it until its end; so do prepared transactions. In a
# distributed database, writers may have locks that are not visible here: NULL.
_SELECT_WRITERS = text(
    """
    SELECT CASE WHEN to_regclass('pg_catalog.pg_dist_partition') IS NULL THEN ARRAY(
        SELECT DISTINCT virtualtransaction FROM pg_locks
         WHERE locktype = 'relation' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND relation IN (CAST('archiver.events' AS regclass), CAST('archiver.acts' AS regclass),
                            CAST('archiver.erasures' AS regclass), CAST('archiver.removals' AS regclass))
           AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    ) END
    """
)


class Settling:
    """A search for settled rows, which remembers from call to call the transactions whose end is awaited."""

    def __init__(self) -> None:
        self._written: Settled = {}
        self._writers: frozenset[str] | None = None

    @property
    def is_waiting(self) -> bool:
        """Return whether the end of writing transactions is awaited, so that the next check is cheap."""
        return self._writers is not None

    def settle(self, engine: Engine) -> Settled | None:
        """Return the id up to which each table is settled; None if that is not yet known."""
        if self._writers is None:
            settled = _settle(engine)
            if settled is None:
                with transaction(engine) as connection:
                    self._written = dict(connection.execute(_SELECT_WRITTEN).mappings().one())
                    self._writers = _select_writers(connection)
            return settled
        with transaction(engine) as connection:
            under_way = _select_writers(connection)
        if under_way is None or self._writers & under_way:
            return None
        self._writers = None
        return self._written


def _select_writers(connection: Connection) -> frozenset[str] | None:
    """Return the transactions that have written or may write. Call it after `_SELECT_WRITTEN`, in a new snapshot."""
    result = connection.scalar(_SELECT_WRITERS)
    return None if result is None else frozenset(result)


def _settle(engine: Engine) -> Settled | None:
    def work(connection: Connection) -> Settled:
        return dict(connection.execute(text("SELECT * FROM archiver.settle()")).mappings().one())

    try:
        return run_until_locked(
            engine, work, lock_seconds=LOCK_SECONDS, attempts=ATTEMPTS, pause_seconds=PAUSE_SECONDS
        )
    except DBAPIError as error:
        if not is_lock_timeout(error):
            raise
        return None
