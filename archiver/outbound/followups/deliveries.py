"""Read and write the tables of deliveries and attempts."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec
from sqlalchemy import Connection, text

from archiver.database import as_json
from archiver.outbound.followups.schedule import ATTEMPTS, backoff
from archiver.outbound.followups.sending import Attempt

DEAD, PENDING = "dead", "pending"
State = Literal["pending", "delivered", "dead"]


class Due(msgspec.Struct, frozen=True, gc=False):
    """A delivery that is due."""

    subscription_id: int
    cursor: int
    type: str
    session_id: str
    chat_id: str | None
    seal_id: int | None
    changed_at: datetime
    attempts: int
    last_attempt: int

    @property
    def message_id(self) -> str:
        """Return the `webhook-id`, which is the same in every attempt."""
        return message_id(self.subscription_id, self.cursor, self.changed_at)


def message_id(subscription_id: int, cursor: int, changed_at: datetime) -> str:
    """Return a `webhook-id`. It contains the time, so that a restored database does not reuse an id."""
    return f"msg_{subscription_id}_{cursor}_{round(changed_at.timestamp() * 1_000_000):x}"


_DIGITS = 19  # of the largest bigint: a number with fewer always fits


def parse_message_id(text: str) -> tuple[int, int] | None:
    """Return subscription and cursor of a `webhook-id` or its prefix; None if it is invalid."""
    prefix, *rest = text.split("_")
    is_one = prefix == "msg" and len(rest) in {2, 3} and all(each.isascii() and each.isdecimal() for each in rest[:2])
    return (int(rest[0]), int(rest[1])) if is_one and max(len(each) for each in rest) < _DIGITS else None


class Result(msgspec.Struct, frozen=True):
    """The result of a delivery attempt."""

    due: Due
    attempt: Attempt

    @property
    def number(self) -> int:
        """Return the number of the attempt."""
        return self.due.attempts + 1

    @property
    def state(self) -> State:
        """Return the new state of the delivery."""
        if self.attempt.fault is None:
            return "delivered"
        return "dead" if self.number >= self.due.last_attempt else "pending"


# For ordered subscriptions: within a session, a delivery waits until all earlier ones have ended.
_FIRST_OF_SESSION = """
       AND NOT EXISTS (SELECT FROM archiver.deliveries e
                        WHERE e.session_id = d.session_id AND e.subscription_id = d.subscription_id
                          AND e.cursor < d.cursor AND e.state = 'pending'
                          AND (e.session_id <> '' OR e.chat_id IS NOT DISTINCT FROM d.chat_id))
"""
_DUE = """
    SELECT subscription_id, cursor, type, session_id, chat_id, seal_id, changed_at, attempts, last_attempt
      FROM archiver.deliveries d
     WHERE subscription_id = :id AND state = 'pending' AND due_at <= now()
       AND NOT cursor = ANY (CAST(:busy AS bigint[])) {ordered} ORDER BY {order} LIMIT :most
"""
_SELECTS = {
    (is_ordered, is_probe): text(
        _DUE.format(
            ordered=_FIRST_OF_SESSION if is_ordered else "",
            # Probes of a failing receiver use the delivery with the fewest attempts, so that none runs out of
            # attempts.
            order="attempts, cursor" if is_probe else "due_at, cursor",
        )
    )
    for is_ordered in (False, True)
    for is_probe in (False, True)
}


def select_due(
    connection: Connection, subscription_id: int, busy: Sequence[int], limit: int, *, is_ordered: bool, is_probe: bool
) -> list[Due]:
    """Return deliveries that are due, except those in flight (`busy`)."""
    values = {"id": subscription_id, "busy": list(busy), "most": limit}
    return [Due(*row) for row in connection.execute(_SELECTS[is_ordered, is_probe], values)]


_MAKE_DUE_BEYOND = text("UPDATE archiver.deliveries SET due_at = :now WHERE state = 'pending' AND due_at > :beyond")


def make_due_beyond(connection: Connection, now: datetime, beyond: datetime) -> int:
    """Make pending deliveries due now that are due after `beyond`, which none can be; return their number."""
    return connection.execute(_MAKE_DUE_BEYOND, {"now": now, "beyond": beyond}).rowcount


_COUNT_PENDING = text(
    "SELECT count(*) FROM (SELECT FROM archiver.deliveries WHERE subscription_id = :id AND state = 'pending'"
    " LIMIT :most) AS first_ones"
)


def count_pending(connection: Connection, subscription_id: int, limit: int) -> int:
    """Return the number of pending deliveries, at most `limit`."""
    return int(connection.scalar(_COUNT_PENDING, {"id": subscription_id, "most": limit}) or 0)


_RESULTS = """
    WITH results AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:results) AS t (cursor bigint, session_id text, chat_id text, number int,
            state text, wait float8, at timestamptz, seconds float8, status int, fault text, answer text)
    )
"""
# If the last attempt was in flight when a retry was requested, the due time of the retry stays.
_MORE = "t.state = 'dead' AND d.state = 'pending' AND t.number < d.last_attempt"
_RECORD = text(
    f"""
    {_RESULTS}
    UPDATE archiver.deliveries d
       SET attempts = greatest(d.attempts, t.number),
           state = CASE WHEN 'delivered' IN (d.state, t.state) THEN 'delivered'
                        WHEN d.state = 'dead' THEN 'dead' WHEN {_MORE} THEN 'pending' ELSE t.state END,
           due_at = CASE WHEN t.state = 'pending' THEN now() + t.wait * interval '1 second' ELSE d.due_at END,
           ended_at = CASE WHEN t.state = 'pending' OR {_MORE} THEN d.ended_at ELSE coalesce(d.ended_at, now()) END
      FROM results t WHERE d.subscription_id = :id AND d.cursor = t.cursor
    """  # noqa: S608  # only a constant is inserted, never input
)
# A response may quote its delivery, so it is not stored if that content has since been erased.
_RECORD_ATTEMPTS = text(
    f"""
    {_RESULTS}, erased AS MATERIALIZED (
        SELECT DISTINCT t.cursor FROM results t
          JOIN archiver.deliveries d ON d.subscription_id = :id AND d.cursor = t.cursor  -- may have found its session
          JOIN archiver.erasures e ON e.session_id IN (t.session_id, d.session_id)
         WHERE e.chat_id = t.chat_id OR (e.session_id <> '' AND (e.chat_id = '' OR t.chat_id IS NULL))
    )
    INSERT INTO archiver.attempts (subscription_id, cursor, number, at, seconds, status, fault, answer)
    SELECT :id, t.cursor, t.number, t.at, t.seconds, t.status, t.fault,
           CASE WHEN t.cursor NOT IN (SELECT cursor FROM erased) THEN decode(t.answer, 'hex') END
      FROM results t JOIN archiver.deliveries d ON d.subscription_id = :id AND d.cursor = t.cursor ON CONFLICT DO
      NOTHING
    """  # noqa: S608  # only a constant is inserted, never input
)


def record_results(connection: Connection, subscription_id: int, results: Sequence[Result]) -> None:
    """Record results idempotently. Requires the shared `Lock.RECORDING`."""
    rows = [
        {
            "cursor": each.due.cursor,
            "session_id": each.due.session_id,
            "chat_id": each.due.chat_id,
            "number": each.number,
            "state": each.state,
            "wait": backoff(each.number - (each.due.last_attempt - ATTEMPTS), each.attempt.retry_after),
            "at": each.attempt.at,
            "seconds": each.attempt.seconds,
            "status": each.attempt.status,
            "fault": each.attempt.fault,
            "answer": each.attempt.answer.hex(),
        }
        for each in results
    ]
    values = {"id": subscription_id, "results": as_json(rows)}
    connection.execute(_RECORD, values)
    connection.execute(_RECORD_ATTEMPTS, values)


_REDACT = text(
    """
    WITH results AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    ), found AS MATERIALIZED (
        SELECT d.subscription_id, d.cursor FROM results t JOIN archiver.deliveries d ON d.session_id = t.session_id
         WHERE d.chat_id = t.chat_id OR (t.session_id <> '' AND (t.chat_id = '' OR d.chat_id IS NULL))
    )
    UPDATE archiver.attempts a SET answer = NULL FROM found f
     WHERE a.subscription_id = f.subscription_id AND a.cursor = f.cursor AND a.answer IS NOT NULL
    """
)


def delete_answers(connection: Connection, targets: Sequence[tuple[str, str]]) -> int:
    """Delete stored responses of receivers about these sessions and turns; return their number."""
    targets_json = [{"session_id": session_id, "chat_id": chat_id} for session_id, chat_id in targets]
    return connection.execute(_REDACT, {"targets": as_json(targets_json)}).rowcount
