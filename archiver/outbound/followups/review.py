"""Select subscriptions and deliveries for display, and request retries."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.outbound.followups.deliveries import State
from archiver.outbound.followups.schedule import ATTEMPTS

# Never selects the secrets. The latest attempt belongs to a pending delivery or to one of the newest dead deliveries.
_SHOW = text(
    """
    SELECT s.id, s.url, s.events, s.assistant_id, s.variable, s.value, s.contains, s.is_ordered, s.concurrency,
           s.cursor, s.created_at,
           CASE WHEN s.paused_at IS NOT NULL THEN 'paused' WHEN s.failures > 0 THEN 'failing' ELSE 'at work' END
               AS state,
           s.paused_at, s.pause_reason, s.failures, s.failing_since,
           CASE WHEN s.open_until > now() THEN s.open_until END AS open_until,
           a.status AS last_status, a.fault AS last_fault,
           (SELECT count(*) FROM archiver.deliveries d
             WHERE d.subscription_id = s.id AND d.state = 'pending') AS pending,
           (SELECT count(*) FROM archiver.deliveries d WHERE d.subscription_id = s.id AND d.state = 'dead') AS dead,
           greatest(0, (SELECT coalesce(max(cursor), 0) FROM archiver.changes) - s.cursor) AS behind
      FROM archiver.subscriptions s
      LEFT JOIN LATERAL (
               SELECT a.status, a.fault
                 FROM (SELECT cursor, attempts FROM archiver.deliveries
                        WHERE subscription_id = s.id AND state = 'pending' AND attempts > 0
                        UNION ALL
                       (SELECT cursor, attempts FROM archiver.deliveries
                         WHERE subscription_id = s.id AND state = 'dead' ORDER BY cursor DESC LIMIT 100)) AS d
                 JOIN archiver.attempts a
                      ON a.subscription_id = s.id AND a.cursor = d.cursor AND a.number = d.attempts
                WHERE s.failures > 0 ORDER BY a.at DESC LIMIT 1
           ) AS a ON true
     WHERE s.id = coalesce(CAST(:id AS bigint), s.id) ORDER BY s.id
    """
)


def select_subscriptions(connection: Connection, subscription_id: int | None = None) -> list[dict[str, Any]]:
    """Return all subscriptions, or one, without their secrets.

    `state` is "paused", "failing" or "at work"; `last_status` and `last_fault` describe the latest consecutive
    failure; `open_until` is the time until which the circuit breaker blocks deliveries; `behind` counts the
    changes of the feed after its cursor. Each is null if it does not apply.
    """
    found = connection.execute(_SHOW, {"id": subscription_id}).mappings()
    return [{**row, "closed_until": row["open_until"]} for row in found]  # the name in earlier versions


def only(*, dead: bool, pending: bool) -> State | None:
    """Return the requested state; None means any."""
    return "dead" if dead else "pending" if pending else None


def select_failing(connection: Connection) -> list[dict[str, Any]]:
    """Return the active subscriptions whose latest attempt failed, as in `select_subscriptions`."""
    return [row for row in select_subscriptions(connection) if row["state"] == "failing"]


def latest_fault(row: Mapping[str, Any]) -> str:
    """Return the latest fault of a row as text, such as "no_connection" or "503 not_2xx"; empty without a failure."""
    return " ".join(str(row[name]) for name in ("last_status", "last_fault") if row[name] is not None)


def name_failing(failing: Sequence[Mapping[str, Any]]) -> str:
    """Return the ids of some failing subscriptions as text, each with its latest fault."""
    names = [f"{row['id']} ({latest_fault(row)})" if latest_fault(row) else str(row["id"]) for row in failing]
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


_MAX_NAMED = 5
_LIST = """
    SELECT d.subscription_id, d.cursor, d.type, d.session_id, d.chat_id, d.seal_id, d.changed_at, d.state, d.attempts,
           d.due_at, d.ended_at, a.at AS attempted_at, a.seconds, a.status, a.fault, a.answer
      FROM archiver.subscriptions s
     CROSS JOIN LATERAL (
               SELECT * FROM archiver.deliveries d WHERE d.subscription_id = s.id {of_state}
                ORDER BY d.cursor DESC LIMIT :most
           ) AS d
      LEFT JOIN archiver.attempts a
             ON a.subscription_id = d.subscription_id AND a.cursor = d.cursor AND a.number = d.attempts
     {of_subscription} ORDER BY d.cursor DESC, d.subscription_id LIMIT :most
"""


def select_deliveries(
    connection: Connection, *, subscription_id: int | None, state: State | None, limit: int
) -> Sequence[RowMapping]:
    """Return the newest deliveries, each with its latest attempt."""
    values: dict[str, Any] = {"most": limit}
    of_subscription = ""
    if subscription_id is not None:
        of_subscription, values["id"] = "WHERE s.id = :id", subscription_id
    of_state = "" if state is None else f"AND d.state = '{state}'"
    query = text(_LIST.format(of_state=of_state, of_subscription=of_subscription))
    return connection.execute(query, values).mappings().all()


_SELECT_DELIVERY = text(
    """
    SELECT d.* FROM archiver.deliveries d JOIN archiver.subscriptions s ON s.id = d.subscription_id
     WHERE d.subscription_id = :id AND d.cursor = :cursor
    """
)
_SELECT_ATTEMPTS = text(
    """
    SELECT number, at, seconds, status, fault, answer FROM archiver.attempts
     WHERE subscription_id = :id AND cursor = :cursor ORDER BY number
    """
)


def select_delivery(connection: Connection, subscription_id: int, cursor: int) -> RowMapping | None:
    """Return one delivery of an existing subscription; None if there is none."""
    values = {"id": subscription_id, "cursor": cursor}
    return connection.execute(_SELECT_DELIVERY, values).mappings().one_or_none()


def select_attempts(connection: Connection, subscription_id: int, cursor: int) -> list[dict[str, Any]]:
    """Return the attempts at one delivery, oldest first; `answer`: the beginning of the response as text."""
    found = connection.execute(_SELECT_ATTEMPTS, {"id": subscription_id, "cursor": cursor}).mappings()
    return [{**row, "answer": _as_text(row["answer"])} for row in found]


def _as_text(answer: bytes | None) -> str | None:
    return None if answer is None else bytes(answer).decode(errors="replace")


_RETRY = """
    UPDATE archiver.deliveries
       SET state = 'pending', due_at = now(), ended_at = NULL, last_attempt = attempts + :attempts
     WHERE {which} RETURNING cursor
"""
_RETRY_ONE = text(_RETRY.format(which="subscription_id = :id AND cursor = :cursor AND state IN ('dead', 'pending')"))
_SELECT_ONE = text(
    """
    SELECT FROM archiver.deliveries d JOIN archiver.subscriptions s ON s.id = d.subscription_id
     WHERE d.subscription_id = :id AND d.cursor = :cursor
    """
)
_RETRY_DEAD = text(
    _RETRY.format(
        which="subscription_id = :id AND state = 'dead' AND cursor IN (SELECT cursor FROM archiver.deliveries"
        " WHERE subscription_id = :id AND state = 'dead' ORDER BY cursor LIMIT :most)"
    )
)


Retried = Literal["retried", "delivered", "unknown"]


def retry(connection: Connection, subscription_id: int, cursor: int) -> Retried:
    """Make one delivery due now with a new set of attempts, unless it is delivered or does not exist."""
    values = {"id": subscription_id, "cursor": cursor}
    if connection.execute(_RETRY_ONE, values | {"attempts": ATTEMPTS}).first() is not None:
        return "retried"
    return "unknown" if connection.execute(_SELECT_ONE, values).first() is None else "delivered"


def retry_dead(connection: Connection, subscription_id: int, limit: int) -> int:
    """Make the oldest dead deliveries due, at most `limit`; return their number."""
    values = {"id": subscription_id, "most": limit, "attempts": ATTEMPTS}
    return len(connection.execute(_RETRY_DEAD, values).all())


class FollowupStats(msgspec.Struct, frozen=True):
    """Statistics of follow-ups: counts, and the age in seconds of the oldest undelivered change."""

    subscriptions: int
    paused: int
    failing: int
    pending: int
    dead: int
    behind: int
    oldest_seconds: float


_STATS = text(
    """
    SELECT (SELECT count(*) FROM archiver.subscriptions) AS subscriptions,
           (SELECT count(*) FROM archiver.subscriptions WHERE paused_at IS NOT NULL) AS paused,
           (SELECT count(*) FROM archiver.subscriptions
             WHERE paused_at IS NULL AND failures > 0) AS failing,
           (SELECT count(*) FROM archiver.deliveries WHERE state = 'pending') AS pending,
           (SELECT count(*) FROM archiver.deliveries WHERE state = 'dead') AS dead,
           (SELECT coalesce(max(c.newest - s.cursor), 0)
              FROM archiver.subscriptions s, (SELECT max(cursor) AS newest FROM archiver.changes) AS c
             WHERE s.paused_at IS NULL) AS behind,
           coalesce(extract(epoch FROM now() - least(
               (SELECT min(d.changed_at) FROM archiver.deliveries d JOIN archiver.subscriptions s
                    ON s.id = d.subscription_id WHERE d.state = 'pending' AND s.paused_at IS NULL),
               (SELECT min(n.changed_at) FROM archiver.subscriptions s,
                       LATERAL (SELECT changed_at FROM archiver.changes WHERE cursor > s.cursor
                                 ORDER BY cursor LIMIT 1) AS n WHERE s.paused_at IS NULL))), 0) AS oldest_seconds
    """
)


_MAY_SEE = text(
    "SELECT bool_and(has_table_privilege(name, 'SELECT'))"
    " FROM unnest(ARRAY['archiver.subscriptions', 'archiver.deliveries', 'archiver.attempts', 'archiver.changes'])"
    " AS name"
)


def may_select_stats(connection: Connection) -> bool:
    """Return whether this user may read the statistics; auditors may not read tables with secrets."""
    return bool(connection.scalar(_MAY_SEE))


def select_stats(connection: Connection) -> FollowupStats:
    """Return exact statistics. Reads all pending and dead deliveries."""
    row = connection.execute(_STATS).mappings().one()
    return FollowupStats(**{**row, "oldest_seconds": float(row["oldest_seconds"])})
