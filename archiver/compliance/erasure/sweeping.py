"""Erase the content of ordered erasures from ledger, archive, quarantine and delivery log.

Ordered targets that still have content are found again, so a killed process loses nothing. Content under a hold stays
until the release of the hold.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

import msgspec
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import ledger
from archiver.archive import (
    UNASSIGNED,
    Timing,
    derived_rows,
    pieces,
    rederive,
    search,
    unassigned,
    without_events,
)
from archiver.archive.facts import select_session_facts
from archiver.archive.outbox import insert_changes
from archiver.archive.sessions import SessionFacts, without_turns
from archiver.compliance.erasure import mentions
from archiver.compliance.erasure.decoding import decode
from archiver.compliance.erasure.holds import covering, exclude_held
from archiver.compliance.erasure.ordering import AuditEntry, order
from archiver.compliance.erasure.quarantine_matches import QuarantineMatches, delete_matches, select_matches
from archiver.compliance.erasure.repeated_content import select_repeating_turns
from archiver.compliance.erasure.targets import Target, erased_change, marks, parts, split
from archiver.database import Lock, as_json, run_split, transaction
from archiver.events import Delivery, Event, responses
from archiver.ledger import audit_log, quarantine
from archiver.outbound.followups.deliveries import delete_answers

PAGE = 500  # erasures read in one query
MAX_IDS_PER_SEARCH = 100_000  # ids per pass over the quarantine, exceeded by at most one page
MAX_PAGES = 100  # pages of erasures between two steps
BATCH_SIZE = 20  # sessions or unassigned turns per transaction


class Step(msgspec.Struct, frozen=True):
    """The result of a step: the last completed erasure, and the targets that holds keep.

    `events`: number of events whose content was erased. `quarantined`: number of deleted quarantine rows.
    `repeating`: other turns whose deliveries repeat content of an erased turn.
    """

    through: int
    events: int = 0
    quarantined: int = 0
    repeating: Sequence[Target] = ()
    held: Mapping[Target, Sequence[int]] = {}


# Content that an erasure covers: all of a session; or the facts of a turn and every reading of its session, except a
# reading that was made without the turn.
_NAMED = """
    f.session_id = e.session_id AND f.salt IS NOT NULL
    AND (e.chat_id = '' OR f.chat_id = e.chat_id
         OR (e.session_id <> '' AND f.source = 'history'
             AND NOT (f.type = 'history.redacted' AND f.occurred_at >= e.erased_at)))
"""
_SELECT_PAGE = text(
    f"""
    WITH page AS MATERIALIZED (
        SELECT * FROM archiver.erasures WHERE id > :after ORDER BY id LIMIT :most
    )
    SELECT e.id, e.session_id, e.chat_id, e.rule, e.act_id,
           EXISTS (SELECT FROM archiver.events f WHERE {_NAMED}) AS is_pending,
           e.session_id <> '' AND e.chat_id <> ''
           AND EXISTS (SELECT FROM archiver.events f
                        WHERE f.session_id = '' AND f.chat_id = e.chat_id AND f.body IS NOT NULL) AS has_unassigned
      FROM page e ORDER BY e.id
    """  # noqa: S608  # only a constant is inserted, never input
)


class SearchedRows(msgspec.Struct, frozen=True):
    """Quarantine rows already searched for these targets in this run."""

    targets: Collection[Target] = ()
    ids: Collection[int] = ()


class _Page(msgspec.Struct, frozen=True):
    """The last erasure of a page, and the targets that still have content."""

    through: int
    pending: Sequence[Target]


NONE_SEARCHED = SearchedRows()


def sweep(engine: Engine, timing: Timing, after: int = 0, searched: SearchedRows = NONE_SEARCHED) -> Iterator[Step]:
    """Delete the remaining content of erasures after this id; yield after each step and page.

    One pass over the quarantine serves as many pages as contain `MAX_IDS_PER_SEARCH` ids in total. A target that is
    locked or takes too long is skipped without delaying others; the first such error is raised at the end.
    """
    slow: list[DBAPIError] = []
    through = after
    while pages := _select_pages(engine, after, slow):
        # Before the content, so that an interrupted sweep finds these rows again.
        for step in _sweep_quarantine(engine, pages, searched, slow):
            yield msgspec.structs.replace(step, through=through)
        for page in pages:
            for step in _sweep_content(engine, page.pending, timing, slow):
                yield msgspec.structs.replace(step, through=through)
            after = page.through
            through = through if slow else after
            yield Step(through)
    if slow:
        raise slow[0]


def _select_pages(engine: Engine, after: int, slow: list[DBAPIError]) -> list[_Page]:
    pages: list[_Page] = []
    count = 0
    while count < MAX_IDS_PER_SEARCH and len(pages) < MAX_PAGES:
        with transaction(engine, statement_seconds=300) as connection:
            page = connection.execute(_SELECT_PAGE, {"after": after, "most": PAGE}).all()
            pending = sorted(Target(row.session_id, row.chat_id) for row in page if row.is_pending)
            count += len(marks(connection, pending)) if pending else 0
        if not page:
            break
        for row in page:
            if row.has_unassigned:  # facts found since the order: ordered like the others, and swept on a later page
                act = AuditEntry("erase", audit_log.ARCHIVER, None)
                order(
                    engine,
                    [Target.unassigned(row.chat_id)],
                    row.rule,
                    act,
                    skip_held=True,
                    act_id=row.act_id,
                    slow=slow,
                )
        after = page[-1].id
        pages.append(_Page(after, pending))
    return pages


def _sweep_quarantine(
    engine: Engine, pages: Sequence[_Page], searched: SearchedRows, slow: list[DBAPIError]
) -> Iterator[Step]:
    pending = sorted({target for page in pages for target in page.pending})
    if not pending:
        return
    before = searched.ids if set(pending) <= set(searched.targets) else ()
    for ids in _parts(_select_quarantined(engine, pending, before)):
        for removed in run_split(engine, ids, _empty_quarantine, slow):
            yield Step(0, quarantined=removed)


def _sweep_content(
    engine: Engine, pending: Sequence[Target], timing: Timing, slow: list[DBAPIError]
) -> Iterator[Step]:
    take_away = partial(purge_batch, timing=timing)
    for is_unassigned in (True, False):  # unassigned turns need the exclusive lock
        for part in parts([target for target in pending if target.is_unassigned is is_unassigned], BATCH_SIZE):
            yield from run_split(engine, part, take_away, slow)


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[start : start + BATCH_SIZE] for start in range(0, len(ids), BATCH_SIZE))


def _select_quarantined(engine: Engine, targets: Sequence[Target], searched: Collection[int]) -> Sequence[int]:
    """Return the quarantine rows about targets that no hold covers. Takes no lock, because the search is slow."""
    with transaction(engine, statement_seconds=600) as connection:
        held = covering(connection, targets)
        deletable = [target for target in targets if target not in held]
        return select_matches(connection, deletable, searched=searched).by_id


def _empty_quarantine(connection: Connection, ids: Sequence[int]) -> int:
    quarantine.lock_rows(connection, ids)  # before the recording lock, as `quarantine retry` does
    Lock.RECORDING.take(connection, exclusive=False)
    return delete_matches(connection, QuarantineMatches(by_id=ids))


def purge_batch(connection: Connection, targets: Sequence[Target], timing: Timing) -> Step:
    # These locks first: their holders never wait for the locks of receiving, which this transaction acquires next.
    Lock.INDEXING.take(connection, exclusive=True)
    Lock.PUBLISHING.take(connection, exclusive=True)
    # A session's readings can be searched for the words of a turn only while the turn's own delivery contains them.
    targets = sorted({*targets, *_select_assigned(connection, targets)})
    # A target may be both ordered and held: an erased turn turned out to belong to a held session, or the hold was
    # placed after the order.
    deletable, held = exclude_held(connection, targets, exclusive=any(each.is_unassigned for each in targets))
    # before the deletion, after which it cannot be determined
    repeating = select_repeating_turns(connection, deletable)
    delete_answers(connection, [(each.session_id, each.chat_id) for each in deletable])
    return Step(0, _erase(connection, deletable, timing), repeating=repeating, held=held)


_SELECT_ASSIGNED = text(
    f"""
    SELECT e.session_id, e.chat_id
      FROM archiver.erasures e JOIN archiver.chats c ON c.session_id = e.session_id AND c.chat_id = e.chat_id
     WHERE c.session_id <> '' AND c.chat_id IN (SELECT json_array_elements_text(:chat_ids))
       AND EXISTS (SELECT FROM archiver.events f WHERE {_NAMED})
    """  # noqa: S608  # only a constant is inserted, never input
)


def _select_assigned(connection: Connection, targets: Sequence[Target]) -> list[Target]:
    """Return the pending targets in sessions that contain the unassigned turns among these targets."""
    _, chat_ids = split(targets)
    rows = connection.execute(_SELECT_ASSIGNED, {"chat_ids": as_json(chat_ids)}) if chat_ids else ()
    return [Target(row.session_id, row.chat_id) for row in rows]


def _erase(connection: Connection, targets: Sequence[Target], timing: Timing) -> int:
    session_ids, chat_ids = split(targets)
    ordered = _select_ordered(connection, session_ids)
    whole = sorted(each for each in ordered if "" in ordered[each])
    partly = sorted(ordered.keys() - set(whole))
    touched = unassigned.lock_sessions(connection, ordered, chat_ids)
    facts_by_session = select_session_facts(connection, partly)
    # Before the erasure of the content from which these readings are derived.
    redacted = [
        delivery
        for session_id, session_facts in sorted(facts_by_session.items())
        if (delivery := _redact(session_facts, ordered[session_id])) is not None
    ]
    erased = _erase_content(connection, [Target(each) for each in whole], ordered, chat_ids)
    changes = ledger.record_redacted(connection, redacted, timing)
    made = {delivery.content.session_id for delivery in redacted}
    derived = rederive(connection, [each for each in touched if each not in made], timing)
    unassigned.rederive(connection, chat_ids)
    _delete_lexemes(connection, touched, chat_ids)
    insert_changes(connection, [*map(erased_change, targets), *changes, *without_events(derived)])
    derived_rows.refresh(connection, dict.fromkeys(touched, 0))
    return erased


def _delete_lexemes(connection: Connection, session_ids: Sequence[str], chat_ids: Sequence[str]) -> None:
    items = [search.Item(each, None) for each in session_ids]
    search.delete_obsolete(connection, items + [search.Item(UNASSIGNED, each) for each in chat_ids])


_SELECT_ORDERED = text(
    """
    SELECT session_id, chat_id, erased_at FROM archiver.erasures
     WHERE session_id IN (SELECT json_array_elements_text(:session_ids))
    """
)


def _select_ordered(connection: Connection, session_ids: Sequence[str]) -> dict[str, dict[str, datetime]]:
    """Return the times of all erasures of these sessions, by session and chat id."""
    ordered: dict[str, dict[str, datetime]] = defaultdict(dict)
    session_ids_json = as_json(session_ids)
    for row in connection.execute(_SELECT_ORDERED, {"session_ids": session_ids_json}) if session_ids else ():
        ordered[row.session_id][row.chat_id] = row.erased_at
    return ordered


def _redact(session_facts: SessionFacts, ordered: dict[str, datetime]) -> Delivery[Event] | None:
    """Return one reading, without the erased turns, to replace all readings; None if no reading had messages."""
    remaining = without_turns(session_facts, ordered.keys())
    if remaining is None:
        return None
    event = responses.redacted_event(session_facts.session_id, remaining, max(ordered.values()))
    return Delivery(event, session_facts.readings[-1].last_at, None, responses.SOURCE)


# The trigger that guards the ledger allows exactly this change.
_SET = "body = NULL, frame = NULL, runs = NULL, salt = NULL, dedupe_key = sha256(f.salt || f.dedupe_key)"
_ERASE = text(
    f"""
    WITH e AS MATERIALIZED (
        SELECT session_id, chat_id, erased_at
          FROM json_to_recordset(:targets) AS t (session_id text, chat_id text, erased_at timestamptz)
    )
    UPDATE archiver.events f SET {_SET} FROM e WHERE {_NAMED} RETURNING f.id
    """  # noqa: S608  # only constants are inserted, never input
)
# Events of unknown type, whose chat id this version cannot locate.
_SELECT_UNKNOWN = text(
    """
    SELECT id, body FROM archiver.events
     WHERE session_id = :session_id AND chat_id IS NULL AND source = 'webhook' AND body IS NOT NULL
    """
)
_ERASE_EVENTS = text(
    f"""
    UPDATE archiver.events f SET {_SET} WHERE f.session_id = :session_id AND f.body IS NOT NULL
       AND f.id IN (SELECT CAST(json_array_elements_text(:ids) AS bigint))
    """  # noqa: S608  # only a constant is inserted, never input
)


def _erase_content(
    connection: Connection,
    whole: Sequence[Target],
    ordered: dict[str, dict[str, datetime]],
    unassigned_chats: Sequence[str],
) -> int:
    sessions = {target.session_id for target in whole}
    rows = [
        {"session_id": session_id, "chat_id": chat_id, "erased_at": erased_at}
        for session_id, chats in sorted(ordered.items())
        for chat_id, erased_at in sorted(chats.items())
        if session_id not in sessions or not chat_id
    ]
    rows += [msgspec.structs.asdict(Target.unassigned(each)) | {"erased_at": None} for each in unassigned_chats]
    erased = len(connection.execute(_ERASE, {"targets": as_json(rows)}).all())
    pieces.delete_unused(connection, sorted(ordered))
    for session_id, chats in ordered.items():
        if session_id not in sessions:
            erased += _erase_unknown(connection, session_id, [*chats])
    return erased


def _erase_unknown(connection: Connection, session_id: str, chat_ids: Sequence[str]) -> int:
    is_about = mentions.of_any(chat_ids)
    rows = connection.execute(_SELECT_UNKNOWN, {"session_id": session_id})
    ids = [row.id for row in rows if is_about(decode(bytes(row.body)))]
    if ids:
        connection.execute(_ERASE_EVENTS, {"session_id": session_id, "ids": as_json(ids)})
    return len(ids)
