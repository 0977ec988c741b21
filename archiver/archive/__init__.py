"""Derive the archive from the ledger: `project` adds new facts, `rederive` rebuilds whole sessions.

A turn is a pure function of all facts about it (`turns`), and a session whose history is known is a pure function of
all its facts (`sessions`). So the archive does not depend on their order (I5), and the ledger suffices to rebuild it
(I10).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

from sqlalchemy import Connection

from archiver import events, telemetry
from archiver.archive import differences, rows
from archiver.archive import facts as ledger_facts
from archiver.archive.appending import append
from archiver.archive.coverage import DEFAULT_TIMING, Timing
from archiver.archive.differences import TurnState, without_events
from archiver.archive.erasures import select_erased_sessions
from archiver.archive.facts import UNASSIGNED, Key
from archiver.archive.outbox import Change
from archiver.archive.sessions import Rows, derive
from archiver.archive.turns import Fact, Turn, fold
from archiver.errors import ArchiverError
from archiver.events import responses

__all__ = [
    "DEFAULT_TIMING",
    "UNASSIGNED",
    "Fact",
    "Timing",
    "Turn",
    "fold",
    "lock_and_rederive",
    "project",
    "rederive",
    "without_events",
]


MAX_SESSIONS_PER_CHAT = 50  # to which one chat can be assigned


class AmbiguousSessionError(ArchiverError):
    """An unassigned chat belongs to too many sessions to be assigned."""

    message = "an unassigned chat belongs to too many sessions to be assigned"


def project(
    connection: Connection, facts: Sequence[Fact], timing: Timing, erased: Collection[str] = ()
) -> list[Change]:
    """Bring the archive up to date with facts that the same transaction has just appended to the ledger.

    Returns the changes for the feed.

    `erased`: the sessions that the facts name and that were erased, even in part. They are rebuilt like sessions with
    a history. Whether other sessions to which a fact is assigned were erased is looked up here. The caller has
    acquired the lock that `ledger` requires for facts without a session.
    """
    chat_facts = [fact for fact in facts if fact.event.chat_id is not None and fact.event.type in events.CHAT_EVENTS]
    others = [fact for fact in facts if fact.source != events.WEBHOOK]
    if not chat_facts and not others:
        return []
    by_turn = _assign(connection, chat_facts)
    arrivals: dict[str, list[datetime]] = defaultdict(list)
    for (session_id, _), own in by_turn.items():
        arrivals[session_id] += [fact.received_at for fact in own]
    for fact in others:
        arrivals[fact.event.session_id].append(fact.received_at)
    arrivals.pop(UNASSIGNED, None)
    # Locks the sessions, so that no other transaction projects their turns from here on, and reads the stored facts.
    other_facts_query = ledger_facts.other_facts(ledger_facts.own_keys(by_turn)) if by_turn else None
    read, stored = rows.upsert_sessions(connection, arrivals, timing, other_facts_query)
    assigned = sorted(arrivals.keys() - {fact.event.session_id for fact in facts})
    erased = {*erased, *select_erased_sessions(connection, assigned)}
    read |= {fact.event.session_id for fact in others} | (arrivals.keys() & erased)
    unread = {key: own for key, own in by_turn.items() if key[0] not in read}
    changes, moved = _project_turns(connection, unread, ledger_facts.by_turn(stored, unread), timing)
    whole = {fact.event.session_id for fact in others} | set(erased)
    appended = append(connection, {key: own for key, own in by_turn.items() if key[0] in read - whole}, timing)
    read -= appended.sessions
    return changes + appended.changes + rederive(connection, sorted(read), timing, others, moved)


def _project_turns(
    connection: Connection,
    by_turn: Mapping[Key, Sequence[Fact]],
    earlier: Mapping[Key, Sequence[Fact]],
    timing: Timing,
) -> tuple[list[Change], dict[str, TurnState]]:
    """Write turns of sessions without a reading, each independently of the others.

    Returns the changes, and the turns that were unassigned until now.
    """
    if not by_turn:
        return [], {}
    known = {key: [*ledger_facts.new_facts(own), *earlier.get(key, ())] for key, own in sorted(by_turn.items())}
    turns = {key: fold(facts) for key, facts in known.items() if facts}
    revised = [key for key in turns if key in earlier]
    # The stored state, not one derived from the earlier facts: a redelivery may just have changed the time of a fact.
    before, moved = rows.select_turn_states(connection, revised) if revised else {}, dict[str, TurnState]()
    rows.upsert_turns(connection, turns)
    if revised:
        # An unassigned fact may have arrived first.
        arrivals: dict[str, list[datetime]] = defaultdict(list)
        for session_id, chat_id in revised:
            arrivals[session_id] += [fact.received_at for fact in known[session_id, chat_id]]
        arrivals.pop(UNASSIGNED, None)
        rows.upsert_sessions(connection, arrivals, timing)
        rows.delete_surplus_messages(connection, {key: len(turns[key].messages) for key in revised})
        with_session = [(session_id, chat_id) for session_id, chat_id in revised if session_id != UNASSIGNED]
        moved = rows.delete_unassigned(connection, [chat_id for _, chat_id in with_session])
        before = {key: moved[key[1]] for key in with_session if key[1] in moved} | before
    return differences.turn_changes(turns, before), moved


def rederive(
    connection: Connection,
    session_ids: Sequence[str],
    timing: Timing,
    others: Sequence[Fact] = (),
    moved: Mapping[str, TurnState] = MappingProxyType({}),
) -> list[Change]:
    """Rebuild these sessions from all their facts, and write the differences.

    `others`: readings and registrations that this transaction recorded. `moved`: turns, by chat id, that were
    unassigned until this transaction.

    The caller has locked the rows of the sessions. A session without facts is deleted. Returns the changes; if this
    transaction recorded nothing, `without_events` returns those to publish.
    """
    if not session_ids:
        return []
    facts_by_session = ledger_facts.select_session_facts(connection, session_ids)
    archived = rows.select_archived(connection, session_ids)
    derived = [derive(session_facts, timing) for session_facts in facts_by_session.values()]
    just_read = {fact.event.session_id for fact in others if fact.event.type in responses.READINGS}
    written = rows.write_difference(connection, archived, derived, just_read)
    telemetry.repaired_messages.inc(written.repaired)
    rows.delete_sessions(connection, [session_id for session_id in session_ids if session_id not in facts_by_session])
    removed = {session_id for session_id, _ in archived.chats} - facts_by_session.keys()
    rewritten = written.sessions | _delimited(derived, others) | removed
    unassigned = rows.delete_unassigned(
        connection, [chat_id for session_facts in facts_by_session.values() for chat_id in session_facts.unassigned]
    )
    before = differences.PreviousRows(
        archived.sessions, archived.chats, archived.messages.values(), {**moved, **unassigned}
    )
    return differences.session_changes(before, derived, just_read, rewritten)


def _delimited(derived: Sequence[Rows], others: Sequence[Fact]) -> set[str]:
    """Return the sessions of which one of these is the first event, or the last one that is not a reading.

    The upsert that locked them has already written these times, which views show.
    """
    sessions = {each.session["session_id"]: each.session for each in derived}
    limited: set[str] = set()
    for fact in ledger_facts.new_facts(others):
        session = sessions[fact.event.session_id]
        names = ("first_event_at",) if fact.event.type in responses.READINGS else ("first_event_at", "last_event_at")
        if fact.received_at in {session[name] for name in names}:
            limited.add(fact.event.session_id)
    return limited


def lock_and_rederive(connection: Connection, session_ids: Sequence[str], timing: Timing) -> list[Change]:
    """Lock the sessions, then rebuild them with `rederive` from known facts. Return the changes."""
    rows.lock_sessions(connection, session_ids)
    return without_events(rederive(connection, session_ids, timing))


def _assign(connection: Connection, facts: Sequence[Fact]) -> dict[Key, list[Fact]]:
    """Return the facts by turn; an unassigned fact belongs to every session known to contain its chat."""
    unassigned = {str(fact.event.chat_id) for fact in facts if fact.event.session_id == UNASSIGNED}
    sessions_of_chat: dict[str | None, set[str]] = defaultdict(set)
    for fact in facts:
        if fact.event.session_id != UNASSIGNED and fact.event.chat_id in unassigned:
            sessions_of_chat[fact.event.chat_id].add(fact.event.session_id)
    for session_id, chat_id in rows.select_sessions_of_chats(connection, unassigned):
        sessions_of_chat[chat_id].add(session_id)
    if any(len(item) > MAX_SESSIONS_PER_CHAT for item in sessions_of_chat.values()):
        raise AmbiguousSessionError
    by_turn: dict[Key, list[Fact]] = defaultdict(list)
    for fact in facts:
        chat_id = str(fact.event.chat_id)
        session_id_of_fact = fact.event.session_id
        for session_id in (
            {session_id_of_fact} if session_id_of_fact != UNASSIGNED else sessions_of_chat[chat_id] or {UNASSIGNED}
        ):
            by_turn[session_id, chat_id].append(fact)
    return by_turn
