"""Read the facts of turns and sessions from the ledger."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import accumulate, chain
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, text

from archiver import events, telemetry
from archiver.archive import pieces
from archiver.archive.coverage import Reading
from archiver.archive.erasures import select_erased_sessions
from archiver.archive.sessions import SessionFacts
from archiver.archive.turns import Fact, fold
from archiver.database import RawStatement, Statement, as_json
from archiver.events import Message, responses

UNASSIGNED = ""  # the session id of unassigned turns

Key = tuple[str, str]  # session_id, chat_id

# Facts about the same turns from outside this batch, with or without a session. The keys are in a materialized CTE
# because a distributed ledger cannot be joined to anything else. OFFSET 0: while Postgres has no statistics of the
# ledger, it might otherwise read all of it and compare each row with the keys.
_OTHER_FACTS = """
    WITH keys AS MATERIALIZED (
        SELECT * FROM json_to_recordset($1) AS k (session_id text, chat_id text, own text[])
    )
    SELECT e.session_id, e.chat_id, e.type, e.dedupe_key, e.source, e.received_at, e.body,
           least(e.occurred_at, e.earliest_at) AS occurred_at
      FROM keys
     CROSS JOIN LATERAL (
         SELECT * FROM archiver.events e WHERE e.session_id = keys.session_id AND e.chat_id = keys.chat_id OFFSET 0
     ) e
     WHERE NOT encode(e.dedupe_key, 'hex') = ANY (keys.own) AND e.type IN ('chat.created', 'chat.deleted')
    """
_IS_UNREAD = "(SELECT s.read_at FROM archiver.sessions s WHERE s.session_id = e.session_id) IS NULL"
_SELECT_OTHER_FACTS = RawStatement(_OTHER_FACTS)
_SELECT_OTHER_FACTS_UNREAD = RawStatement(f"{_OTHER_FACTS} AND {_IS_UNREAD}")


def other_facts(own: Mapping[Key, Sequence[bytes]], *, of_read: bool = False) -> Statement:
    """Return a query for the facts of these turns in the ledger, except those with the given dedupe keys.

    For sessions that were read it returns none, unless `of_read`: most of those are rebuilt from all their facts.
    """
    # As JSON, because the driver writes an array item by item.
    keys = [
        {"session_id": key[0], "chat_id": key[1], "own": [digest.hex() for digest in digests]}
        for key, digests in own.items()
    ]
    statement = _SELECT_OTHER_FACTS if of_read else _SELECT_OTHER_FACTS_UNREAD
    return statement.bind(as_json(keys))


def own_keys(by_turn: Mapping[Key, Sequence[Fact]]) -> dict[Key, list[bytes]]:
    """Return the turns to look up, in their session and unassigned, each with the dedupe keys of its new facts."""
    own: dict[Key, list[bytes]] = {key: [] for key in by_turn}
    own |= {(UNASSIGNED, chat_id): [] for _, chat_id in by_turn}
    for (_, chat_id), facts in by_turn.items():
        for fact in new_facts(facts):
            own[fact.event.session_id, chat_id].append(fact.event.dedupe_key)
    return own


def new_facts(facts: Iterable[Fact]) -> list[Fact]:
    """Return the facts that are not repeats."""
    return [fact for fact in facts if not fact.is_repeat]


def by_turn(rows: Iterable[Row[Any]], keys: Iterable[Key]) -> dict[Key, list[Fact]]:
    """Return the facts in the rows of `other_facts`, by session and turn.

    A turn whose facts can no longer be parsed has an empty list.
    """
    sessions_of_chat: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        sessions_of_chat[key[1]].append(key)
    result: dict[Key, list[Fact]] = defaultdict(list)
    for row in rows:
        key_of_row = row.session_id, row.chat_id
        places = [
            key for key in sessions_of_chat.get(row.chat_id, ()) if row.session_id == UNASSIGNED or key == key_of_row
        ]
        fact = _fact(row) if places else None
        for key in places:
            result[key] += [fact] if fact is not None else []
    return result


def _fact(row: Row[Any]) -> Fact | None:
    if row.body is None:  # erased: only the existence and the time of the fact are left
        occurred_at = events.plausible(row.occurred_at)
        ids = events.Event(row.type, b"", bytes(row.dedupe_key), row.session_id, row.chat_id, None, occurred_at)
        return Fact(ids, row.source, row.received_at, occurred_at)
    event = events.parse(row.body)
    if isinstance(event, events.Malformed):
        # Stored by a version that could read it: its turn keeps the content of the other facts.
        telemetry.unreadable_facts.labels(event.reason).inc()
        return None
    # Earlier versions stored times in the ledger that mean "no value".
    return Fact(event, row.source, row.received_at, events.plausible(row.occurred_at) or event.occurred_at)


_SELECT_FACTS = text(
    """
    SELECT e.session_id, e.type, e.dedupe_key, e.source, e.chat_id, e.received_at, e.last_received_at,
           e.delivery_count, least(e.occurred_at, e.earliest_at) AS occurred_at, e.body, e.frame, e.runs
      FROM archiver.events e
     WHERE e.session_id = ANY (:session_ids)
       AND (e.source <> 'webhook' OR e.type IN ('chat.created', 'chat.deleted'))
     ORDER BY e.id
    """
)

_SELECT_UNASSIGNED = text(
    """
    SELECT e.session_id, e.chat_id, e.type, e.dedupe_key, e.source, e.received_at, e.body,
           least(e.occurred_at, e.earliest_at) AS occurred_at
      FROM archiver.events e
     WHERE e.session_id = '' AND e.chat_id = ANY (:chat_ids)
       AND e.type IN ('chat.created', 'chat.deleted')
    """
)


def select_session_facts(connection: Connection, session_ids: Sequence[str]) -> dict[str, SessionFacts]:
    """Return all facts of these sessions, by session."""
    rows = connection.execute(_SELECT_FACTS, {"session_ids": list(session_ids)}).all()
    of_session: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        of_session[row.session_id].append(row)
    chat_ids = sorted({row.chat_id for row in rows if row.source == events.WEBHOOK})
    unassigned: dict[str, list[Row[Any]]] = defaultdict(list)
    if chat_ids:
        for row in connection.execute(_SELECT_UNASSIGNED, {"chat_ids": chat_ids}):
            unassigned[row.chat_id].append(row)
    erased = select_erased_sessions(connection, list(of_session))
    contents = pieces.select_contents(connection, sorted({row.session_id for row in rows if row.runs is not None}))
    facts_by_session = {
        session_id: _session_facts(session_id, own, unassigned, contents.get(session_id, {}))
        for session_id, own in of_session.items()
    }
    for session_id in erased:
        facts_by_session[session_id].is_erased = True
    return facts_by_session


_SELECT_UNASSIGNED_PAGE = text(
    """
    WITH page AS MATERIALIZED (
        SELECT DISTINCT chat_id FROM archiver.events
         WHERE session_id = '' AND chat_id > :after AND type IN ('chat.created', 'chat.deleted')
         ORDER BY chat_id LIMIT :most
    )
    SELECT e.session_id, e.chat_id, e.type, e.dedupe_key, e.source, e.received_at, e.body,
           least(e.occurred_at, e.earliest_at) AS occurred_at
      FROM page JOIN archiver.events e ON e.session_id = '' AND e.chat_id = page.chat_id
     WHERE e.type IN ('chat.created', 'chat.deleted')
     ORDER BY e.chat_id
    """
)


def select_unassigned_of(connection: Connection, chat_ids: Sequence[str]) -> dict[str, list[Fact]]:
    """Return the unassigned facts of these chats, by chat."""
    result: dict[str, list[Fact]] = defaultdict(list)
    for row in connection.execute(_SELECT_UNASSIGNED, {"chat_ids": list(chat_ids)}):
        fact = _fact(row)
        result[row.chat_id] += [fact] if fact is not None else []
    return result


def select_unassigned(connection: Connection, after: str, limit: int) -> dict[str, list[Fact]]:
    """Return the unassigned facts of at most `limit` chats after this id, by chat in order of ids."""
    values: dict[str, list[Fact]] = {}
    for row in connection.execute(_SELECT_UNASSIGNED_PAGE, {"after": after, "most": limit}):
        fact = _fact(row)
        values.setdefault(row.chat_id, []).extend([fact] if fact is not None else [])
    return values


def _session_facts(
    session_id: str,
    found: Sequence[Row[Any]],
    unassigned: Mapping[str, Sequence[Row[Any]]],
    contents: Mapping[int, bytes],
) -> SessionFacts:
    shared = _Shared(contents)
    chats: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in found:
        if row.source == events.WEBHOOK:
            chats[row.chat_id].append(row)
    for chat_id, own in chats.items():
        own.extend(unassigned.get(chat_id, ()))
    non_webhook = sorted((row for row in found if row.source != events.WEBHOOK), key=lambda row: row.last_received_at)
    turns = {chat_id: _facts(own) for chat_id, own in chats.items()}
    return SessionFacts(
        session_id,
        turns={chat_id: fold(facts) for chat_id, facts in turns.items() if facts},
        readings=_readings([row for row in non_webhook if row.type in responses.READINGS], shared),
        registrations=[
            (row.received_at, _snapshot(row, shared)) for row in non_webhook if row.type == responses.REGISTERED
        ],
        unassigned=[chat_id for chat_id in chats if chat_id in unassigned],
        arrived_at=[
            *_arrivals(chats.values()),
            *(row.received_at for row in non_webhook if row.type == responses.REGISTERED),
        ],
    )


def _facts(rows: Iterable[Row[Any]]) -> list[Fact]:
    return [fact for row in rows if (fact := _fact(row)) is not None]


def _arrivals(chats: Iterable[Sequence[Row[Any]]]) -> list[datetime]:
    return [row.received_at for own in chats for row in own]


class _Shared:
    """The messages that the responses of a session share; each is parsed once, and a run is a slice of them."""

    def __init__(self, contents: Mapping[int, bytes]) -> None:
        self._numbers = sorted(contents)
        contents_read = [responses.message(contents[number]) for number in self._numbers]
        self._messages = [*chain.from_iterable(contents_read)]
        self._starts = [*accumulate(map(len, contents_read), initial=0)]

    def shown(self, runs: Iterable[pieces.Run]) -> Iterator[Message]:
        """Return the messages of a response, without those of missing pieces, which `archiver verify` reports."""
        return chain.from_iterable(self._messages[self._slice(run)] for run in runs)

    def count(self, runs: Iterable[pieces.Run]) -> int:
        """Return the number of messages in these runs, without those of missing pieces."""
        slices = map(self._slice, runs)
        return sum(max(0, each.stop - each.start) for each in slices)

    def _slice(self, run: pieces.Run) -> slice:
        first, last = bisect_left(self._numbers, run[0]), bisect_right(self._numbers, run[1])
        return slice(self._starts[first], self._starts[last])


def _readings(rows: Sequence[Row[Any]], shared: _Shared) -> list[Reading]:
    """Return the readings in these rows, which are in order of time."""
    result: list[Reading] = []
    following: Row[Any] | None = None  # the next row with messages
    for row in reversed(rows):
        shown = None
        if row.runs is not None and following is not None and pieces.is_prefix(row.runs, following.runs or ()):
            shown = shared.count(pieces.pairs(row.runs))
        snapshot = _snapshot(row, shared, with_messages=shown is None)
        times = (row.received_at, row.last_received_at, row.delivery_count)
        result.append(Reading(row.type, *times, snapshot, shown))
        following = row if snapshot.messages is not None else following
    return result[::-1]


def _snapshot(row: Row[Any], shared: _Shared, *, with_messages: bool = True) -> responses.SessionSnapshot:
    if row.runs is not None and len(row.frame or ()) == pieces.FRAME:
        messages = shared.shown(pieces.pairs(row.runs)) if with_messages else ()
        snapshot = pieces.parse_snapshot(row.session_id, row.frame, messages)
    elif row.body is None:
        return responses.EMPTY_SNAPSHOT
    else:
        snapshot = responses.parse_snapshot(row.type, row.session_id, row.body)
    created_at = events.credible(snapshot.created_at, row.received_at)
    return snapshot if created_at == snapshot.created_at else msgspec.structs.replace(snapshot, created_at=created_at)
