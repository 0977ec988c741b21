"""Ordering an erasure: from its commit on nothing of what it names is taken any more (I8), unless a hold forbids it.

The content goes right after, by `sweeping`, and is found again by that if whoever ordered it was killed in between.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from time import sleep
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import acts, database, ledger, quarantine
from archiver.database import is_cancelled, is_conflict, is_lock_timeout, transaction
from archiver.erasure.holds import covering
from archiver.erasure.quarantined import Found, delete_found
from archiver.erasure.targets import Target, parts, with_strays
from archiver.projection import UNPLACED
from archiver.projection.rows import mark_erased

Rule = Literal["request", "chat.deleted", "retention"]

AT_ONCE = 500  # of one transaction, in which nothing else is recorded
LOCK_SECONDS = 2.0
ATTEMPTS = 60
# While it has the placement lock, for which all who record wait: of a statement, and of a wait for a row.
STATEMENT_SECONDS, ROW_SECONDS = 2.0, 0.5
SPLIT = 8  # parts of targets of which one is locked or slow
NOTHING = Found()


class Act(msgspec.Struct, frozen=True):
    """Who erases, why, and what is to be noted of it; no content."""

    kind: str
    actor: str
    reason: str | None
    detail: Mapping[str, Any] = {}


class _SlowError(Exception):
    """One of the targets is locked, or takes too long; the cause is the database's error."""

    def __init__(self, cause: DBAPIError) -> None:
        super().__init__()
        self.cause = cause


class HeldError(Exception):
    """Legal holds cover some of it, so nothing is erased.

    But for the `ordered` first ones, sessions and turns, where a hold was placed while these were ordered already.
    """

    def __init__(self, held: Mapping[Target, Sequence[int]]) -> None:
        super().__init__()
        self.held = held
        self.ordered = 0


class Ordered(msgspec.Struct, frozen=True):
    """What was ordered, under which act (None: there was nothing), and what was passed over for its holds.

    `quarantined`: how many rows of the quarantine went at once.
    """

    act_id: int | None
    targets: Sequence[Target]
    held: Mapping[Target, Sequence[int]]
    quarantined: int = 0


def order(
    engine: Engine,
    targets: Sequence[Target],
    rule: Rule,
    act: Act,
    *,
    skip_held: bool = False,
    erased_at: Mapping[Target, datetime] | None = None,
    act_id: int | None = None,
    found: Found = NOTHING,
    slow: list[DBAPIError] | None = None,
) -> Ordered:
    """Order these to be erased, or raise `HeldError`, which is recorded too, if any is held.

    A hold that is placed meanwhile stops what is left of many: the error and its record tell how many were ordered.

    `skip_held`: the others are erased nevertheless. `erased_at`: when it was ordered, if not now. `act_id`: the act,
    if it was recorded before. `found`: what the quarantine was found to hold about these, which goes with the order:
    no sweep finds what was ordered of which the ledger holds nothing.

    A target that is locked, or takes too long, is left, and keeps no other: its error is added to `slow`, or raised
    in the end.
    """
    wanted = sorted(set(targets))
    known: Mapping[Target, Sequence[int]] = {}
    if not skip_held:
        check(engine, wanted, rule, act)
    elif act_id is None:
        known = _select_held(engine, wanted)  # for the act, which comes with the first part and stays as it is
    done = Ordered(act_id, [], {})
    left, left_out = deque(parts(wanted, AT_ONCE)), list[DBAPIError]()
    while left:
        part = left.popleft()
        going = NOTHING if left else found
        options = {"skip_held": skip_held, "erased_at": erased_at or {}, "found": going, "known": known}
        try:
            more = _order_patiently(engine, part, rule, act, done.act_id, **options)
        except HeldError as error:
            error.ordered = len(done.targets)
            _record_refusal(engine, act, rule, error)
            raise
        except _SlowError as error:
            if len(part) == 1:
                left_out.append(error.cause)
            else:
                left.extendleft(reversed(list(parts(part, max(1, len(part) // SPLIT)))))
            continue
        done = Ordered(more.act_id, [*done.targets, *more.targets], {**done.held, **more.held}, more.quarantined)
    if slow is not None:
        slow += left_out
    elif left_out:
        raise left_out[0]
    return done


def check(engine: Engine, targets: Sequence[Target], rule: Rule, act: Act) -> None:
    """Raise `HeldError`, which is recorded, if any of these is held."""
    if held := _select_held(engine, targets):
        error = HeldError(held)
        _record_refusal(engine, act, rule, error)
        raise error


def _select_held(engine: Engine, targets: Sequence[Target]) -> Mapping[Target, Sequence[int]]:
    held: dict[Target, Sequence[int]] = {}
    for part in parts(targets, AT_ONCE):
        with transaction(engine) as connection:
            held |= covering(connection, with_strays(connection, part))
    return held


def _detail(act: Act, rule: Rule, held: Mapping[Target, Sequence[int]]) -> dict[str, Any]:
    """With how many sessions and turns are held, by which holds."""
    holds = sorted({hold for holds in held.values() for hold in holds})
    return {"rule": rule, **act.detail, **({"holds": holds, "held": len(held)} if held else {})}


def _order_patiently(
    engine: Engine, targets: Sequence[Target], rule: Rule, act: Act, act_id: int | None, **options: Any
) -> Ordered:
    """Who waits for the lock keeps all who record waiting: so for an instant only, and again."""
    for attempt in range(ATTEMPTS):
        has_lock = False

        def work(connection: Connection) -> None:
            nonlocal has_lock
            # Whoever recorded something has committed it, and whoever records next sees what is ordered here.
            ledger.lock_placement(connection, exclusive=True)
            has_lock = True
            database.limit(connection, STATEMENT_SECONDS)
            database.limit_locks(connection, ROW_SECONDS)

        try:
            with transaction(engine, lock_seconds=LOCK_SECONDS) as connection:
                return _order(connection, targets, rule, act, act_id, lock=work, **options)
        except DBAPIError as error:
            if has_lock and (is_lock_timeout(error) or is_cancelled(error)):
                raise _SlowError(error) from error
            is_busy = is_lock_timeout(error) or is_conflict(error)
            if not is_busy or attempt == ATTEMPTS - 1:
                raise
            sleep(LOCK_SECONDS)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _order(
    connection: Connection,
    targets: Sequence[Target],
    rule: Rule,
    act: Act,
    act_id: int | None,
    *,
    skip_held: bool,
    erased_at: Mapping[Target, datetime],
    found: Found,
    known: Mapping[Target, Sequence[int]],
    lock: Callable[[Connection], None],
) -> Ordered:
    if ids := sorted({*found.naming, *found.telling}):
        quarantine.lock_rows(connection, ids)  # before the other lock, as whoever retries one does
    lock(connection)
    whole = with_strays(connection, targets)
    held = covering(connection, whole)
    if held and not skip_held:
        raise HeldError(held)
    free = [target for target in whole if target not in held]
    if free and act_id is None:
        act_id = acts.insert_act(connection, act.kind, act.actor, act.reason, _detail(act, rule, {**known, **held}))
    if free and act_id is not None:
        _insert_erasures(connection, free, rule, act_id, erased_at)
    return Ordered(act_id, free, held, delete_found(connection, found))


TOLD = 100  # targets in one act


def _record_refusal(engine: Engine, act: Act, rule: Rule, error: HeldError) -> None:
    """In a transaction of its own: the erasure's is undone."""
    detail = {
        **_detail(act, rule, error.held),
        **({"ordered": error.ordered} if error.ordered else {}),
        "targets": [msgspec.structs.asdict(target) for target in list(error.held)[:TOLD]],
    }
    with transaction(engine) as connection:
        acts.insert_act(connection, f"{act.kind}.refused", act.actor, act.reason, detail)


# Of one session each later than the one before, whatever the clocks say: what stands for its readings tells up to
# which of them it was made.
_INSERT = text(
    """
    WITH told AS MATERIALIZED (
        SELECT session_id, chat_id, erased_at
          FROM json_to_recordset(:targets) AS t (session_id text, chat_id text, erased_at timestamptz)
    ), latest AS MATERIALIZED (
        SELECT e.session_id, max(e.erased_at) AS at FROM archiver.erasures e
         WHERE e.session_id <> '' AND e.session_id IN (SELECT session_id FROM told) GROUP BY e.session_id
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT t.session_id, t.chat_id, greatest(t.erased_at, l.at + interval '1 microsecond'),
           CAST(:rule AS text), CAST(:act_id AS bigint)
      FROM told t LEFT JOIN latest l ON l.session_id = t.session_id
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
    connection.execute(_INSERT, {"targets": msgspec.json.encode(rows).decode(), "rule": rule, "act_id": act_id})
    # Its history is not fetched again from now on, whether its content goes at once or is kept by a hold.
    mark_erased(connection, sorted({each.session_id for each in targets} - {UNPLACED}))
