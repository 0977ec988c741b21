"""Read and write the table of subscriptions: receivers, filters, cursors and circuit breakers."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, func, insert, select, text, update

from archiver.database import tables
from archiver.database.clock import MAX_WAIT
from archiver.errors import ArchiverError
from archiver.inbound.signatures import standard_webhooks

SEAL = "seal.created"
MAX_SUBSCRIPTIONS = 100
CONCURRENCY, MAX_CONCURRENCY = 4, 32
OVERLAP = timedelta(hours=24)  # both secrets sign for this long after a rotation
LEASE_SECONDS = 20.0
GONE, FAILING, BY_HAND = "gone", "failing", "paused"  # why a subscription is paused


class SubscriptionNotFoundError(ArchiverError):
    """No subscription has this id."""

    def __init__(self, subscription_id: int) -> None:
        super().__init__(f"subscription {subscription_id} does not exist; list them with `archiver followups list`")


class SubscriptionLimitError(ArchiverError):
    """The maximum number of subscriptions is reached."""


class CursorBeyondFeedError(ArchiverError):
    """The cursor is beyond the end of the feed."""


class Filter(msgspec.Struct, frozen=True):
    """Conditions on a conversation; a field that is None matches any."""

    assistant_id: str | None = None
    variable: str | None = None
    value: str | None = None
    contains: str | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether the filter matches everything."""
        return self == Filter()


class Subscription(msgspec.Struct, frozen=True):
    """The fields of a subscription that its sender uses."""

    id: int
    url: str
    events: tuple[str, ...]
    filter: Filter
    is_ordered: bool
    concurrency: int
    secret: str
    previous_secret: str | None
    previous_until: datetime | None
    cursor: int
    failures: int
    open_seconds: float  # for which the circuit is still open
    failing_seconds: float  # since the first of the consecutive failures

    def keys(self, now: datetime) -> list[bytes]:
        """Return the signing keys, newest first. Raises `standard_webhooks.SecretError` if the newest is damaged."""
        result = [standard_webhooks.key(self.secret)]
        if self.previous_secret is not None and self.previous_until is not None and now < self.previous_until:
            with contextlib.suppress(standard_webhooks.SecretError):  # a damaged previous secret is ignored
                result.append(standard_webhooks.key(self.previous_secret))
        return result


_S = tables.subscriptions


def insert_subscription(connection: Connection, values: Mapping[str, Any], after: int | None) -> int:
    """Insert a subscription that starts after this cursor or at the end of the feed; return its id.

    Raises `SubscriptionLimitError` and `CursorBeyondFeedError`.
    """
    connection.execute(text("LOCK TABLE archiver.subscriptions IN SHARE ROW EXCLUSIVE MODE"))
    if int(connection.scalar(select(func.count()).select_from(_S)) or 0) >= MAX_SUBSCRIPTIONS:
        raise SubscriptionLimitError(
            f"the limit of {MAX_SUBSCRIPTIONS} subscriptions is reached: remove one with `archiver followups remove`"
        )
    newest = select_newest_cursor(connection)
    if after is not None and after > newest:
        raise CursorBeyondFeedError(
            f"the feed ends at {newest}, before cursor {after}: changes up to the cursor would be skipped; give a"
            " lower one"
        )
    cursor = newest if after is None else after
    row = {**values, "cursor": cursor, "created_at": datetime.now(UTC)}
    return int(connection.execute(insert(_S).returning(_S.c.id), row).scalar_one())


def select_newest_cursor(connection: Connection) -> int:
    """Return the newest cursor of the feed; 0 if it is empty."""
    return int(connection.scalar(text("SELECT coalesce(max(cursor), 0) FROM archiver.changes")) or 0)


def select_ids(connection: Connection) -> set[int]:
    """Return the ids of all subscriptions."""
    return set(connection.scalars(select(_S.c.id)))


def select_one(connection: Connection, subscription_id: int) -> RowMapping:
    """Return a subscription with its secrets. Raises `SubscriptionNotFoundError`."""
    row = connection.execute(select(_S).where(_S.c.id == subscription_id)).mappings().first()
    if row is None:
        raise SubscriptionNotFoundError(subscription_id)
    return row


def subscription_from_row(row: RowMapping) -> Subscription:
    """Return the subscription in this row, for its sender."""
    row_filter = Filter(row["assistant_id"], row["variable"], row["value"], row["contains"])
    return Subscription(
        id=row["id"],
        url=row["url"],
        events=tuple(row["events"]),
        filter=row_filter,
        is_ordered=row["is_ordered"],
        concurrency=row["concurrency"],
        secret=row["secret"],
        previous_secret=row["previous_secret"],
        previous_until=row["previous_until"],
        cursor=row["cursor"],
        failures=row["failures"],
        open_seconds=float(row.get("open_seconds") or 0.0),
        failing_seconds=float(row.get("failing_seconds") or 0.0),
    )


def _change(connection: Connection, subscription_id: int, **values: Any) -> None:
    changed = connection.execute(update(_S).where(_S.c.id == subscription_id).values(**values).returning(_S.c.id))
    if changed.first() is None:
        raise SubscriptionNotFoundError(subscription_id)


def pause(connection: Connection, subscription_id: int, reason: str) -> None:
    """Pause a subscription. Raises `SubscriptionNotFoundError`."""
    _change(connection, subscription_id, paused_at=datetime.now(UTC), pause_reason=reason)


_HEALTHY: dict[str, Any] = {"failures": 0, "failing_since": None, "open_until": None}


def resume(connection: Connection, subscription_id: int) -> int:
    """Resume a subscription; return the number of deleted unread changes. Raises `SubscriptionNotFoundError`."""
    _change(connection, subscription_id, paused_at=None, pause_reason=None, **_HEALTHY)
    oldest = connection.scalar(text("SELECT min(cursor) FROM archiver.changes"))
    cursor = int(select_one(connection, subscription_id)["cursor"])
    return 0 if oldest is None else max(0, int(oldest) - cursor - 1)


def reset_circuit(connection: Connection, subscription_id: int) -> None:
    """Close the circuit breaker, because the receiver responds again. Raises `SubscriptionNotFoundError`."""
    _change(connection, subscription_id, **_HEALTHY)


def rotate(connection: Connection, subscription_id: int, secret: str) -> datetime:
    """Sign with this secret from now on, and with the previous one until the returned time."""
    until = datetime.now(UTC) + OVERLAP
    before = select_one(connection, subscription_id)["secret"]
    _change(connection, subscription_id, secret=secret, previous_secret=before, previous_until=until)
    return until


def remove(connection: Connection, subscription_id: int) -> None:
    """Remove a subscription; its deliveries are pruned later. Raises `SubscriptionNotFoundError`."""
    if connection.execute(delete(_S).where(_S.c.id == subscription_id).returning(_S.c.id)).first() is None:
        raise SubscriptionNotFoundError(subscription_id)


def new_owner() -> str:
    """Return a unique name for a lease holder."""
    return secrets.token_hex(8)


# One sender at a time has the lease, across machines, so the database clock is used. A lease that ends implausibly
# late was acquired while that clock was ahead.
_LEASE = text(
    """
    UPDATE archiver.subscriptions SET leased_by = :owner, leased_until = now() + :seconds * interval '1 second'
     WHERE id = :id AND paused_at IS NULL
       AND (leased_by = :owner OR leased_until IS NULL OR leased_until < now()
            OR leased_until > now() + 2 * :seconds * interval '1 second')
    RETURNING *, extract(epoch FROM open_until - now()) AS open_seconds,
              extract(epoch FROM now() - failing_since) AS failing_seconds
    """
)
_RELEASE = text(
    "UPDATE archiver.subscriptions SET leased_by = NULL, leased_until = NULL WHERE id = :id AND leased_by = :owner"
)


def lease(connection: Connection, subscription_id: int, owner: str) -> Subscription | None:
    """Lease the subscription and return it; None if it is leased by another worker, paused or removed."""
    values = {"id": subscription_id, "owner": owner, "seconds": LEASE_SECONDS}
    row = connection.execute(_LEASE, values).mappings().first()
    return None if row is None else subscription_from_row(row)


def release(connection: Connection, subscription_id: int, owner: str) -> None:
    """Release the lease."""
    connection.execute(_RELEASE, {"id": subscription_id, "owner": owner})


# After an idle period that is longer than any wait between two attempts, the count of failures starts again.
_SET_CIRCUIT = text(
    """
    UPDATE archiver.subscriptions
       SET failures = :failures,
           failing_since = CASE WHEN :failures = 0 THEN NULL
                                WHEN open_until < now() - :idle * interval '1 second' THEN now()
                                ELSE coalesce(failing_since, now()) END,
           open_until = CASE WHEN :failures > 0 OR :wait > 0 OR open_until > now()
                               THEN greatest(open_until, now() + :wait * interval '1 second') END
     WHERE id = :id
    """
)


def set_circuit(connection: Connection, subscription_id: int, failures: int, wait: float) -> None:
    """Store the number of consecutive failures; the circuit stays open for at least `wait` seconds from now."""
    values = {"id": subscription_id, "failures": failures, "wait": wait, "idle": MAX_WAIT.total_seconds()}
    connection.execute(_SET_CIRCUIT, values)


def probe_beyond(connection: Connection, now: datetime, beyond: datetime) -> int:
    """Let circuits be probed now that are open until after `beyond`, which none can be; return their number."""
    return connection.execute(update(_S).where(_S.c.open_until > beyond).values(open_until=now)).rowcount


# Active subscriptions with unread changes or due deliveries, unless another owner has leased them.
_SELECT_BUSY = text(
    """
    SELECT s.id FROM archiver.subscriptions s
     WHERE s.paused_at IS NULL AND coalesce(s.open_until, '-infinity') <= now()
       AND (s.leased_by = :owner OR s.leased_until IS NULL OR s.leased_until < now()
            OR s.leased_until > now() + 2 * :seconds * interval '1 second')
       AND (s.cursor < (SELECT max(cursor) FROM archiver.changes)
            OR EXISTS (SELECT FROM archiver.deliveries d
                        WHERE d.subscription_id = s.id AND d.state = 'pending' AND d.due_at <= now()))
     ORDER BY s.id
    """
)


def select_busy(connection: Connection, owner: str) -> Sequence[int]:
    """Return the ids of the subscriptions with unread changes or due deliveries that `owner` may lease now."""
    return connection.scalars(_SELECT_BUSY, {"owner": owner, "seconds": LEASE_SECONDS}).all()


_SELECT_MIN_CURSOR = text("SELECT min(cursor) FROM archiver.subscriptions WHERE paused_at IS NULL")


def select_consumed(connection: Connection) -> int | None:
    """Return the cursor up to which all active subscriptions have read the feed; None if there are none.

    A paused subscription does not retain changes; otherwise a forgotten one would retain the feed forever.
    """
    least = connection.scalar(_SELECT_MIN_CURSOR)
    return None if least is None else int(least)
