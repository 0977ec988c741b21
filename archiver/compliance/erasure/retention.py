"""Expire content, then metadata, in bounded steps.

Content is erased as by `archiver erase`. The remaining metadata is deleted once seals prove that it existed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver.archive import Timing, derived_rows, rederive, unassigned, without_events
from archiver.archive.outbox import insert_changes
from archiver.compliance.erasure.holds import covering, exclude_held, is_any_in_force
from archiver.compliance.erasure.ordering import AuditEntry, order
from archiver.compliance.erasure.targets import Target, erased_change, parts, split, with_unassigned
from archiver.database import Lock, as_json, run_split, transaction
from archiver.ledger import audit_log, quarantine
from archiver.settings import Settings

PAGE = 500
REMOVALS_PER_BATCH = 20  # sessions
NO_ASSISTANT = "(none)"  # stands for the assistant of sessions without an assistant


class Rules(msgspec.Struct, frozen=True):
    """Retention periods in days; 0: unlimited."""

    content: int
    by_assistant: Mapping[str, int]
    metadata: int

    @classmethod
    def of(cls, configuration: Settings) -> "Rules":
        return cls(
            configuration.retention_days,
            configuration.retention_of_assistants,
            configuration.retention_metadata_days,
        )

    @property
    def keeps_content_forever(self) -> bool:
        return not self.content and not any(self.by_assistant.values())


class Due(msgspec.Struct):
    """The numbers of expired sessions by assistant, and of quarantine rows; `held`: those that holds keep."""

    content: Counter[str]
    metadata: Counter[str]
    held: int = 0
    quarantined: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.content.total() or self.metadata.total() or self.quarantined)


# With several assistants the longest period counts; 0 means forever. An unassigned turn is treated as a session.
_SELECT_EXPIRED = text(
    """
    WITH page AS MATERIALIZED (
        (SELECT s.session_id, '' AS chat_id, s.last_event_at, s.assistant_id
           FROM archiver.sessions s
          WHERE s.session_id <> '' AND (s.session_id, '') > (CAST(:after_session AS text), CAST(:after_chat AS text))
          ORDER BY s.session_id LIMIT :most)
        UNION ALL
        (SELECT c.session_id, c.chat_id, c.first_received_at, NULL
           FROM archiver.chats c
          WHERE c.session_id = ''
            AND (c.session_id, c.chat_id) > (CAST(:after_session AS text), CAST(:after_chat AS text))
          ORDER BY c.chat_id LIMIT :most)
    ), taken AS MATERIALIZED (
        SELECT * FROM page ORDER BY session_id, chat_id LIMIT :most
    ), ruled AS MATERIALIZED (
        SELECT t.session_id, t.chat_id, t.last_event_at, a.assistant_id,
               coalesce(CAST(CAST(:by_assistant AS json) ->> a.assistant_id AS integer), :content) AS days
          FROM taken t LEFT JOIN LATERAL (
                SELECT t.assistant_id WHERE t.assistant_id IS NOT NULL
                UNION
                SELECT c.assistant_id FROM archiver.chats c
                 WHERE c.session_id = t.session_id AND (t.session_id <> '' OR c.chat_id = t.chat_id)
                   AND c.assistant_id IS NOT NULL
               ) a ON true
    )
    SELECT r.session_id, r.chat_id, min(r.assistant_id) AS assistant_id,
           bool_and(r.days > 0) AND max(r.last_event_at) < :now - max(r.days) * interval '1 day'
           AND NOT EXISTS (SELECT FROM archiver.erasures e
                            WHERE e.session_id = r.session_id AND e.chat_id = r.chat_id) AS is_expired
      FROM ruled r GROUP BY r.session_id, r.chat_id ORDER BY r.session_id, r.chat_id
    """
)

# Only completely erased and completely sealed targets, so that seals prove that they existed.
_SELECT_REMOVABLE = text(
    """
    WITH sealed AS MATERIALIZED (SELECT coalesce(max(events_through), 0) AS through FROM archiver.seals)
    SELECT e.id, e.session_id, e.chat_id FROM archiver.erasures e CROSS JOIN sealed
     WHERE e.id > :after AND (e.chat_id = '' OR e.session_id = '')
       AND EXISTS (SELECT FROM archiver.events f
                    WHERE f.session_id = e.session_id AND (e.chat_id = '' OR f.chat_id = e.chat_id))
       AND NOT EXISTS (SELECT FROM archiver.events f
                        WHERE f.session_id = e.session_id AND (e.chat_id = '' OR f.chat_id = e.chat_id)
                          AND (f.id > sealed.through OR f.salt IS NOT NULL OR f.received_at >= :before))
     ORDER BY e.id LIMIT :most
    """
)


def _expired(engine: Engine, rules: Rules, now: datetime) -> Iterator[dict[Target, str]]:
    """Yield the expired targets with their assistants, page by page."""
    if rules.keeps_content_forever:
        return
    by_assistant = as_json(rules.by_assistant)
    last = Target("")
    while True:
        parameters: dict[str, Any] = {"after_session": last.session_id, "after_chat": last.chat_id, "most": PAGE}
        parameters |= {"now": now, "content": rules.content, "by_assistant": by_assistant}
        with transaction(engine, statement_seconds=300) as connection:
            page = connection.execute(_SELECT_EXPIRED, parameters).all()
        yield {
            Target(row.session_id, row.chat_id): row.assistant_id or NO_ASSISTANT for row in page if row.is_expired
        }
        if len(page) < PAGE:
            return
        last = Target(page[-1].session_id, page[-1].chat_id)


def _removable(engine: Engine, rules: Rules, now: datetime) -> Iterator[list[Target]]:
    after = 0
    while rules.metadata:
        parameters = {"after": after, "before": now - timedelta(days=rules.metadata), "most": PAGE}
        with transaction(engine, statement_seconds=300) as connection:
            page = connection.execute(_SELECT_REMOVABLE, parameters).all()
        if not page:
            return
        after = page[-1].id
        yield [Target(row.session_id, row.chat_id) for row in page]


def _quarantine_before(connection: Connection, rules: Rules, now: datetime) -> datetime | None:
    """Return the time before which quarantine rows expire; None if they are retained.

    They are retained for the longest period of any content, and while any hold is in force, which may cover them.
    """
    if not rules.content or 0 in rules.by_assistant.values() or is_any_in_force(connection):
        return None
    return now - timedelta(days=max(rules.content, *rules.by_assistant.values(), 0))


def preview(engine: Engine, rules: Rules, now: datetime) -> Due:
    """Return the numbers of items that a run would expire now. Writes nothing."""
    due = Due(Counter(), Counter())
    for item in _expired(engine, rules, now):
        with transaction(engine) as connection:
            held = covering(connection, list(item))
        due.held += len(held)
        due.content += Counter(assistant for target, assistant in item.items() if target not in held)
    for targets in _removable(engine, rules, now):
        with transaction(engine) as connection:
            held = covering(connection, targets)
        due.held += len(held)
        due.metadata[NO_ASSISTANT] += sum(target not in held for target in targets)
    due.metadata = +due.metadata
    with transaction(engine) as connection:
        before = _quarantine_before(connection, rules, now)
        due.quarantined = len(quarantine.select_older(connection, before, 1_000_000)) if before else 0
    return due


class Step(msgspec.Struct, frozen=True):
    """The numbers of targets ordered, events removed and quarantine rows deleted in one step."""

    sessions: int = 0
    removed: int = 0
    quarantined: int = 0


def expire(engine: Engine, rules: Rules, now: datetime, *, timing: Timing, due: Due, who: str) -> Iterator[Step]:
    """Order the erasure of expired content, which the next sweep erases, and delete expired metadata.

    `due` is the result of `preview`, for the audit log.
    """
    if due.is_empty:
        return
    detail = {
        "rules": msgspec.structs.asdict(rules),
        "content": due.content,
        "metadata": due.metadata.total(),
        "quarantined": due.quarantined,
        "held": due.held,
    }
    entry = AuditEntry("retention", who, None, detail)
    with transaction(engine) as connection:
        act_id = audit_log.insert_entry(connection, entry.kind, entry.actor, entry.reason, detail)
    slow: list[DBAPIError] = []
    for item in _expired(engine, rules, now):
        if item:
            done = order(engine, list(item), "retention", entry, skip_held=True, act_id=act_id, slow=slow)
            yield Step(sessions=len(done.targets))
    remove = partial(_remove, act_id=act_id, timing=timing)
    for targets in _removable(engine, rules, now):
        for part in parts(targets, REMOVALS_PER_BATCH):
            for removed in run_split(engine, part, remove, slow):
                yield Step(removed=removed)
    yield from _empty_quarantine(engine, rules, now, slow)
    if slow:
        raise slow[0]


def _empty_quarantine(engine: Engine, rules: Rules, now: datetime, slow: list[DBAPIError]) -> Iterator[Step]:
    def work(connection: Connection, ids: Sequence[int]) -> int:
        return quarantine.delete_rows(connection, ids) if _quarantine_before(connection, rules, now) else 0

    after = 0
    while True:
        with transaction(engine) as connection:
            before = _quarantine_before(connection, rules, now)
            ids = quarantine.select_older(connection, before, PAGE, after) if before else []
        if not ids:
            return
        for deleted in run_split(engine, ids, work, slow):
            yield Step(quarantined=deleted)
        after = ids[-1]


_SELECT_EVENTS = text(
    """
    SELECT f.id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
      JOIN archiver.events f ON f.session_id = t.session_id AND (t.chat_id = '' OR f.chat_id = t.chat_id)
    """
)
# The trigger on the ledger requires these rows first.
_INSERT_REMOVALS = text(
    """
    INSERT INTO archiver.removals (event_id, act_id)
    SELECT CAST(json_array_elements_text(:ids) AS bigint), :act_id
    """
)
_DELETE_EVENTS = text(
    "DELETE FROM archiver.events WHERE id IN (SELECT CAST(json_array_elements_text(:ids) AS bigint))"
)


def _remove(connection: Connection, targets: Sequence[Target], act_id: int, timing: Timing) -> int:
    Lock.PUBLISHING.take(connection, exclusive=True)  # first, as in an erasure
    _, chat_ids = split(with_unassigned(connection, targets))
    deletable, _ = exclude_held(connection, targets, exclusive=bool(chat_ids))
    sessions = unassigned.lock_sessions(connection, split(deletable)[0], chat_ids)
    ids = sorted(connection.scalars(_SELECT_EVENTS, {"targets": as_json(deletable)}))
    ids_json = as_json(ids)
    connection.execute(_INSERT_REMOVALS, {"ids": ids_json, "act_id": act_id})
    connection.execute(_DELETE_EVENTS, {"ids": ids_json})
    changes = without_events(rederive(connection, sessions, timing))
    unassigned.rederive(connection, chat_ids)
    insert_changes(connection, [*map(erased_change, deletable), *changes])
    derived_rows.refresh(connection, dict.fromkeys(sessions, 0))
    return len(ids)
