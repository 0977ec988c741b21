"""The archive from the ledger: `project` brings it up to date with new facts, `rederive` makes whole sessions anew.

A turn is a pure function of all facts about it (`turns`), and a session of which history is known is one of all its
facts (`sessions`): whatever their order, the archive ends the same (I5), and the ledger alone rebuilds it (I10).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

from sqlalchemy import Connection

from archiver import events, history, telemetry
from archiver.outbox import Change
from archiver.projection import differences, rows
from archiver.projection import facts as ledger_facts
from archiver.projection.appending import append
from archiver.projection.coverage import DEFAULT_TIMING, Timing
from archiver.projection.differences import Shown
from archiver.projection.erased import select_erased_sessions
from archiver.projection.facts import UNPLACED, Key
from archiver.projection.sessions import derive
from archiver.projection.turns import Fact, Turn, fold

__all__ = [
    "DEFAULT_TIMING",
    "UNPLACED",
    "Fact",
    "Key",
    "Timing",
    "Turn",
    "fold",
    "project",
    "rederive",
    "rederive_locked",
    "rederive_unplaced",
]


MAX_HOMES = 50  # sessions of one chat


class TooManyHomesError(Exception):
    """A chat that does not tell its session is known in so many sessions that it says nothing."""


def project(
    connection: Connection, facts: Sequence[Fact], timing: Timing, erased: Collection[str] = ()
) -> list[Change]:
    """Bring the archive up to date with facts that the same transaction has just put into the ledger.

    Answers what changed thereby, as the feed is to tell it.

    Sessions `erased`, even in part, are made anew as those of which history is known: the caller names those that the
    facts name themselves, and those to which a fact is assigned here are looked up.
    The caller holds the lock that `ledger` takes for facts without a session.
    """
    told = [fact for fact in facts if fact.event.chat_id is not None and fact.event.type in events.CHAT_EVENTS]
    others = [fact for fact in facts if fact.source != events.WEBHOOK]
    if not told and not others:
        return []
    placed = _place(connection, told)
    heard: dict[str, list[datetime]] = defaultdict(list)
    for (session_id, _), own in placed.items():
        heard[session_id] += [fact.received_at for fact in own]
    for fact in others:
        heard[fact.event.session_id].append(fact.received_at)
    heard.pop(UNPLACED, None)
    # Locks the sessions: from here on nobody else projects their turns, and what is known of these is looked up.
    asked = ledger_facts.other_facts(_own_keys(placed)) if placed else None
    read, known = rows.upsert_sessions(connection, heard, timing, asked)
    assigned = sorted(heard.keys() - {fact.event.session_id for fact in facts})
    erased = {*erased, *select_erased_sessions(connection, assigned)}
    read |= {fact.event.session_id for fact in others} | (heard.keys() & erased)
    unread = {key: own for key, own in placed.items() if key[0] not in read}
    changes, moved = _project_turns(connection, unread, ledger_facts.by_turn(known, unread), timing)
    just_read = {fact.event.session_id for fact in others if fact.event.type in history.READINGS}
    whole = {fact.event.session_id for fact in others} | set(erased)
    appended = append(connection, {key: own for key, own in placed.items() if key[0] in read - whole}, timing)
    read -= appended.sessions
    return changes + appended.changes + rederive(connection, sorted(read), timing, just_read, moved)


def _project_turns(
    connection: Connection,
    placed: Mapping[Key, Sequence[Fact]],
    earlier: Mapping[Key, Sequence[Fact]],
    timing: Timing,
) -> tuple[list[Change], dict[str, Shown]]:
    """Turns of sessions that no reading told of stand alone, and are written without a look at their neighbours.

    Answers what changed, and the turns that stood without a session until now.
    """
    if not placed:
        return [], {}
    known = {key: [*_told_now(own), *earlier.get(key, ())] for key, own in sorted(placed.items())}
    turns = {key: fold(facts) for key, facts in known.items() if facts}
    revised = [key for key in turns if key in earlier]
    # As it stands, and not as earlier facts add up to: a redelivery may just have moved one of them in time.
    before, moved = rows.select_shown(connection, revised) if revised else {}, dict[str, Shown]()
    rows.upsert_turns(connection, turns)
    if revised:
        # A fact that did not tell its session may have come first.
        heard: dict[str, list[datetime]] = defaultdict(list)
        for session_id, chat_id in revised:
            heard[session_id] += [fact.received_at for fact in known[session_id, chat_id]]
        heard.pop(UNPLACED, None)
        rows.upsert_sessions(connection, heard, timing)
        rows.delete_surplus_messages(connection, {key: len(turns[key].messages) for key in revised})
        at_home = [(session_id, chat_id) for session_id, chat_id in revised if session_id != UNPLACED]
        moved = rows.delete_unplaced(connection, [chat_id for _, chat_id in at_home])
        before = {key: moved[key[1]] for key in at_home if key[1] in moved} | before
    return differences.of_turns(turns, before), moved


def rederive(
    connection: Connection,
    session_ids: Sequence[str],
    timing: Timing,
    just_read: Collection[str] = (),
    moved: Mapping[str, Shown] = MappingProxyType({}),
) -> list[Change]:
    """Make these sessions anew from all that the ledger tells of them, and write what differs.

    `moved`: turns by chat id that stood without a session until this transaction.

    The caller has their rows locked. A session of which the ledger tells nothing is removed. Answers what changed,
    which is to be told only where something new was recorded.
    """
    if not session_ids:
        return []
    stories = ledger_facts.select_stories(connection, session_ids)
    archived = rows.select_archived(connection, session_ids)
    derived = [derive(story, timing) for story in stories.values()]
    telemetry.repaired_messages.inc(rows.write_difference(connection, archived, derived, just_read))
    rows.delete_sessions(connection, [session_id for session_id in session_ids if session_id not in stories])
    strays = rows.delete_unplaced(connection, [chat_id for story in stories.values() for chat_id in story.strays])
    before = differences.Before(archived.sessions, archived.chats, archived.messages.values(), {**moved, **strays})
    return differences.of_sessions(before, derived, just_read)


def rederive_locked(connection: Connection, session_ids: Sequence[str], timing: Timing) -> None:
    """The same for sessions whose rows nobody has locked yet."""
    rows.lock_sessions(connection, session_ids)
    rederive(connection, session_ids, timing)


def rederive_unplaced(connection: Connection, chat_ids: Sequence[str]) -> None:
    """Make turns anew whose session no delivery told. The caller holds the ledger's lock alone."""
    if not chat_ids:
        return
    facts = ledger_facts.select_unplaced_of(connection, chat_ids)
    placed = {chat_id for _, chat_id in rows.select_homes(connection, chat_ids)}
    rows.delete_unplaced(connection, chat_ids)
    homeless = {(UNPLACED, each): fold(told) for each, told in sorted(facts.items()) if told and each not in placed}
    rows.upsert_turns(connection, homeless)


def _own_keys(placed: Mapping[Key, Sequence[Fact]]) -> dict[Key, list[bytes]]:
    """The turns to look up, in their session and among those without one, each with the facts that are at hand."""
    own: dict[Key, list[bytes]] = {key: [] for key in placed}
    own |= {(UNPLACED, chat_id): [] for _, chat_id in placed}
    for (_, chat_id), facts in placed.items():
        for fact in _told_now(facts):
            own[fact.event.session_id, chat_id].append(fact.event.dedupe_key)
    return own


def _told_now(facts: Iterable[Fact]) -> list[Fact]:
    return [fact for fact in facts if not fact.is_repeat]


def _place(connection: Connection, facts: Sequence[Fact]) -> dict[Key, list[Fact]]:
    """The facts by turn; one that does not tell its session goes to every session known to hold its chat."""
    homeless = {str(fact.event.chat_id) for fact in facts if fact.event.session_id == UNPLACED}
    homes: dict[str | None, set[str]] = defaultdict(set)
    for fact in facts:
        if fact.event.session_id != UNPLACED and fact.event.chat_id in homeless:
            homes[fact.event.chat_id].add(fact.event.session_id)
    for session_id, chat_id in rows.select_homes(connection, homeless) if homeless else ():
        homes[chat_id].add(session_id)
    if any(len(found) > MAX_HOMES for found in homes.values()):
        raise TooManyHomesError
    placed: dict[Key, list[Fact]] = defaultdict(list)
    for fact in facts:
        chat_id = str(fact.event.chat_id)
        told = fact.event.session_id
        for session_id in {told} if told != UNPLACED else homes[chat_id] or {UNPLACED}:
            placed[session_id, chat_id].append(fact)
    return placed
