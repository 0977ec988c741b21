"""The single write path: `record` appends each delivery to the ledger once, and projects new facts."""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Self

import msgspec
from sqlalchemy import Connection, case, func, literal_column, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError

from archiver import archive, events
from archiver.archive import outbox
from archiver.archive.erasures import Erased, FactRef, extend_erasure, note_refused, select_erased
from archiver.database import (
    BulkInsert,
    Lock,
    RawStatement,
    Statement,
    as_json,
    execute,
    is_lock_timeout,
    limit_locks,
    locks,
    tables,
)
from archiver.events import Delivery, Event
from archiver.events import responses as history
from archiver.ledger import compaction
from archiver.ledger.compaction import StoredPieces

Key = tuple[str, bytes]  # session_id, dedupe_key


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """The ledger row of a delivery, and whether this delivery created it.

    `is_erased`: the session or turn of the delivery was erased, so no row was written.
    """

    id: int
    is_new: bool
    is_erased: bool = False


_ERASED = Recorded(0, is_new=False, is_erased=True)


def record(
    connection: Connection,
    deliveries: Sequence[Delivery[Event]],
    timing: archive.Timing = archive.DEFAULT_TIMING,
    *,
    locks_late: bool = False,
) -> list[Recorded]:
    """Append new deliveries, count redeliveries, and project new facts, in this transaction.

    The transaction also adds the changes of the archive to the outbox.

    `locks_late`: for deliveries that may take long. The recording lock, which may block every other writer, is
    acquired only at the end. Raises a serialization failure, so that the transaction is retried, if others have
    changed a row on which the result depends.

    The results are in the order of `deliveries`. Safe with other writers of the same facts: ledger rows are locked in
    order of their keys, then sessions in order of theirs, so that no two writers wait for each other.
    """
    if not deliveries:
        return []
    is_exclusive = any(not each.content.session_id and each.content.type in events.CHAT_EVENTS for each in deliveries)
    if locks_late:
        execute(connection, locks.by_key())
        before = _select_related(connection, deliveries)
    lock = (locks.by_key(),) if locks_late else Lock.RECORDING.statements(exclusive=is_exclusive)
    erased = _select_erased(connection, deliveries, lock)
    sessions = _sessions_of(erased)
    refused = [_is_refused(delivery, erased, sessions) for delivery in deliveries]
    answers, changes = _record(connection, deliveries, timing, erased, refused)
    outbox.insert_changes(connection, changes)
    if locks_late:
        _lock_late(connection, exclusive=is_exclusive)
        now = select_erased(connection, _refs(deliveries), ())
        is_same = _sessions_of(now) == sessions and _select_related(connection, deliveries) == before
        if not is_same or refused != [_is_refused(each, now, sessions) for each in deliveries]:
            execute(connection, _CONFLICT.bind())
    return answers


def record_redacted(
    connection: Connection, deliveries: Sequence[Delivery[Event]], timing: archive.Timing
) -> list[outbox.Change]:
    """Record readings that an erasure made of the erased ones. Return the changes, which are not published."""
    if not deliveries:
        return []
    erased = _select_erased(connection, deliveries, Lock.RECORDING.statements(exclusive=False))
    refused = [_is_refused(delivery, erased, _sessions_of(erased)) for delivery in deliveries]
    _, changes = _record(connection, deliveries, timing, erased, refused)
    return archive.without_events(changes)


def _record(
    connection: Connection,
    deliveries: Sequence[Delivery[Event]],
    timing: archive.Timing,
    erased: Mapping[FactRef, Erased],
    refused: Sequence[bool],
) -> tuple[list[Recorded], list[outbox.Change]]:
    if not erased:
        return _append(connection, deliveries, timing, ())
    sessions = _sessions_of(erased)
    accepted = [delivery for delivery, is_refused in zip(deliveries, refused, strict=True) if not is_refused]
    recorded, changes = _append(connection, accepted, timing, sessions)
    answers = iter(recorded)
    touched = {ref.session_id for ref, erased_part in erased.items() if erased_part.is_found}
    for delivery, is_refused in zip(deliveries, refused, strict=True):
        if is_refused and _reads(delivery):
            touched.add(delivery.content.session_id)
    changes += [
        outbox.Change("chat.erased", *ref)
        for ref, erased_part in erased.items()
        if erased_part.is_found and ref.chat_id
    ]
    changes += archive.lock_and_rederive(connection, sorted(touched), timing)
    note_refused(connection, [ref for ref, erased_part in erased.items() if erased_part.is_whole])
    return [_ERASED if is_refused else next(answers) for is_refused in refused], changes


def _sessions_of(erased: Iterable[FactRef]) -> set[str]:
    return {ref.session_id for ref in erased} - {archive.UNASSIGNED}


def _refs(deliveries: Sequence[Delivery[Event]]) -> list[FactRef]:
    return [FactRef(each.content.session_id, each.content.chat_id) for each in deliveries]


def is_refused(connection: Connection, delivery: Delivery[Event]) -> bool:
    """Return whether `record` would refuse the delivery because its subject is erased."""
    refs = [FactRef(delivery.content.session_id, delivery.content.chat_id)]
    erased = select_erased(connection, refs, Lock.RECORDING.statements(exclusive=False))
    return _is_refused(delivery, erased, _sessions_of(erased))


def _select_erased(
    connection: Connection, deliveries: Sequence[Delivery[Event]], lock: Sequence[Statement]
) -> dict[FactRef, Erased]:
    """Return the erasures of the deliveries' subjects, and extend those of chats whose session is now known.

    The query is sent together with the lock, but as a separate statement: it sees all that was committed before the
    lock was granted, and nothing else can be committed while the lock is held.
    """
    erased = select_erased(connection, _refs(deliveries), lock)
    result = [ref for ref, erased_part in erased.items() if erased_part.is_found and ref.chat_id]
    for session_id, chat_id in result:
        extend_erasure(connection, session_id, chat_id or "")
    return erased


def _is_refused(delivery: Delivery[Event], erased: Mapping[FactRef, Erased], sessions: Collection[str]) -> bool:
    """Return whether the fact may contain erased content; a reading may if a turn of its session is erased."""
    event = delivery.content
    if _reads(delivery):
        return event.session_id in sessions
    result = erased.get(FactRef(event.session_id, event.chat_id))
    return result is not None and result.is_whole


def _reads(delivery: Delivery[Event]) -> bool:
    return delivery.content.type in history.READINGS - {history.REDACTED} and delivery.source == history.SOURCE


def _append(
    connection: Connection,
    deliveries: Sequence[Delivery[Event]],
    timing: archive.Timing,
    erased: Collection[str],
) -> tuple[list[Recorded], list[outbox.Change]]:
    groups: dict[Key, DeliveryGroup] = {}
    for delivery in deliveries:
        key = _key(delivery)
        known = groups.get(key)
        groups[key] = DeliveryGroup.of(delivery) if known is None else known.merge(delivery)
    responses = {
        key: (group.first.content.body, group.first.received_at)
        for key, group in groups.items()
        if compaction.is_response(group.first.content, group.first.source)
    }
    in_pieces = compaction.store_in_pieces(connection, responses, timing) if responses else {}
    rows = _upsert_events(connection, groups, in_pieces)
    changed = [fact for key, row in rows.items() if (fact := _fact_to_project(groups[key], row)) is not None]
    changes = archive.project(connection, changed, timing, erased)
    for key in sorted(responses):
        if rows[key].delivery_count == groups[key].count:
            compaction.replace_contained(connection, key, responses[key][0])
    answers, seen = [], set()
    for delivery in deliveries:
        key = _key(delivery)
        row = rows[key]
        answers.append(Recorded(row.id, row.delivery_count == groups[key].count and key not in seen))
        seen.add(key)
    return answers, changes


def _key(delivery: Delivery[Event]) -> Key:
    return delivery.content.session_id, delivery.content.dedupe_key


class DeliveryGroup(msgspec.Struct, frozen=True, gc=False):
    """All deliveries of one fact in a batch: the first one, and their totals."""

    first: Delivery[Event]
    count: int
    last_received_at: datetime
    occurred_at: datetime | None

    @classmethod
    def of(cls, delivery: Delivery[Event]) -> Self:
        return cls(delivery, delivery.count, delivery.received_at, delivery.content.occurred_at)

    def merge(self, other: Delivery[Event]) -> "DeliveryGroup":
        moments = [moment for moment in (self.occurred_at, other.content.occurred_at) if moment is not None]
        return DeliveryGroup(
            first=self.first if self.first.received_at <= other.received_at else other,
            count=self.count + other.count,
            last_received_at=max(self.last_received_at, other.received_at),
            occurred_at=min(moments, default=None),
        )


# An unassigned fact and a fact that assigns its chat to a session must see each other in any order of their
# commits. So unassigned facts are recorded exclusively, and others concurrently.


LATE_SECONDS, LATE_PAUSE_SECONDS, LATE_ATTEMPTS = 0.25, 0.25, 8
_PAUSE = RawStatement("SELECT pg_sleep($1)")
_CONFLICT = RawStatement(
    "DO $$ BEGIN RAISE EXCEPTION 'facts about the same turns were recorded, or erased, in between'"
    " USING ERRCODE = 'serialization_failure'; END $$"
)


def _lock_late(connection: Connection, *, exclusive: bool) -> None:
    """Acquire the recording lock at the end of a transaction.

    Other writers queue behind a lock request that waits, so each of several attempts waits only briefly. Raises the
    lock timeout of the last attempt.
    """
    for attempt in range(LATE_ATTEMPTS):
        try:
            with connection.begin_nested():
                limit_locks(connection, LATE_SECONDS)
                Lock.RECORDING.take(connection, exclusive=exclusive)
                return
        except DBAPIError as error:
            if not is_lock_timeout(error) or attempt == LATE_ATTEMPTS - 1:
                raise
        execute(connection, _PAUSE.bind(LATE_PAUSE_SECONDS))


# The dependencies of a fact besides the rows that its transaction locks: unassigned facts about the same turn; and
# for an unassigned fact, the sessions that have its turn.
_SELECT_RELATED = RawStatement(
    """
    SELECT encode(e.dedupe_key, 'hex') AS key, CAST(least(e.occurred_at, e.earliest_at) AS text) AS detail
      FROM archiver.events e
     WHERE e.session_id = '' AND e.chat_id = ANY (ARRAY(SELECT json_array_elements_text($1)))
       AND e.type IN ('chat.created', 'chat.deleted')
    UNION ALL
    SELECT c.session_id, c.chat_id FROM archiver.chats c
     WHERE c.session_id <> '' AND c.chat_id = ANY (ARRAY(SELECT json_array_elements_text($2)))
    """
)


def _select_related(connection: Connection, deliveries: Sequence[Delivery[Event]]) -> set[tuple[str, str | None]]:
    """Return the related facts and sessions, without those of `deliveries` themselves."""
    chat_events = [
        each.content for each in deliveries if each.content.chat_id and each.content.type in events.CHAT_EVENTS
    ]
    chats = sorted({str(each.chat_id) for each in chat_events})
    unassigned = sorted({str(each.chat_id) for each in chat_events if not each.session_id})
    own_keys = {each.dedupe_key.hex() for each in chat_events if not each.session_id}
    own_turns = {(each.session_id, each.chat_id) for each in chat_events}
    lists = [as_json(each) for each in (chats, unassigned)]
    rows = {(row.key, row.detail) for row in _SELECT_RELATED.execute(connection, *lists)}
    return {each for each in rows if each[0] not in own_keys and each not in own_turns}


def _event_upsert(*more_unset: str) -> BulkInsert:
    facts = tables.events
    statement = insert(facts)
    new = statement.excluded
    upsert = statement.on_conflict_do_update(
        index_elements=[facts.c.session_id, facts.c.dedupe_key],
        set_={
            "delivery_count": facts.c.delivery_count + new.delivery_count,
            "last_received_at": func.greatest(facts.c.last_received_at, new.last_received_at),
            # A retry may have another envelope time, and the order of arrival must not matter. The time of the first
            # delivery is sealed, so an earlier one is stored separately.
            "earliest_at": func.nullif(
                func.least(facts.c.earliest_at, facts.c.occurred_at, new.occurred_at), facts.c.occurred_at
            ),
            "is_recounted": literal_column("true"),
        },
    ).returning(
        facts.c.session_id,
        facts.c.dedupe_key,
        facts.c.id,
        facts.c.delivery_count,
        # For a first delivery these are the values just sent, and parsing times is slow.
        case((facts.c.delivery_count > literal_column("1"), facts.c.received_at)).label("received_at"),
        case(
            (facts.c.delivery_count > literal_column("1"), func.least(facts.c.occurred_at, facts.c.earliest_at))
        ).label("occurred_at"),
        facts.c.earliest_at.is_not(None).label("is_dated_back"),
    )
    unset = {"id", "earliest_at", "is_recounted", *more_unset}
    return BulkInsert(upsert, [column.name for column in facts.c if column.name not in unset])


_UPSERT_EVENT = _event_upsert("frame", "runs")
_UPSERT_IN_PIECES = _event_upsert()


def _upsert_events(
    connection: Connection, groups: dict[Key, DeliveryGroup], in_pieces: Mapping[Key, StoredPieces]
) -> dict[Key, Any]:
    usual = [_event_row(groups[key]) for key in sorted(groups) if key not in in_pieces]
    rows = _UPSERT_EVENT.execute(connection, usual)
    for key, item in sorted(in_pieces.items()):
        row = _event_row(groups[key]) | {"body": None, "frame": item.frame, "runs": item.runs}
        rows += _UPSERT_IN_PIECES.execute(connection, [row])
    return {(row.session_id, row.dedupe_key): row for row in rows}


def _event_row(group: DeliveryGroup) -> dict[str, Any]:
    first, event, salt = group.first, group.first.content, os.urandom(16)
    return {
        "session_id": event.session_id,
        "dedupe_key": event.dedupe_key,
        "type": event.type,
        "source": first.source,
        "chat_id": event.chat_id,
        "received_at": first.received_at,
        "last_received_at": group.last_received_at,
        "delivery_count": group.count,
        "occurred_at": group.occurred_at,
        "key_id": first.key_id,
        "body": event.body,
        "salt": salt,
        "body_digest": hashlib.sha256(salt + event.body).digest(),
    }


def _fact_to_project(group: DeliveryGroup, row: Any) -> archive.Fact | None:
    """Return the fact to project: a new one, or a known one whose times these deliveries may have changed.

    A reading with the same content as before is also projected: it proves that nothing had changed until then.
    """
    first = group.first
    if row.delivery_count == 1:
        return archive.Fact(first.content, first.source, first.received_at, group.occurred_at)
    is_repeat = row.delivery_count > group.count
    is_from_upstream = first.source == events.WEBHOOK
    if is_repeat and is_from_upstream and not (row.is_dated_back and group.occurred_at == row.occurred_at):
        return None
    return archive.Fact(first.content, first.source, row.received_at, row.occurred_at, is_repeat)


# Only the newest events are examined: a backfill may have stored many since the last webhook.
_SELECT_LAST_WEBHOOK = text(
    "SELECT last_received_at"
    " FROM (SELECT id, source, last_received_at FROM archiver.events ORDER BY id DESC LIMIT 100000) AS newest"
    " WHERE source = 'webhook' ORDER BY id DESC LIMIT 1"
)


def select_last_webhook(connection: Connection) -> datetime | None:
    """Return when the newest webhook arrived; None if none is among the newest 100,000 events."""
    result: datetime | None = connection.scalar(_SELECT_LAST_WEBHOOK)
    return result
