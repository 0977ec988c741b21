"""Order erasures: after the commit, deliveries of the targets are refused (I8), unless a hold covers them.

`sweeping` deletes the content afterwards; it finds the order even if the ordering process was killed.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import database
from archiver.archive.outbox import insert_changes
from archiver.archive.rows import mark_erased
from archiver.compliance.erasure.holds import covering
from archiver.compliance.erasure.quarantine_matches import QuarantineMatches, delete_matches
from archiver.compliance.erasure.targets import Target, parts, split, with_unassigned
from archiver.database import Lock, as_json, is_cancelled, is_lock_timeout, run_until_locked, transaction
from archiver.errors import ArchiverError
from archiver.ledger import audit_log, quarantine

Rule = Literal["request", "chat.deleted", "retention"]

BATCH_SIZE = 500  # targets per transaction, which blocks all writers
LOCK_SECONDS = 2.0
ATTEMPTS = 60
# Limits of a statement and of a wait for a row under the exclusive lock, for which all writers wait.
STATEMENT_SECONDS, ROW_SECONDS = 2.0, 0.5
SPLIT = 8  # parts into which a batch is divided if a target is locked or slow
NO_MATCHES = QuarantineMatches()


class AuditEntry(msgspec.Struct, frozen=True):
    """Actor, reason and details of an erasure for the audit log; no content."""

    kind: str
    actor: str
    reason: str | None
    detail: Mapping[str, Any] = {}


class _SlowTargetError(Exception):
    """A target is locked or takes too long; the cause is the database error."""

    def __init__(self, cause: DBAPIError) -> None:
        super().__init__()
        self.cause = cause


class HeldError(ArchiverError):
    """Legal holds cover some targets, so nothing was erased.

    If a hold was placed while the order ran, the first `ordered` sessions and turns stay ordered.
    """

    message = "legal holds cover some of the targets"

    def __init__(self, held: Mapping[Target, Sequence[int]]) -> None:
        super().__init__()
        self.held = held
        self.ordered = 0


class Ordered(msgspec.Struct, frozen=True):
    """The ordered targets, their audit entry (None: nothing ordered), and the targets skipped because of holds.

    `quarantined`: number of quarantine rows deleted with the order.
    """

    act_id: int | None
    targets: Sequence[Target]
    held: Mapping[Target, Sequence[int]]
    quarantined: int = 0


def order(
    engine: Engine,
    targets: Sequence[Target],
    rule: Rule,
    entry: AuditEntry,
    *,
    skip_held: bool = False,
    erased_at: Mapping[Target, datetime] | None = None,
    act_id: int | None = None,
    matches: QuarantineMatches = NO_MATCHES,
    slow: list[DBAPIError] | None = None,
) -> Ordered:
    """Order the erasure of these targets. Raises `HeldError`, which is recorded, if any is held.

    A hold placed during a large order stops the rest: the error and its audit entry state how many were ordered.

    `skip_held`: skip held targets instead of raising `HeldError`. `erased_at`: the time of the order, if not now.
    `act_id`: the audit entry, if it is already recorded. `matches`: quarantine rows about the targets, deleted with
    the order, because no sweep finds an order for targets without rows in the ledger.

    A target that is locked or takes too long is skipped without delaying others; its error is added to `slow`.
    Without `slow`, the first such error is raised at the end.
    """
    unique_targets = sorted(set(targets))
    known: Mapping[Target, Sequence[int]] = {}
    if not skip_held:
        check(engine, unique_targets, rule, entry)
    elif act_id is None:
        known = _select_held(engine, unique_targets)
    request = _Request(rule, entry, skip_held, erased_at or {}, known)
    done = Ordered(act_id, [], {})
    left, skipped = deque(parts(unique_targets, BATCH_SIZE)), list[DBAPIError]()
    while left:
        part = left.popleft()
        try:
            more = _order_part(engine, request, part, done, NO_MATCHES if left else matches)
        except _SlowTargetError as error:
            if len(part) == 1:
                skipped.append(error.cause)
            else:
                left.extendleft(reversed(list(parts(part, max(1, len(part) // SPLIT)))))
            continue
        done = Ordered(
            more.act_id,
            [*done.targets, *more.targets],
            {**done.held, **more.held},
            done.quarantined + more.quarantined,
        )
    if slow is not None:
        slow += skipped
    elif skipped:
        raise skipped[0]
    return done


class _Request(msgspec.Struct, frozen=True):
    """The arguments of `order` that are the same for each part.

    `known`: all held targets, for the audit entry, which is recorded with the first part and never changes.
    """

    rule: Rule
    entry: AuditEntry
    skip_held: bool
    erased_at: Mapping[Target, datetime]
    known: Mapping[Target, Sequence[int]]


def _order_part(
    engine: Engine, request: _Request, targets: Sequence[Target], done: Ordered, matches: QuarantineMatches
) -> Ordered:
    """Order the erasure of these targets in one transaction; `done`: what was ordered before.

    Raises `_SlowTargetError` and `HeldError`, which is recorded.
    """
    work = partial(_order, request=request, targets=targets, act_id=done.act_id, matches=matches)
    try:
        return run_until_locked(
            engine, work, lock_seconds=LOCK_SECONDS, attempts=ATTEMPTS, pause_seconds=LOCK_SECONDS
        )
    except HeldError as error:
        error.ordered = len(done.targets)
        _record_refusal(engine, request.entry, request.rule, error)
        raise


def check(engine: Engine, targets: Sequence[Target], rule: Rule, entry: AuditEntry) -> None:
    """Raise `HeldError`, which is recorded, if any target is held."""
    if held := _select_held(engine, targets):
        error = HeldError(held)
        _record_refusal(engine, entry, rule, error)
        raise error


def _select_held(engine: Engine, targets: Sequence[Target]) -> Mapping[Target, Sequence[int]]:
    held: dict[Target, Sequence[int]] = {}
    for part in parts(targets, BATCH_SIZE):
        with transaction(engine) as connection:
            held |= covering(connection, with_unassigned(connection, part))
    return held


def _detail(entry: AuditEntry, rule: Rule, held: Mapping[Target, Sequence[int]]) -> dict[str, Any]:
    """Return the details of the entry, with the number of held targets and their holds."""
    holds = sorted({hold for holds in held.values() for hold in holds})
    return {"rule": rule, **entry.detail, **({"holds": holds, "held": len(held)} if held else {})}


def _order(
    connection: Connection,
    *,
    request: _Request,
    targets: Sequence[Target],
    act_id: int | None,
    matches: QuarantineMatches,
) -> Ordered:
    if ids := sorted({*matches.by_id, *matches.by_variable}):
        quarantine.lock_rows(connection, ids)  # before the recording lock, as `quarantine retry` does
    with _exclusively(connection):
        whole = with_unassigned(connection, targets)
        held = covering(connection, whole)
        if held and not request.skip_held:
            raise HeldError(held)
        deletable = [target for target in whole if target not in held]
        if deletable and act_id is None:
            entry, rule = request.entry, request.rule
            detail = _detail(entry, rule, {**request.known, **held})
            act_id = audit_log.insert_entry(connection, entry.kind, entry.actor, entry.reason, detail)
        if deletable and act_id is not None:
            _insert_erasures(connection, deletable, request.rule, act_id, request.erased_at)
        return Ordered(act_id, deletable, held, delete_matches(connection, matches))


@contextmanager
def _exclusively(connection: Connection) -> Iterator[None]:
    """Run the block under the exclusive lock: earlier writers have committed, and later writers see this order.

    Raises `_SlowTargetError` if a statement of the block, or its wait for a row lock, takes too long.
    """
    Lock.RECORDING.take(connection, exclusive=True)
    try:
        database.limit(connection, STATEMENT_SECONDS)
        database.limit_locks(connection, ROW_SECONDS)
        yield
    except DBAPIError as error:
        if not is_lock_timeout(error) and not is_cancelled(error):
            raise
        raise _SlowTargetError(error) from error


MAX_RECORDED_HELD = 100  # targets in one audit entry


def _record_refusal(engine: Engine, entry: AuditEntry, rule: Rule, error: HeldError) -> None:
    """Record the refusal in a separate transaction, because the transaction of the erasure is rolled back."""
    detail = {
        **_detail(entry, rule, error.held),
        **({"ordered": error.ordered} if error.ordered else {}),
        "targets": [msgspec.structs.asdict(target) for target in list(error.held)[:MAX_RECORDED_HELD]],
    }
    with transaction(engine) as connection:
        audit_log.insert_entry(connection, f"{entry.kind}.refused", entry.actor, entry.reason, detail)


# Within a session each erasure is later than the previous one, regardless of clocks: the event that replaces the
# readings states the last erasure that it covers.
_INSERT = text(
    """
    WITH requested AS MATERIALIZED (
        SELECT session_id, chat_id, erased_at
          FROM json_to_recordset(:targets) AS t (session_id text, chat_id text, erased_at timestamptz)
    ), latest AS MATERIALIZED (
        SELECT e.session_id, max(e.erased_at) AS at FROM archiver.erasures e
         WHERE e.session_id <> '' AND e.session_id IN (SELECT session_id FROM requested) GROUP BY e.session_id
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT t.session_id, t.chat_id, greatest(t.erased_at, l.at + interval '1 microsecond'),
           CAST(:rule AS text), CAST(:act_id AS bigint)
      FROM requested t LEFT JOIN latest l ON l.session_id = t.session_id
     ORDER BY t.session_id, t.chat_id
    ON CONFLICT DO NOTHING
    """
)


def _insert_erasures(
    connection: Connection, targets: Sequence[Target], rule: Rule, act_id: int, erased_at: Mapping[Target, datetime]
) -> None:
    now = datetime.now(UTC)
    rows = [
        {"session_id": each.session_id, "chat_id": each.chat_id, "erased_at": erased_at.get(each, now)}
        for each in targets
    ]
    connection.execute(_INSERT, {"targets": as_json(rows), "rule": rule, "act_id": act_id})
    # The history is no longer fetched, even if a hold keeps the content.
    insert_changes(connection, mark_erased(connection, split(targets)[0]))
