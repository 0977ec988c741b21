"""Select the list of conversations, newest message first, and the parts of one conversation."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.archive import pieces, search
from archiver.archive.coverage import STATES
from archiver.compliance import erasure
from archiver.compliance.erasure import Target
from archiver.console import filters
from archiver.console.listing import Column, Kind, Listing, Page, Query
from archiver.console.related import Related, select_related
from archiver.console.rendering import conversation_path
from archiver.console.revisions import ReadingChange, Revision, select_readings, select_revisions
from archiver.database import as_json
from archiver.settings.variables import Variable

EXAMINED = 10_000  # conversations examined for one page
EXAMINED_FOR_HOLDS = 500  # each is compared with each hold and with the turns of all
SHOWN_CHARACTERS = 300  # of a first question

MATCHES = 500  # newest messages with the words of a filter
SUGGESTING = 1_000  # newest conversations whose assistants and variables are suggested
SUGGESTED, SUGGESTED_VARIABLES, SUGGESTED_CHARACTERS = 10, 5, 60  # values of a field; text variables; of a value

COLUMNS = (
    Column("session_id", "Conversation", "id"),
    Column("first_question", "First question", is_content=True),
    Column("match", "Match", "snippet", is_content=True, is_sparse=True),
    Column("last_message_at", "Last message", "time"),
    Column("coverage", "Coverage", "state"),
    Column("turns", "Turns", "number"),
    Column("messages", "Messages", "number"),
    Column("repaired_messages", "Recovered", "number"),
    Column("deleted_chats", "Deleted", "number"),
    Column("cost", "Cost", "number"),
    Column("assistant_id", "Assistant", "id"),
    Column("started_at", "Started", "time", is_optional=True),
    Column("reason", "Reason", is_optional=True),
    Column("user_messages", "Of the user", "number", is_optional=True),
    Column("assistant_messages", "Of the assistant", "number", is_optional=True),
    Column("answer_seconds", "Answer, seconds", "number", is_optional=True),
    Column("first_answer", "First answer", is_content=True, is_optional=True),
)

# Applies the filter only to the newest conversations, which an index returns, so that the work is bounded.
_LIST = """
    SELECT s.session_id, left(s.first_question, :characters) AS first_question, s.last_message_at, s.coverage,
           s.turns, s.messages, s.repaired_messages, s.deleted_chats, s.cost, s.assistant_id, s.started_at,
           s.reason, s.user_messages, s.assistant_messages, s.answer_seconds,
           left(s.first_answer, :characters) AS first_answer {columns}
      FROM (
        SELECT * FROM analytics.sessions s
         WHERE (s.last_message_at, s.session_id) < (:at, :id) {narrowed}
         ORDER BY s.last_message_at DESC, s.session_id DESC LIMIT :examined
    ) s {where} ORDER BY s.last_message_at DESC, s.session_id DESC LIMIT :most
"""
_IDS = """
    SELECT s.session_id FROM (
        SELECT * FROM analytics.sessions s
         WHERE (s.last_message_at, s.session_id) < (:at, :id) {narrowed}
         ORDER BY s.last_message_at DESC, s.session_id DESC LIMIT :examined
    ) s {where}
"""
_LAST = """
    SELECT s.last_message_at, s.session_id FROM analytics.sessions s
     WHERE (s.last_message_at, s.session_id) < (:at, :id) {narrowed}
     ORDER BY s.last_message_at DESC, s.session_id DESC OFFSET :examined - 1 LIMIT 1
"""
# Conditions for which there is an index.
_NARROW = ("s.session_id ", "s.last_message_at ")
_IS_FOUND = "s.session_id IN (SELECT json_array_elements_text(:found))"

_NEWEST = datetime(9999, 12, 31, tzinfo=UTC) - timedelta(days=1)


def select_conversations(connection: Connection, query: Query, variables: Sequence[Variable] = ()) -> Page:
    """Return a page of the conversations that match the filter `q`. Raises `FilterError`.

    `variables`: the promoted variables; one without a column is left out.
    """
    present = _present(connection, variables)
    found = filters.parse(query.parameters.get("q", ""), present)
    if found.shows_content and not query.may_read:
        raise filters.FilterError("Your role shows no content, so it cannot search for it.")
    suggestions = _suggest(connection, query, present) if query.suggests else ()
    conditions, values = list(found.conditions), dict(found.values)
    matches, found_in = _select_matches(connection, found) if found.words else (None, "")
    if matches is not None:
        conditions.append(_IS_FOUND)
        values["found"] = as_json(list(matches))
    elif found.words:
        of_words, values_of_words = filters.of_first_question(found.words)
        conditions += of_words
        values |= values_of_words
    at, session_id = _parse_key(query.after)
    examined = EXAMINED_FOR_HOLDS if filters.HELD in found.fields else EXAMINED
    values |= {"at": at, "id": session_id, "examined": examined, "characters": SHOWN_CHARACTERS}
    if filters.HELD in found.fields:
        values[filters.HELD] = as_json(_select_held(connection, conditions, values))
    columns = "".join(f', s."{each.column}"' for each in present)
    page = _select_page(connection, query, {"columns": columns, **_parts(conditions)}, values)
    absent = dict.fromkeys(each.column for each in variables)
    rows = [absent | dict(row) | {"match": (matches or {}).get(row["session_id"])} for row in page.rows]
    return Page(rows, page.after, " ".join(filter(None, (page.note, found_in))), suggestions)


def _parts(conditions: Sequence[str]) -> Mapping[str, str]:
    """Return the conditions by the place in the statements at which they apply."""
    narrowed = [each for each in conditions if each.startswith(_NARROW)]
    others = [each for each in conditions if each not in narrowed]
    return {
        "narrowed": "".join(f"AND {each} " for each in narrowed),
        "where": f"WHERE {' AND '.join(others)}" if others else "",
    }


def _select_held(connection: Connection, conditions: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the ids of the held conversations among those that a page with the other conditions is about."""
    if not erasure.is_any_in_force(connection):
        return []
    others = [each for each in conditions if f":{filters.HELD}" not in each]
    ids = connection.scalars(text(_IDS.format(**_parts(others))), values)
    return [target.session_id for target in erasure.covering(connection, [Target(each) for each in ids])]


def _select_page(connection: Connection, query: Query, sql: Mapping[str, str], values: Mapping[str, Any]) -> Page:
    statement = text(_LIST.format(**sql))
    rows = [dict(row) for row in connection.execute(statement, {**values, "most": query.limit + 1}).mappings()]
    if len(rows) > query.limit:
        shown = rows[: query.limit]
        return Page(shown, _key(shown[-1]))
    if not sql["where"]:
        return Page(rows)
    found_last = connection.execute(text(_LAST.format(**sql)), values).mappings().one_or_none()
    if found_last is None:
        return Page(rows)
    last = dict(found_last)
    return Page(
        rows,
        _key(last),
        f"This page is about the {values['examined']:,} conversations"
        f" up to {last['last_message_at']:%Y-%m-%d %H:%M} UTC.",
    )


_MATCHES = text(
    "SELECT m.session_id, m.snippet FROM analytics.search(:words, most => :most) m WHERE m.session_id <> ''"
)


def _select_matches(connection: Connection, found: filters.Filter) -> tuple[Mapping[str, str] | None, str]:
    """Return the snippet of the newest match by conversation, None if search is off, and what was searched."""
    lag = search.select_lag(connection)
    if lag.language is None:
        return None, "Search is off, so the words were sought in first questions."
    rows = connection.execute(_MATCHES, {"words": found.search, "most": MATCHES}).all()
    notes = (
        [f"The words were sought in the newest {MATCHES:,} messages that contain them."]
        if len(rows) >= MATCHES
        else []
    )
    if lag.since is not None:
        notes.append(f"The search lacks changes since {lag.since:%Y-%m-%d %H:%M} UTC.")
    if lag.has_backlog:
        notes.append("The search lacks earlier conversations, which a worker still indexes.")
    return {row.session_id: row.snippet for row in reversed(rows)}, " ".join(notes)


_VIEW_COLUMNS = text(
    "SELECT attname FROM pg_attribute"
    " WHERE attrelid = CAST('analytics.sessions' AS regclass) AND attnum > 0 AND NOT attisdropped"
)


def _present(connection: Connection, variables: Sequence[Variable]) -> Sequence[Variable]:
    """Return the variables whose column exists: `archiver migrate` adds it."""
    existing = set(connection.scalars(_VIEW_COLUMNS)) if variables else set()
    return [each for each in variables if each.column in existing]


_SUGGEST = """
    WITH newest AS MATERIALIZED (
        SELECT * FROM analytics.sessions s ORDER BY s.last_message_at DESC, s.session_id DESC LIMIT :newest
    )
    {fields}
"""
_SUGGEST_FIELD = """
    (SELECT DISTINCT CAST('{field}' AS text) AS field, CAST("{column}" AS text) AS value FROM newest
      WHERE length("{column}") BETWEEN 1 AND :characters ORDER BY 2 LIMIT :most)
"""


def _suggest(connection: Connection, query: Query, variables: Sequence[Variable]) -> Sequence[str]:
    """Return examples of terms: states, assistants, and, for those who may see them, values of variables."""
    fields = {"assistant": "assistant_id"}
    if query.may_read:
        texts = [each for each in variables if each.type == "text"][:SUGGESTED_VARIABLES]
        fields |= {each.column: each.column for each in texts}
    parts = (_SUGGEST_FIELD.format(field=field, column=column) for field, column in fields.items())
    values = {"newest": SUGGESTING, "most": SUGGESTED, "characters": SUGGESTED_CHARACTERS}
    rows = connection.execute(text(_SUGGEST.format(fields=" UNION ALL ".join(parts))), values)
    states = [f"coverage:{state}" for state in STATES]
    return [*states, "deleted:yes", "repaired:yes", *(filters.term(row.field, row.value) for row in rows)]


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['last_message_at'].astimezone(UTC).isoformat()} {row['session_id']}"


def _parse_key(key: str) -> tuple[datetime, str]:
    at, _, session_id = key.partition(" ")
    try:
        return (datetime.fromisoformat(at), session_id) if key else (_NEWEST, "")
    except ValueError:
        raise filters.FilterError("The address of this page is incomplete. Begin at the first page.") from None


_KINDS: Mapping[str, Kind] = {"number": "number", "time": "time"}


def listing_of(variables: Sequence[Variable]) -> Listing:
    """Return the list of conversations, with the promoted variables as columns that a user may choose."""
    return Listing(
        path="conversations",
        title="Conversations",
        permission="figures",
        columns=(
            *COLUMNS,
            *(
                Column(each.column, each.name, _KINDS.get(each.type, "text"), is_content=True, is_optional=True)
                for each in variables
            ),
        ),
        select=partial(select_conversations, variables=variables),
        link=lambda row: conversation_path(row["session_id"]),
        parameters=("q",),
        parse=partial(filters.parse, variables=variables),
        examples=[each.example for each in filters.qualifiers_of(variables).values()],
        empty="No conversation matches. A worker adds each conversation a moment after its first event.",
    )


CONVERSATIONS = listing_of(())

MESSAGES = 100  # of a page of a transcript
MESSAGE_CHARACTERS = 20_000  # shown of a message; its events have all
EVENTS = 200  # of a conversation, shown beside it


class Conversation(msgspec.Struct, frozen=True):
    """A conversation: its row, a page of its messages, its newest ledger events, and the range of sealed ids.

    `revisions`, `readings`: what changed; `related`: holds, erasures and follow-ups.
    """

    session: RowMapping
    messages: Sequence[RowMapping]
    events: Sequence[RowMapping]
    sealed_through: int
    revisions: Sequence[Revision]
    readings: Sequence[ReadingChange]
    related: Related
    after: int | None  # position of the last message, if there are more


_SESSION = text(
    """
    SELECT s.*, c.reason, c.first_event_at FROM analytics.conversations s
      JOIN analytics.coverage c ON c.session_id = s.session_id WHERE s.session_id = :id
    """
)
_MESSAGES = text(
    """
    SELECT m.position, m.turn_id, m.chat_id, m.ordinal, m.role, m.content_kind,
           left(m.content, :characters) AS content, length(m.content) AS characters,
           left(m.history_content, :characters) AS history_content, m.began_at, m.began_is_told, m.source,
           m.deleted_at, m.in_history
      FROM analytics.messages m WHERE m.session_id = :id AND m.position > :after ORDER BY m.position LIMIT :most
    """
)
_EVENTS = text(
    """
    SELECT e.id, e.type, e.source, e.chat_id, e.received_at, e.delivery_count,
           e.body IS NULL AND e.frame IS NULL AS is_erased
      FROM archiver.events e WHERE e.session_id = :id ORDER BY e.id DESC LIMIT :most
    """
)
_SEALED = text("SELECT coalesce(max(events_through), 0) FROM archiver.seals")


def select_conversation(connection: Connection, session_id: str, after: int = 0) -> Conversation | None:
    """Return a conversation with its messages after this position; None if there is none with this id."""
    session = connection.execute(_SESSION, {"id": session_id}).mappings().one_or_none()
    if session is None:
        return None
    values = {"id": session_id, "after": after, "most": MESSAGES + 1, "characters": MESSAGE_CHARACTERS}
    messages = connection.execute(_MESSAGES, values).mappings().all()
    shown = messages[:MESSAGES]
    return Conversation(
        session,
        shown,
        connection.execute(_EVENTS, {"id": session_id, "most": EVENTS}).mappings().all(),
        connection.scalar(_SEALED) or 0,
        select_revisions(connection, session_id),
        select_readings(connection, session_id),
        select_related(connection, session_id),
        shown[-1]["position"] if len(messages) > MESSAGES else None,
    )


_EVENT = text(
    """
    SELECT e.id, e.type, e.source, e.session_id, e.chat_id, e.received_at, e.last_received_at, e.delivery_count,
           e.key_id, e.body, e.frame, e.runs
      FROM archiver.events e WHERE e.id = :id
    """
)


class LedgerEvent(msgspec.Struct, frozen=True):
    """A row of the ledger. `body`: its exact bytes; None once erased, or if a part of them is missing."""

    row: RowMapping
    body: bytes | None

    @property
    def is_erased(self) -> bool:
        """Return whether its content was erased."""
        return self.row["body"] is None and self.row["frame"] is None


def select_event(connection: Connection, event_id: int) -> LedgerEvent | None:
    """Return an event of the ledger; None if there is none with this id."""
    row = connection.execute(_EVENT, {"id": event_id}).mappings().one_or_none()
    if row is None:
        return None
    if row["frame"] is None:
        return LedgerEvent(row, None if row["body"] is None else bytes(row["body"]))
    contents = pieces.select_contents(connection, [row["session_id"]])
    assembler = pieces.ResponseAssembler(contents.get(row["session_id"], {}))
    try:
        return LedgerEvent(row, b"".join(assembler.parts([bytes(each) for each in row["frame"]], row["runs"])))
    except LookupError:
        return LedgerEvent(row, None)
