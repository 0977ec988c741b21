"""Ledger, archive, and what proves and guards them.

All of a session lives together: ledger, sessions, chats and messages carry `session_id`, never updated, in every
primary key, so that the schema can be distributed by it unchanged.
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
    Column(
        "session_id", Text, nullable=False, comment="Session it belongs to; empty where the delivery does not tell."
    ),
    Column("dedupe_key", LargeBinary, nullable=False, comment=DEDUPE_KEY),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with arrival; gaps are normal."),
    Column("type", Text, nullable=False, comment="Event type as told, such as chat.created; or ours, by source."),
    Column("source", Text, nullable=False, comment="Whence it came: webhook, history or application."),
    Column("chat_id", Text, comment="Turn it speaks of; null for events without one."),
    Column("received_at", Time, nullable=False, comment="When its first delivery reached us."),
    Column("last_received_at", Time, nullable=False, comment="When its latest delivery reached us."),
    Column("delivery_count", Integer, nullable=False, comment="Deliveries of this same fact, the first included."),
    Column("occurred_at", Time, comment="Time that its first delivery told in the envelope."),
    Column("key_id", Text, comment="Which webhook secret matched its first delivery; none where unsigned."),
    Column("body", LargeBinary, comment=BODY),
    Column("salt", LargeBinary, comment="Random bytes that body_digest is salted with; null once erased."),
    Column("body_digest", LargeBinary, nullable=False, comment="SHA-256 over salt and body."),
    Column("earliest_at", Time, comment="Earlier time that a later delivery told; null if none did."),
    Column(
        "is_recounted",
        Boolean,
        nullable=False,
        server_default="false",
        comment="It was delivered again since its counters were last sealed.",
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
    comment="The ledger: each distinct fact once, byte for byte. Everything else is derived from it.",
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
    Column(
        "session_id", Text, nullable=False, comment="CallHQ's session id; empty: turns whose session is not known."
    ),
    Column("first_event_at", Time, nullable=False, comment="When we first heard of it."),
    Column("last_event_at", Time, nullable=False, comment="When we last heard something new of it."),
    Column("coverage", Text, nullable=False, server_default="open", comment="What is known of its completeness."),
    Column("reason", Text, nullable=False, server_default="awaiting_history", comment="Code of why it is so."),
    Column("reconciled_at", Time, comment="Start of the latest reading that told its messages; null if none did."),
    Column("read_at", Time, comment="Start of the latest reading, whatever it told; null if there was none."),
    Column(
        "repaired_messages", Integer, nullable=False, server_default="0", comment="Messages that history supplied."
    ),
    Column("name", Text, comment="Name, as history or the application told it."),
    Column("status", Text, comment="Upstream status, as history told it."),
    Column("assistant_id", Text, comment="Assistant, as history or the application told it."),
    Column("created_at", Time, comment="Upstream creation, as history or the application told it."),
    Column("read_by", Time, comment="A last reading is due by then, before upstream forgets the session."),
    Column("reconcile_at", Time, comment="When its history is to be read next; null: never again."),
    Column("leased_until", Time, comment="A worker reads it at present; free again after this time."),
    Column("failing_since", Time, comment="Since then every reading has failed; null if the latest did not."),
    Column("places", Integer, comment="Messages of its transcript, if its history was read; else null."),
    Column(
        "append_after",
        Time,
        comment="A new turn that begins after this is appended to the transcript; null: all is aligned again.",
    ),
    PrimaryKeyConstraint("session_id", name="sessions_pkey"),
    Index("sessions_reconcile_at_idx", "reconcile_at", postgresql_where=text("reconcile_at IS NOT NULL")),
    Index("sessions_open_idx", "first_event_at", postgresql_where=text("coverage = 'open'")),
    Index(
        "sessions_unknown_idx",
        "first_event_at",
        postgresql_where=text("reason = 'history_gone' OR coverage = 'lost'"),
    ),
    comment="One row a conversation, derived from the ledger.",
)

chats = Table(
    "chats",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation; empty where no delivery told it."),
    Column(
        "chat_id",
        Text,
        nullable=False,
        comment="CallHQ's chat id: one turn; U+001F and a number: only history knows.",
    ),
    Column("assistant_id", Text, comment="Assistant that answered."),
    Column("external_id", Text, comment="CallHQ's externalChatId."),
    Column("status", Text, comment="Upstream status of the turn."),
    Column("cost", Numeric, comment="What the turn cost, as told upstream."),
    Column("variables", JSONB(none_as_null=True), comment="variableValues of the turn."),
    Column("created_at", Time, comment="Upstream creation time; null if not told."),
    Column("updated_at", Time, comment="Upstream time of the newest revision; null if not told."),
    Column(
        "occurred_at", Time, comment="Earliest time that any of its deliveries told; orders turns of one instant."
    ),
    Column("first_received_at", Time, nullable=False, comment="When we first heard of it."),
    Column("session_name", Text, comment="Name of the session, where its deliveries told it."),
    Column("session_status", Text, comment="Status of the session, where its deliveries told it."),
    Column("deleted_at", Time, comment="Tombstone: when upstream deleted it; content stays."),
    Column("source", Text, nullable=False, comment="Whence it is known: webhook or history."),
    PrimaryKeyConstraint("session_id", "chat_id", name="chats_pkey"),
    ForeignKeyConstraint(["session_id"], [sessions.c.session_id], name="chats_session_id_fkey"),
    Index("chats_chat_id_idx", "chat_id"),
    Index("chats_deleted_at_idx", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    comment="One row a turn: its newest revision, derived from the ledger.",
)

messages = Table(
    "messages",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation."),
    Column("chat_id", Text, nullable=False, comment="Turn; U+001F alone: said before any turn, such as a greeting."),
    Column("ordinal", Integer, nullable=False, comment="0, 1, 2 … within the turn: input first, then output."),
    Column("role", Text, nullable=False, comment="user, assistant, system, tool …"),
    Column("content", Text, nullable=False, comment="Text; U+0000 and lone surrogates became U+FFFD."),
    Column("source", Text, nullable=False, comment="Whence it is known: webhook or history."),
    Column("place", Integer, comment="1, 2, 3 … in true order, once history has been read; null before."),
    Column("in_history", Boolean, comment="Whether the latest reading shows it; null where none could."),
    Column(
        "content_kind",
        Text,
        nullable=False,
        server_default="text",
        comment="What content is: text, refusal, tool_call or other; the last two are no text.",
    ),
    Column(
        "history_content",
        Text,
        comment="Text of the history where it differs from content; null where it does not, or no history shows the"
        " message.",
    ),
    PrimaryKeyConstraint("session_id", "chat_id", "ordinal", name="messages_pkey"),
    Index("messages_history_idx", "session_id", postgresql_where=text("source = 'history'")),
    # No foreign key: one write path makes both rows in one transaction; checking took a fifth of Postgres's time.
    comment="One row a message, derived from the ledger.",
)

quarantine = Table(
    "quarantine",
    metadata,
    Column(
        "id", BigInteger, Identity(always=True), nullable=False, comment="For archiver quarantine show and retry."
    ),
    Column("received_at", Time, nullable=False, comment="When its first delivery reached us."),
    Column("last_received_at", Time, nullable=False, comment="When its latest delivery reached us."),
    Column("delivery_count", Integer, nullable=False, comment="Deliveries of these same bytes."),
    Column("reason", Text, nullable=False, comment="Stable code of why it was not archived."),
    Column("detail", Text, nullable=False, comment="The reason as a sentence, without content."),
    Column("key_id", Text, comment="Which webhook secret matched."),
    Column("body", LargeBinary, nullable=False, comment="The exact bytes."),
    Column(
        "body_digest",
        LargeBinary,
        nullable=False,
        comment="SHA-256 of what it is told apart by: the bytes, and of a fact of ours whose it is.",
    ),
    Column(
        "source",
        Text,
        nullable=False,
        server_default="webhook",
        comment="Whence it came: webhook, history or application.",
    ),
    Column("type", Text, comment="Kind of a fact of ours, such as history.read; null for a webhook."),
    Column("session_id", Text, comment="Session of a fact of ours; null for a webhook."),
    Column("dedupe_key", LargeBinary, comment="Key in the ledger of a fact of ours; null for a webhook."),
    PrimaryKeyConstraint("id", name="quarantine_pkey"),
    UniqueConstraint("body_digest", name="quarantine_body_digest_key"),
    comment="Authenticated deliveries that could not be archived, with the reason.",
)

pauses = Table(
    "pauses",
    metadata,
    Column("name", Text, nullable=False, comment="What pauses: callhq."),
    Column("until", Time, nullable=False, comment="Nobody calls before."),
    Column("reason", Text, nullable=False, comment="What was answered."),
    PrimaryKeyConstraint("name", name="pauses_pkey"),
    comment="A pause that every worker obeys.",
)

backfills = Table(
    "backfills",
    metadata,
    Column("selection", Text, nullable=False, comment="Digest of what was asked for."),
    Column("started_at", Time, nullable=False, comment="Sessions read since then need not be read again."),
    PrimaryKeyConstraint("selection", name="backfills_pkey"),
    comment="Backfills that have begun and not ended, so that they can go on.",
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
    comment="What the counters of an event stood at when they were sealed; append-only.",
)

_USER = "Database user that added the row (session_user of Postgres); null in rows of older versions."
_WHEN = "When Postgres added the row; null in rows of older versions."

acts = Table(
    "acts",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column("at", Time, nullable=False, comment="When it was done, by the clock of Postgres."),
    Column("actor", Text, nullable=False, comment="Who did it: a user of the operating system, or a part of ours."),
    Column("kind", Text, nullable=False, comment="What was done, such as erase or hold.add."),
    Column("reason", Text, comment="Why, as the actor said."),
    Column("detail", JSONB(none_as_null=True), nullable=False, comment="To what, and with which result; no content."),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("id", name="acts_pkey"),
    Index("acts_holds_idx", "id", postgresql_where=text("kind IN ('hold.add', 'hold.release')")),
    comment="The audit trail of administrative acts; append-only and sealed.",
)

erasures = Table(
    "erasures",
    metadata,
    Column("session_id", Text, nullable=False, comment="Session; empty for facts that do not tell theirs."),
    Column("chat_id", Text, nullable=False, comment="Turn; empty: the whole session."),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column("erased_at", Time, nullable=False, comment="When it was ordered; the content goes right after."),
    Column("rule", Text, nullable=False, comment="Under which rule: request, chat.deleted or retention."),
    Column("act_id", BigInteger, nullable=False, comment="The act that tells who and why."),
    Column("recorded_at", Time, comment=_WHEN),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("session_id", "chat_id", name="erasures_pkey"),
    Index("erasures_id_idx", "id"),
    comment="What was erased and does not come back: no content, and none is taken for it; append-only.",
)

removals = Table(
    "removals",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column(
        "event_id", BigInteger, nullable=False, comment="Event whose row was removed; its leaf stays in its seal."
    ),
    Column("act_id", BigInteger, nullable=False, comment="The act that tells by which rule."),
    Column("recorded_at", Time, comment=_WHEN),
    Column(
        "session_id",
        Text,
        comment="Session of the event, empty where it names none; null in rows of older versions.",
    ),
    Column("database_user", Text, comment=_USER),
    PrimaryKeyConstraint("id", name="removals_pkey"),
    UniqueConstraint("event_id", name="removals_event_id_key"),
    comment="Ledger rows that retention removed, metadata and all; append-only.",
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
    comment="Legal holds: what one in force covers is neither erased nor expired.",
)

seals = Table(
    "seals",
    metadata,
    Column("id", BigInteger, autoincrement=False, nullable=False, comment="1, 2, 3 … without gaps."),
    Column("sealed_at", Time, nullable=False, comment="When it was made."),
    Column("events_through", BigInteger, nullable=False, comment="Events up to this id are sealed, here or before."),
    Column("recounts_through", BigInteger, nullable=False, comment="Likewise of recounts."),
    Column("acts_through", BigInteger, nullable=False, comment="Likewise of acts."),
    Column("erasures_through", BigInteger, nullable=False, comment="Likewise of erasures."),
    Column("removals_through", BigInteger, nullable=False, comment="Likewise of removals."),
    Column("entries", LargeBinary, nullable=False, comment="41 bytes a leaf: kind, id as 8 bytes, leaf hash."),
    Column("root", LargeBinary, nullable=False, comment="Root of the Merkle tree (RFC 6962) over the leaf hashes."),
    Column("previous", LargeBinary, nullable=False, comment="Hash of the seal before; zeros at the first."),
    Column("hash", LargeBinary, nullable=False, comment="SHA-256 of the statement that docs/seals.md describes."),
    Column("key_id", Text, comment="Which key signed; null: unsigned."),
    Column("signature", LargeBinary, comment="Ed25519 over the statement; null: unsigned."),
    PrimaryKeyConstraint("id", name="seals_pkey"),
    comment="The chain of seals: each proves what the ledger held, and that nothing before it was changed.",
)
