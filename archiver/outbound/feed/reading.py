"""Read the feed, and the backlog of unpublished changes."""

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


# From the view, because a reader has no other privilege.
_SELECT = text(
    """
    SELECT cursor, type, session_id, chat_id, seal_id, changed_at, epoch FROM analytics.changes
     WHERE cursor > :after ORDER BY cursor LIMIT :most
    """
)


def select_changes(connection: Connection, after: int, limit: int) -> list[Entry]:
    """Return at most `limit` changes after this cursor, in order."""
    return [Entry(*row) for row in connection.execute(_SELECT, {"after": after, "most": limit})]


class FeedEpoch(msgspec.Struct, frozen=True, gc=False):
    """A row of `analytics.epochs`: the newest cursor when the epoch began, and the greatest one assigned before."""

    epoch: str
    cursor: int
    given: int


_EPOCHS = text("SELECT epoch, cursor, given FROM analytics.epochs ORDER BY number")


def select_epochs(connection: Connection) -> list[FeedEpoch]:
    """Return the epochs of the feed in order; empty until a process has served this database."""
    return [FeedEpoch(*row) for row in connection.execute(_EPOCHS)]


class Extent(msgspec.Struct, frozen=True, gc=False):
    """The cursors of the oldest and the newest change in the feed; 0 if it is empty."""

    oldest: int
    newest: int


_EXTENT = text("SELECT coalesce(min(cursor), 0), coalesce(max(cursor), 0) FROM analytics.changes")


def select_extent(connection: Connection) -> Extent:
    """Return the current extent of the feed."""
    return Extent(*connection.execute(_EXTENT).one())


class Backlog(msgspec.Struct, frozen=True, gc=False):
    """The number of unpublished transactions (up to a limit) and the time of the oldest."""

    transactions: int
    since: datetime | None

    def is_overdue(self, now: datetime) -> bool:
        """Return whether the oldest transaction has waited so long that apparently no worker is publishing."""
        return self.since is not None and now - self.since > _OVERDUE


_OVERDUE = timedelta(seconds=60)
ADVICE = "start `archiver worker`, or `archiver serve` without --no-worker; if one is running, see its log."


_MAX_COUNTED = 100_000

_WAITING = text(
    """
    SELECT (SELECT count(*) FROM (SELECT FROM archiver.outbox LIMIT :most) AS counted) AS transactions,
           (SELECT changed_at FROM archiver.outbox ORDER BY id LIMIT 1) AS since
    """
).bindparams(most=_MAX_COUNTED)


def select_backlog(connection: Connection) -> Backlog:
    """Return the backlog of unpublished transactions."""
    return Backlog(*connection.execute(_WAITING).one())
