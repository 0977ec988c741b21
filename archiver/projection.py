"""The archive from the ledger: a turn is a pure function of all facts about it, whatever their order (I5).

`fold` is that function; `project` finds what else the ledger knows of the turns that a batch touches, folds, and
writes sessions, chats and messages with one statement each.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Table, and_, bindparam, delete, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY, TEXT, insert

from archiver import events, tables, telemetry
from archiver.database import RowsInsert
from archiver.events import Event, Message

UNPLACED = ""  # the session of a turn whose session no delivery has told

Key = tuple[str, str]  # session_id, chat_id
Row = dict[str, Any]
T = TypeVar("T")

_NEVER = datetime.min.replace(tzinfo=UTC)


class Fact(msgspec.Struct, frozen=True, gc=False):
    """One ledger row about a chat, read again.

    `is_repeat`: only its times may have changed, and what it tells is to be read from the ledger, not from this
    delivery, whose envelope may differ from the one that was kept.
    """

    event: Event
    source: str
    received_at: datetime
    occurred_at: datetime | None
    is_repeat: bool = False

    @property
    def told_at(self) -> datetime:
        """The time by which revisions are ordered: upstream's own where there is one."""
        chat = self.event.chat
        updated, created = (chat.updated_at, chat.created_at) if chat else (None, None)
        return updated or self.occurred_at or created or self.received_at

    @property
    def order(self) -> tuple[datetime, datetime, datetime, bytes]:
        """Sorts the revisions of a turn, oldest first; arrival decides only where upstream tells nothing."""
        return self.told_at, self.occurred_at or _NEVER, self.received_at, self.event.dedupe_key


class Turn(msgspec.Struct, frozen=True, gc=False):
    """What the archive holds of one chat."""

    assistant_id: str | None
    external_id: str | None
    status: str | None
    cost: Decimal | None
    variables: Mapping[str, Any] | None
    created_at: datetime | None
    updated_at: datetime | None
    session_name: str | None
    session_status: str | None
    occurred_at: datetime | None
    first_received_at: datetime
    deleted_at: datetime | None
    source: str
    messages: tuple[Message, ...]


def fold(facts: Sequence[Fact]) -> Turn:
    """The turn that these facts, at least one, add up to, in whatever order they are given.

    The newest told value of each field wins; an empty output never replaces a filled one; one deletion is enough.
    """
    if len(facts) == 1:
        return _turn_of(facts[0])
    ordered = sorted(facts, key=lambda fact: fact.order)
    tellings = [fact.event.chat for fact in ordered if fact.event.chat is not None]
    outputs = [chat.output for chat in tellings]
    return Turn(
        assistant_id=_newest(chat.assistant_id for chat in tellings),
        external_id=_newest(chat.external_id for chat in tellings),
        status=_newest(chat.status for chat in tellings),
        cost=_newest(chat.cost for chat in tellings),
        variables=_newest(chat.variables for chat in tellings),
        created_at=_earliest(chat.created_at for chat in tellings),
        session_name=_newest(chat.session_name for chat in tellings),
        session_status=_newest(chat.session_status for chat in tellings),
        updated_at=max((chat.updated_at for chat in tellings if chat.updated_at), default=None),
        occurred_at=_earliest(fact.occurred_at for fact in ordered),
        first_received_at=min(fact.received_at for fact in ordered),
        deleted_at=_earliest(
            fact.occurred_at or fact.told_at for fact in ordered if fact.event.type == events.DELETED
        ),
        source=ordered[0].source,
        messages=(_newest(chat.input or None for chat in tellings) or ())
        + (_newest(output if _is_filled(output) else None for output in outputs) or _last(outputs)),
    )


def _turn_of(fact: Fact) -> Turn:
    """`fold` of a single fact, which is what nearly every turn is made of, at a fraction of the cost."""
    chat = fact.event.chat or events.NOTHING_TOLD
    return Turn(
        assistant_id=chat.assistant_id,
        external_id=chat.external_id,
        status=chat.status,
        cost=chat.cost,
        variables=chat.variables,
        created_at=chat.created_at,
        updated_at=chat.updated_at,
        session_name=chat.session_name,
        session_status=chat.session_status,
        occurred_at=fact.occurred_at,
        first_received_at=fact.received_at,
        deleted_at=(fact.occurred_at or fact.told_at) if fact.event.type == events.DELETED else None,
        source=fact.source,
        messages=chat.input + chat.output,
    )


def _newest(values: Iterable[T | None]) -> T | None:
    return next(reversed([value for value in values if value is not None]), None)


def _earliest(values: Iterable[datetime | None]) -> datetime | None:
    return min((value for value in values if value is not None), default=None)


def _is_filled(output: tuple[Message, ...]) -> bool:
    return any(message.content.strip() for message in output)


def _last(outputs: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    return next((output for output in reversed(outputs) if output), ())


def project(connection: Connection, facts: Sequence[Fact]) -> None:
    """Bring the archive up to date with facts that the same transaction has just put into the ledger.

    The caller holds the lock that `ledger` takes for facts without a session.
    """
    facts = [fact for fact in facts if fact.event.chat_id is not None and fact.event.type in events.CHAT_EVENTS]
    if not facts:
        return
    placed = _place(connection, facts)
    _upsert_sessions(connection, {key: facts for key, facts in placed.items() if key[0] != UNPLACED})
    earlier = _select_other_facts(connection, placed)
    known = {key: [*_told_now(own), *earlier.get(key, ())] for key, own in sorted(placed.items())}
    turns = {key: fold(facts) for key, facts in known.items() if facts}
    _upsert_chats(connection, turns)
    _upsert_messages(connection, turns)
    revised = [key for key in turns if key in earlier]
    if revised:
        # A fact that did not tell its session may have come first.
        _upsert_sessions(connection, {key: earlier[key] for key in revised if key[0] != UNPLACED})
        _delete_surplus_messages(connection, {key: len(turns[key].messages) for key in revised})
        _delete_unplaced(connection, [chat_id for session_id, chat_id in revised if session_id != UNPLACED])


def _told_now(facts: Iterable[Fact]) -> list[Fact]:
    return [fact for fact in facts if not fact.is_repeat]


def _place(connection: Connection, facts: Sequence[Fact]) -> dict[Key, list[Fact]]:
    """The facts by turn; one that does not tell its session goes to every session known to hold its chat."""
    homeless = {str(fact.event.chat_id) for fact in facts if fact.event.session_id == UNPLACED}
    homes = defaultdict(set)
    for fact in facts:
        if fact.event.session_id != UNPLACED and fact.event.chat_id in homeless:
            homes[fact.event.chat_id].add(fact.event.session_id)
    for session_id, chat_id in _select_homes(connection, homeless) if homeless else ():
        homes[chat_id].add(session_id)
    placed: dict[Key, list[Fact]] = defaultdict(list)
    for fact in facts:
        chat_id = str(fact.event.chat_id)
        told = fact.event.session_id
        for session_id in {told} if told != UNPLACED else homes[chat_id] or {UNPLACED}:
            placed[session_id, chat_id].append(fact)
    return placed


def _select_homes(connection: Connection, chat_ids: Iterable[str]) -> Iterable[Key]:
    statement = select(tables.chats.c.session_id, tables.chats.c.chat_id).where(
        tables.chats.c.chat_id == func.any(bindparam("chat_ids", type_=ARRAY(TEXT))),
        tables.chats.c.session_id != UNPLACED,
    )
    return [(row.session_id, row.chat_id) for row in connection.execute(statement, {"chat_ids": sorted(chat_ids)})]


def _upsert_sessions(connection: Connection, placed: Mapping[Key, Sequence[Fact]]) -> None:
    """Locks the sessions, in order of their ids: from here on nobody else projects their turns."""
    times: dict[str, list[datetime]] = defaultdict(list)
    for (session_id, _), facts in placed.items():
        times[session_id] += [fact.received_at for fact in facts]
    rows = [
        {"session_id": session_id, "first_event_at": min(times[session_id]), "last_event_at": max(times[session_id])}
        for session_id in sorted(times)
    ]
    _UPSERT_SESSION.execute(connection, rows)


def _session_upsert() -> RowsInsert:
    sessions = tables.sessions
    statement = insert(sessions)
    new = statement.excluded
    changes = {
        "first_event_at": func.least(sessions.c.first_event_at, new.first_event_at),
        "last_event_at": func.greatest(sessions.c.last_event_at, new.last_event_at),
    }
    upsert = statement.on_conflict_do_update(index_elements=[sessions.c.session_id], set_=changes)
    return RowsInsert(upsert, ["session_id", *changes])


_UPSERT_SESSION = _session_upsert()

# Facts about the same turns that are not this batch's own, be their session told or not. The keys stand in a
# materialized CTE because a distributed ledger joins to nothing else.
_SELECT_OTHER_FACTS = text(
    """
    WITH keys AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:keys) AS k (session_id text, chat_id text, own text[])
    )
    SELECT e.session_id, e.chat_id, e.source, e.received_at, e.occurred_at, e.body
      FROM keys JOIN archiver.events e ON e.session_id = keys.session_id AND e.chat_id = keys.chat_id
     WHERE NOT encode(e.dedupe_key, 'hex') = ANY (keys.own)
       AND e.type IN ('chat.created', 'chat.deleted') AND e.body IS NOT NULL
    """
)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _select_other_facts(connection: Connection, placed: Mapping[Key, Sequence[Fact]]) -> dict[Key, list[Fact]]:
    own: dict[Key, list[str]] = {key: [] for key in placed}
    own |= {(UNPLACED, chat_id): [] for _, chat_id in placed}
    for (_, chat_id), facts in placed.items():
        for fact in _told_now(facts):
            own[fact.event.session_id, chat_id].append(fact.event.dedupe_key.hex())
    # As JSON, because the driver writes an array item by item.
    keys = [{"session_id": key[0], "chat_id": key[1], "own": hexes} for key, hexes in own.items()]
    rows = connection.execute(_SELECT_OTHER_FACTS, {"keys": _json(keys)})
    homes: dict[str, list[Key]] = defaultdict(list)
    for key in placed:
        homes[key[1]].append(key)
    found: dict[Key, list[Fact]] = defaultdict(list)
    for row in rows:
        event = events.parse(row.body)
        if isinstance(event, events.Malformed):
            # Stored by a version that could read it: its turn keeps what the other facts tell.
            telemetry.unreadable_facts.labels(event.reason).inc()
            continue
        fact = Fact(event, row.source, row.received_at, row.occurred_at)
        for key in [(row.session_id, row.chat_id)] if row.session_id != UNPLACED else homes[row.chat_id]:
            found[key].append(fact)
    return found


def _upsert(table: Table, keys: Sequence[str]) -> RowsInsert:
    """Every column but the key becomes what the row says: a fold is the whole truth about its turn."""
    statement = insert(table)
    changes = {column.name: statement.excluded[column.name] for column in table.c if column.name not in keys}
    upsert = statement.on_conflict_do_update(index_elements=list(keys), set_=changes)
    return RowsInsert(upsert, [column.name for column in table.c])


_UPSERT_CHAT = _upsert(tables.chats, ["session_id", "chat_id"])
_UPSERT_MESSAGE = _upsert(tables.messages, ["session_id", "chat_id", "ordinal"])
_TURN_COLUMNS = tuple(name for name in Turn.__struct_fields__ if name != "messages")


def _upsert_chats(connection: Connection, turns: Mapping[Key, Turn]) -> None:
    rows = []
    for (session_id, chat_id), turn in turns.items():
        row: Row = {name: getattr(turn, name) for name in _TURN_COLUMNS}
        row["session_id"], row["chat_id"] = session_id, chat_id
        row["variables"] = _json(turn.variables) if turn.variables else None
        rows.append(row)
    _UPSERT_CHAT.execute(connection, rows)


def _upsert_messages(connection: Connection, turns: Mapping[Key, Turn]) -> None:
    rows = [
        {
            "session_id": session_id,
            "chat_id": chat_id,
            "ordinal": ordinal,
            "role": message.role,
            "content": message.content,
            "source": turn.source,
        }
        for (session_id, chat_id), turn in turns.items()
        for ordinal, message in enumerate(turn.messages)
    ]
    _UPSERT_MESSAGE.execute(connection, rows)


_DELETE_SURPLUS = delete(tables.messages).where(
    and_(
        tables.messages.c.session_id == bindparam("of_session"),
        tables.messages.c.chat_id == bindparam("of_chat"),
        tables.messages.c.ordinal >= bindparam("kept"),
    )
)


def _delete_surplus_messages(connection: Connection, kept: Mapping[Key, int]) -> None:
    """A newer revision may have fewer messages than the one that it replaces."""
    connection.execute(
        _DELETE_SURPLUS,
        [{"of_session": key[0], "of_chat": key[1], "kept": count} for key, count in sorted(kept.items())],
    )


def _delete_unplaced(connection: Connection, chat_ids: Sequence[str]) -> None:
    """A turn whose session became known no longer stands among those without one."""
    for table in (tables.messages, tables.chats):
        connection.execute(
            delete(table).where(
                table.c.session_id == UNPLACED,
                table.c.chat_id == func.any(bindparam("chat_ids", type_=ARRAY(TEXT))),
            ),
            {"chat_ids": list(chat_ids)},
        )
