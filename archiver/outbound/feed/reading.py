"""Reading the feed, and what it has not published yet."""

from datetime import datetime, timedelta

import msgspec
from sqlalchemy import Connection, text


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A row of `analytics.changes`."""

    cursor: int
    type: str
    session_id: str
    chat_id: str | None
    seal_id: int | None
    changed_at: datetime
    epoch: str | None


# Of the view, which is all that a reader may see.
_SELECT = text(
    """
    SELECT cursor, type, session_id, chat_id, seal_id, changed_at, epoch FROM analytics.changes
     WHERE cursor > :after ORDER BY cursor LIMIT :most
    """
)


def select_changes(connection: Connection, after: int, limit: int) -> list[Entry]:
    """The changes after this cursor, in order, at most so many."""
    return [Entry(*row) for row in connection.execute(_SELECT, {"after": after, "most": limit})]


class FeedEpoch(msgspec.Struct, frozen=True, gc=False):
    """A row of `analytics.epochs`: the newest change at its beginning, and the greatest cursor given before it."""

    epoch: str
    cursor: int
    given: int


_EPOCHS = text("SELECT epoch, cursor, given FROM analytics.epochs ORDER BY number")


def select_epochs(connection: Connection) -> list[FeedEpoch]:
    """The epochs of the feed, in order; none before a process has served this database."""
    return [FeedEpoch(*row) for row in connection.execute(_EPOCHS)]


class Extent(msgspec.Struct, frozen=True, gc=False):
    """The cursors of the oldest change that the feed still holds, and of the newest; 0 where it holds none."""

    oldest: int
    newest: int


_EXTENT = text("SELECT coalesce(min(cursor), 0), coalesce(max(cursor), 0) FROM analytics.changes")


def select_extent(connection: Connection) -> Extent:
    """From where to where the feed goes at present."""
    return Extent(*connection.execute(_EXTENT).one())


class Backlog(msgspec.Struct, frozen=True, gc=False):
    """Unpublished transactions: number (up to a limit) and age of the oldest."""

    transactions: int
    since: datetime | None

    def is_overdue(self, now: datetime) -> bool:
        """Return whether the wait is so long that no worker can be running."""
        return self.since is not None and now - self.since > _OVERDUE


_OVERDUE = timedelta(seconds=60)
ADVICE = "start `archiver worker`, or `archiver serve` without --no-worker; if one runs, see its log."


_MAX_COUNTED = 100_000

_WAITING = text(
    """
    SELECT (SELECT count(*) FROM (SELECT FROM archiver.outbox LIMIT :most) AS counted) AS transactions,
           (SELECT changed_at FROM archiver.outbox ORDER BY id LIMIT 1) AS since
    """
).bindparams(most=_MAX_COUNTED)


def select_backlog(connection: Connection) -> Backlog:
    """What waits for a worker."""
    return Backlog(*connection.execute(_WAITING).one())
