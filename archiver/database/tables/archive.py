"""The tables of the ledger and the archive, and of the records that prove and protect them.

All rows of a session can be stored together: ledger, sessions, chats and messages have `session_id`, which is never
updated, in every primary key, so that the tables can be distributed by this column without a change of the schema.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

SCHEMA = "archiver"

metadata = MetaData(schema=SCHEMA)

Time = DateTime(timezone=True)

DEDUPE_KEY = "SHA-256 over event type, chat id and canonical chat; once erased SHA-256 over the salt and that."

BODY = "The exact bytes of the first delivery; null once erased, and where frame and runs are in their place."

events = Table(
    "events",
    metadata,
    Column("session_id", Text, nullable=False, comment="Session; empty if the delivery names none."),
    Column("dedupe_key", LargeBinary, nullable=False, comment=DEDUPE_KEY),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with arrival; gaps are normal."),
    Column(
        "type",
        Text,
        nullable=False,
        comment="Event type as received, such as chat.created; for other sources a type of the archiver.",
    ),
    Column("source", Text, nullable=False, comment="Source: webhook, history or application."),
    Column("chat_id", Text, comment="Turn (chat id); null for events without one."),
    Column("received_at", Time, nullable=False, comment="Time of arrival of the first delivery."),
    Column("last_received_at", Time, nullable=False, comment="Time of arrival of the latest delivery."),
    Column(
        "delivery_count", Integer, nullable=False, comment="Number of deliveries of this fact, including the first."
    ),
    Column("occurred_at", Time, comment="Envelope time of the first delivery."),
    Column(
        "key_id", Text, comment="Key id of the webhook secret that verified the first delivery; none if unsigned."
    ),
    Column("body", LargeBinary, comment=BODY),
    Column("salt", LargeBinary, comment="Random bytes that body_digest is salted with; null once erased."),
    Column("body_digest", LargeBinary, nullable=False, comment="SHA-256 over salt and body."),
    Column("earliest_at", Time, comment="Earlier envelope time of a later delivery; null if none."),
    Column(
        "is_recounted",
        Boolean,
        nullable=False,
        server_default="false",
        comment="Whether it was redelivered after its counters were last sealed.",
    ),
    Column(
        "frame",
        ARRAY(LargeBinary),
        comment="Of a history response in pieces: its bytes before the messages, between two of them, after them.",
    ),
    Column(
        "runs",
        ARRAY(Integer),
        comment="Of a history response in pieces: first and last number of each run of pieces that it is made of.",
    ),
    PrimaryKeyConstraint("session_id", "dedupe_key", name="events_pkey"),
    CheckConstraint("delivery_count > 0", name="events_delivery_count_positive"),
    Index("events_id_idx", "id"),
    Index("events_session_id_chat_id_idx", "session_id", "chat_id"),
    Index("events_recounted_idx", "id", postgresql_where=text("is_recounted")),
    comment="The ledger: each distinct fact once, byte for byte. All other archive tables are derived from it.",
)

pieces = Table(
    "pieces",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation."),
    Column("number", Integer, nullable=False, comment="1, 2, 3 … within the session."),
    Column("digest", LargeBinary, nullable=False, comment="First 16 bytes of the SHA-256 of the content."),
    Column("content", LargeBinary, nullable=False, comment="A message as a history response has it, byte for byte."),
    PrimaryKeyConstraint("session_id", "number", name="pieces_pkey"),
    comment="The messages of history responses that the ledger holds in pieces, each once for its session.",
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, nullable=False, comment="CallHQ's session id; empty for unassigned turns."),
    Column("first_event_at", Time, nullable=False, comment="Arrival of the first event of the session."),
    Column("last_event_at", Time, nullable=False, comment="Arrival of the latest new fact of the session."),
    Column(
        "coverage",
        Text,
        nullable=False,
        server_default="open",
        comment="State of completeness, as in analytics.coverage.",
    ),
    Column(
        "reason",
        Text,
        nullable=False,
        server_default="awaiting_history",
        comment="Code of the reason for that state.",
    ),
    Column("reconciled_at", Time, comment="Start of the latest reading that returned messages; null if none."),
    Column("read_at", Time, comment="Start of the latest reading with any result; null if none."),
    Column(
        "repaired_messages",
        Integer,
        nullable=False,
        server_default="0",
        comment="Number of messages recovered from history.",
    ),
    Column("name", Text, comment="Name, from history or the application."),
    Column("status", Text, comment="Upstream status, from history."),
    Column("assistant_id", Text, comment="Assistant, from history or the application."),
    Column("created_at", Time, comment="Upstream creation time, from history or the application."),
    Column("read_by", Time, comment="Deadline of the last reading, before the session expires upstream."),
    Column("reconcile_at", Time, comment="When its history is due; null: not again."),
    Column("leased_until", Time, comment="End of the lease of the worker that reads it."),
    Column(
        "failing_since", Time, comment="Start of the current series of failed readings; null if the latest succeeded."
    ),
    Column("places", Integer, comment="Number of messages in its transcript; null if its history was never read."),
    Column(
        "append_after",
        Time,
        comment="A new turn that begins after this time is appended; null: the whole session is aligned again.",
    ),
    PrimaryKeyConstraint("session_id", name="sessions_pkey"),
    Index("sessions_reconcile_at_idx", "reconcile_at", postgresql_where=text("reconcile_at IS NOT NULL")),
    Index("sessions_first_event_at_idx", "first_event_at"),
    Index(  # of `analytics.complete_through()`
        "sessions_incomplete_idx",
        text("coalesce(reconciled_at, first_event_at)"),
        postgresql_where=text(
            "session_id <> '' AND (coverage = 'open' OR reconcile_at IS NOT NULL)"
            " AND NOT (reason = 'history_gone' OR coverage = 'lost')"
        ),
    ),
    Index(
        "sessions_unknown_idx",
        "first_event_at",
        postgresql_where=text(
            "reason = 'history_gone' OR coverage = 'lost'"
            " OR reason IN ('history_unavailable', 'history_unreadable') AND reconcile_at IS NULL"
        ),
    ),
    comment="One row per conversation, derived from the ledger.",
)

chats = Table(
    "chats",
    metadata,
    Column("session_id", Text, nullable=False, comment="Session; empty for an unassigned turn."),
    Column(
        "chat_id",
        Text,
        nullable=False,
        comment="CallHQ's chat id; U+001F and a number: known only from history; U+001F: lines before any turn.",
    ),
    Column("assistant_id", Text, comment="Assistant that answered."),
    Column("external_id", Text, comment="CallHQ's externalChatId."),
    Column("status", Text, comment="Upstream status of the turn."),
    Column("cost", Numeric, comment="Cost of the turn, as reported upstream."),
    Column("variables", JSONB(none_as_null=True), comment="variableValues of the turn."),
    Column("created_at", Time, comment="Upstream creation time; null if not reported."),
    Column("updated_at", Time, comment="Upstream time of the newest revision; null if not reported."),
    Column(
        "occurred_at",
        Time,
        comment="Earliest envelope time of its deliveries; orders turns with equal creation times.",
    ),
    Column("first_received_at", Time, nullable=False, comment="Arrival of its first delivery."),
    Column("session_name", Text, comment="Name of the session, from its deliveries."),
    Column("session_status", Text, comment="Status of the session, from its deliveries."),
    Column(
        "deleted_at",
        Time,
        comment="Tombstone: when upstream deleted it; content stays, unless ARCHIVER_ON_DELETE=erase.",
    ),
    Column("source", Text, nullable=False, comment="Source: webhook or history."),
    Column(
        "began_at",
        Time,
        comment="Estimated start of a turn known only from history, between its neighbours; null for other turns.",
    ),
    Column(
        "answered_at",
        Time,
        comment="Upstream time of its first revision with an answer; null if not reported, and in rows of older"
        " versions.",
    ),
    PrimaryKeyConstraint("session_id", "chat_id", name="chats_pkey"),
    ForeignKeyConstraint(["session_id"], [sessions.c.session_id], name="chats_session_id_fkey"),
    Index("chats_chat_id_idx", "chat_id"),
    # Of began_at and turn_id in `analytics.chats` and `analytics.lines`. Postgres has no statistics of an expression
    # in a partial index.
    Index("chats_began_at_idx", text("coalesce(began_at, created_at, occurred_at, first_received_at)")),
    Index(
        "chats_history_turn_id_idx",
        text("((session_id || '#'::text) || COALESCE(NULLIF(substr(chat_id, 2), ''::text), '0'::text))"),
        postgresql_where=text("source = 'history'"),
    ),
    Index("chats_updated_at_idx", "updated_at", postgresql_where=text("updated_at IS NOT NULL")),
    Index("chats_deleted_at_idx", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    comment="One row per turn: its newest revision, derived from the ledger.",
)

messages = Table(
    "messages",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation."),
    Column("chat_id", Text, nullable=False, comment="Turn; U+001F alone: said before any turn, such as a greeting."),
    Column("ordinal", Integer, nullable=False, comment="0, 1, 2 … within the turn: input first, then output."),
    Column("role", Text, nullable=False, comment="user, assistant, system, tool …"),
    Column("content", Text, nullable=False, comment="Text; U+0000 and lone surrogates became U+FFFD."),
    Column("source", Text, nullable=False, comment="Source: webhook or history."),
    Column("place", Integer, comment="Position in the transcript: 1, 2, 3 …; null until history was read."),
    Column("in_history", Boolean, comment="Whether the latest reading shows it; null if no reading could show it."),
    Column(
        "content_kind",
        Text,
        nullable=False,
        server_default="text",
        comment="Kind of content: text, refusal, tool_call or other; the last two are not text.",
    ),
    Column(
        "history_content",
        Text,
        comment="Text of the history where it differs from content; null where it does not, or no history shows the"
        " message.",
    ),
    PrimaryKeyConstraint("session_id", "chat_id", "ordinal", name="messages_pkey"),
    Index("messages_history_idx", "session_id", postgresql_where=text("source = 'history'")),
    # No foreign key: one write path inserts both rows in one transaction, and the check took a fifth of Postgres's
    # time.
    comment="One row per message, derived from the ledger.",
)

quarantine = Table(
    "quarantine",
    metadata,
    Column(
        "id", BigInteger, Identity(always=True), nullable=False, comment="For archiver quarantine show and retry."
    ),
    Column("received_at", Time, nullable=False, comment="Arrival of the first delivery."),
    Column("last_received_at", Time, nullable=False, comment="Arrival of the latest delivery."),
    Column("delivery_count", Integer, nullable=False, comment="Number of deliveries of these bytes."),
    Column("reason", Text, nullable=False, comment="Stable code of the reason."),
    Column("detail", Text, nullable=False, comment="The reason as a sentence, without content."),
    Column("key_id", Text, comment="Key id of the webhook secret that verified it."),
    Column("body", LargeBinary, nullable=False, comment="The exact bytes."),
    Column(
        "body_digest",
        LargeBinary,
        nullable=False,
        comment="SHA-256 that identifies it: over the bytes, or over session and dedupe key of an internal fact.",
    ),
    Column(
        "source",
        Text,
        nullable=False,
        server_default="webhook",
        comment="Source: webhook, history or application.",
    ),
    Column("type", Text, comment="Type of an internal fact, such as history.read; null for a webhook."),
    Column("session_id", Text, comment="Session of an internal fact; null for a webhook."),
    Column("dedupe_key", LargeBinary, comment="Dedupe key of an internal fact; null for a webhook."),
    PrimaryKeyConstraint("id", name="quarantine_pkey"),
    UniqueConstraint("body_digest", name="quarantine_body_digest_key"),
    comment="Authenticated deliveries that could not be archived, with the reason.",
)

pauses = Table(
    "pauses",
    metadata,
    Column("name", Text, nullable=False, comment="What pauses: callhq."),
    Column("until", Time, nullable=False, comment="End of the pause: no calls before this time."),
    Column("reason", Text, nullable=False, comment="Response that requested the pause."),
    PrimaryKeyConstraint("name", name="pauses_pkey"),
    comment="A pause that all workers observe.",
)

backfills = Table(
    "backfills",
    metadata,
    Column("selection", Text, nullable=False, comment="Digest of the selection."),
    Column("started_at", Time, nullable=False, comment="Start; sessions read since then are not read again."),
    PrimaryKeyConstraint("selection", name="backfills_pkey"),
    comment="Unfinished backfills, so that they can resume.",
)

recounts = Table(
    "recounts",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with sealing."),
    Column("event_id", BigInteger, nullable=False, comment="Event that was delivered again."),
    Column("delivery_count", Integer, nullable=False, comment="Its deliveries when this was sealed."),
    Column("last_received_at", Time, nullable=False, comment="Its latest delivery when this was sealed."),
    Column("earliest_at", Time, comment="Its earliest_at when this was sealed."),
    PrimaryKeyConstraint("id", name="recounts_pkey"),
    Index("recounts_event_id_idx", "event_id", "id"),
    comment="Counters of an event when they were sealed; append-only.",
)

_USER = "Database user that added the row (session_user of Postgres); null in rows of older versions."
_WHEN = "When Postgres added the row; null in rows of older versions."

acts = Table(
    "acts",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column("at", Time, nullable=False, comment="When it was done, by the clock of Postgres."),
    Column("actor", Text, nullable=False, comment="User of the operating system, or the archiver itself."),
    Column("kind", Text, nullable=False, comment="Action, such as erase or hold.add."),
    Column("reason", Text, comment="Reason, as given by the actor."),
    Column(
        "detail", JSONB(none_as_null=True), nullable=False, comment="Targets and result of the action; no content."
    ),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("id", name="acts_pkey"),
    Index("acts_holds_idx", "id", postgresql_where=text("kind IN ('hold.add', 'hold.release')")),
    comment="The audit log of administrative actions; append-only and sealed.",
)

erasures = Table(
    "erasures",
    metadata,
    Column("session_id", Text, nullable=False, comment="Session; empty for unassigned facts."),
    Column("chat_id", Text, nullable=False, comment="Turn (chat id); empty for the whole session."),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column("erased_at", Time, nullable=False, comment="When it was ordered; the content is deleted right after."),
    Column("rule", Text, nullable=False, comment="Under which rule: request, chat.deleted or retention."),
    Column("act_id", BigInteger, nullable=False, comment="Audit log entry with actor and reason."),
    Column("recorded_at", Time, comment=_WHEN),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("session_id", "chat_id", name="erasures_pkey"),
    Index("erasures_id_idx", "id"),
    comment="Erased sessions and turns, without content; later deliveries for them are refused; append-only.",
)

removals = Table(
    "removals",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column(
        "event_id", BigInteger, nullable=False, comment="Event whose row was removed; its leaf stays in its seal."
    ),
    Column("act_id", BigInteger, nullable=False, comment="Audit log entry of the retention run."),
    Column("recorded_at", Time, comment=_WHEN),
    Column(
        "session_id",
        Text,
        comment="Session of the event, empty where it names none; null in rows of older versions.",
    ),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("id", name="removals_pkey"),
    UniqueConstraint("event_id", name="removals_event_id_key"),
    comment="Ledger rows that retention deleted, metadata included; append-only.",
)

holds = Table(
    "holds",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="For archiver hold release."),
    Column("placed_at", Time, nullable=False, comment="When it was placed."),
    Column("author", Text, nullable=False, comment="Who placed it."),
    Column("reason", Text, nullable=False, comment="Why."),
    Column("session_id", Text, comment="Holds this session; null: any."),
    Column("assistant_id", Text, comment="Holds sessions of this assistant; null: any."),
    Column("variable", Text, comment="Holds sessions with this variable at this value; null: any."),
    Column("value", Text, comment="Value of the variable; null once released."),
    Column("since", Time, comment="Holds sessions with a turn at or after this time; null: any."),
    Column("until", Time, comment="Holds sessions with a turn before this time; null: any."),
    Column("released_at", Time, comment="When it was released; null: in force."),
    Column("released_by", Text, comment="Who released it."),
    Column(
        "salt",
        LargeBinary,
        comment="Random bytes that the audit log's digest of the value is salted with; null once released.",
    ),
    PrimaryKeyConstraint("id", name="holds_pkey"),
    comment="Legal holds: a hold in force blocks erasure and expiry of what it covers.",
)

seals = Table(
    "seals",
    metadata,
    Column("id", BigInteger, autoincrement=False, nullable=False, comment="1, 2, 3 … without gaps."),
    Column("sealed_at", Time, nullable=False, comment="When it was made."),
    Column(
        "events_through",
        BigInteger,
        nullable=False,
        comment="Events up to this id are sealed, by this or an earlier seal.",
    ),
    Column("recounts_through", BigInteger, nullable=False, comment="The same for recounts."),
    Column("acts_through", BigInteger, nullable=False, comment="The same for acts."),
    Column("erasures_through", BigInteger, nullable=False, comment="The same for erasures."),
    Column("removals_through", BigInteger, nullable=False, comment="The same for removals."),
    Column("entries", LargeBinary, nullable=False, comment="41 bytes a leaf: kind, id as 8 bytes, leaf hash."),
    Column("root", LargeBinary, nullable=False, comment="Root of the Merkle tree (RFC 6962) over the leaf hashes."),
    Column("previous", LargeBinary, nullable=False, comment="Hash of the previous seal; zeros for the first."),
    Column("hash", LargeBinary, nullable=False, comment="SHA-256 of the statement that docs/seals.md describes."),
    Column("key_id", Text, comment="Which key signed; null: unsigned."),
    Column("signature", LargeBinary, comment="Ed25519 over the statement; null: unsigned."),
    PrimaryKeyConstraint("id", name="seals_pkey"),
    comment="The chain of seals: each proves the content of the ledger and of the previous seal.",
)
