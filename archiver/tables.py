"""The tables, as SQLAlchemy Core and as Alembic's target. No statement and no logic.

All of a session lives together: ledger, sessions, chats and messages carry `session_id`, never updated, in every
primary key, so that the schema can be distributed by it unchanged.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
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
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB

SCHEMA = "archiver"

metadata = MetaData(schema=SCHEMA)

Time = DateTime(timezone=True)

DEDUPE_KEY = "SHA-256 over event type, chat id and canonical chat; once erased SHA-256 over the salt and that."

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
    Column("body", LargeBinary, comment="The exact bytes of the first delivery; null once erased."),
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
    PrimaryKeyConstraint("session_id", "dedupe_key", name="events_pkey"),
    CheckConstraint("delivery_count > 0", name="events_delivery_count_positive"),
    Index("events_id_idx", "id"),
    Index("events_session_id_chat_id_idx", "session_id", "chat_id"),
    Index("events_recounted_idx", "id", postgresql_where=text("is_recounted")),
    comment="The ledger: each distinct fact once, byte for byte. Everything else is derived from it.",
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
    PrimaryKeyConstraint("session_id", name="sessions_pkey"),
    Index("sessions_reconcile_at_idx", "reconcile_at", postgresql_where=text("reconcile_at IS NOT NULL")),
    Index("sessions_open_idx", "first_event_at", postgresql_where=text("coverage = 'open'")),
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
    PrimaryKeyConstraint("session_id", "chat_id", "ordinal", name="messages_pkey"),
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

acts = Table(
    "acts",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Grows with time."),
    Column("at", Time, nullable=False, comment="When it was done."),
    Column("actor", Text, nullable=False, comment="Who did it: a user of the operating system, or a part of ours."),
    Column("kind", Text, nullable=False, comment="What was done, such as erase or hold.add."),
    Column("reason", Text, comment="Why, as the actor said."),
    Column("detail", JSONB(none_as_null=True), nullable=False, comment="To what, and with which result; no content."),
    PrimaryKeyConstraint("id", name="acts_pkey"),
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
    Column("value", Text, comment="Value of the variable."),
    Column("since", Time, comment="Holds sessions with a turn at or after this time; null: any."),
    Column("until", Time, comment="Holds sessions with a turn before this time; null: any."),
    Column("released_at", Time, comment="When it was released; null: in force."),
    Column("released_by", Text, comment="Who released it."),
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

outbox = Table(
    "outbox",
    metadata,
    Column(
        "id",
        BigInteger,
        Identity(always=True),
        nullable=False,
        comment="Grows with writing, not with committing: nothing may be read by it.",
    ),
    Column("changed_at", Time, nullable=False, comment="When the changes were made."),
    Column(
        "changes",
        JSON(none_as_null=True),
        nullable=False,
        comment="What changed, in order: a list of type, session_id, chat_id and seal_id; no content.",
    ),
    PrimaryKeyConstraint("id", name="outbox_pkey"),
    comment="Changes as they were committed, one row a transaction, until a worker publishes them.",
)

changes = Table(
    "changes",
    metadata,
    Column(
        "cursor",
        BigInteger,
        autoincrement=False,
        nullable=False,
        comment="1, 2, 3 … without gaps; visible in this order.",
    ),
    Column("type", Text, nullable=False, comment="What changed, such as chat.created."),
    Column("session_id", Text, nullable=False, server_default="", comment="Conversation; empty where none is known."),
    Column("chat_id", Text, comment="Turn; null for changes of whole sessions and of seals."),
    Column("seal_id", BigInteger, comment="Seal; null for changes of conversations."),
    Column("changed_at", Time, nullable=False, comment="When it changed; the order is that of cursor."),
    PrimaryKeyConstraint("cursor", name="changes_pkey"),
    comment="The change feed: what changed in the archive, once and in an order that never changes.",
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="For archiver followups show."),
    Column("url", Text, nullable=False, comment="Where deliveries are sent."),
    Column("events", ARRAY(Text), nullable=False, comment="Types of changes that are told."),
    Column("assistant_id", Text, comment="Only of conversations of this assistant; null: of any."),
    Column("variable", Text, comment="Only where this variable has this value; null: anywhere."),
    Column("value", Text, comment="Value of the variable."),
    Column("contains", Text, comment="Only where a message holds this text, in whatever case; null: anywhere."),
    Column("is_ordered", Boolean, nullable=False, comment="Whether each session is told in the order of the feed."),
    Column("concurrency", Integer, nullable=False, comment="Deliveries that may be under way at a time."),
    Column("secret", Text, nullable=False, comment="Signs deliveries; whsec_ and base64."),
    Column("previous_secret", Text, comment="The one before, which signs as well for a while."),
    Column("previous_until", Time, comment="Until then."),
    Column("cursor", BigInteger, nullable=False, comment="Up to here the feed was looked at."),
    Column("created_at", Time, nullable=False, comment="When it was added."),
    Column("paused_at", Time, comment="When it was paused; null: it is at work."),
    Column("pause_reason", Text, comment="Why: paused by hand, gone (the receiver said 410), or failing for long."),
    Column("failures", Integer, nullable=False, server_default="0", comment="Attempts that failed in a row."),
    Column("failing_since", Time, comment="When the first of them did; null where the latest did not."),
    Column("closed_until", Time, comment="Its receiver is left alone until then."),
    Column("leased_by", Text, comment="Which worker sends for it at present."),
    Column("leased_until", Time, comment="Another may after this time."),
    PrimaryKeyConstraint("id", name="subscriptions_pkey"),
    comment="Who is told of changes, and up to where they were.",
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("subscription_id", BigInteger, nullable=False, autoincrement=False, comment="To whom."),
    Column("cursor", BigInteger, nullable=False, autoincrement=False, comment="Which change of the feed."),
    Column("type", Text, nullable=False, comment="What changed."),
    Column("session_id", Text, nullable=False, comment="Conversation; empty where none is known."),
    Column("chat_id", Text, comment="Turn; null for changes of whole sessions and of seals."),
    Column("seal_id", BigInteger, comment="Seal; null for changes of conversations."),
    Column("changed_at", Time, nullable=False, comment="When it changed."),
    Column("created_at", Time, nullable=False, comment="When it was found to be for this subscription."),
    Column("state", Text, nullable=False, server_default="pending", comment="pending, delivered or dead: given up."),
    Column("attempts", Integer, nullable=False, server_default="0", comment="Attempts so far."),
    Column("last_attempt", Integer, nullable=False, comment="Number of the attempt after which it is given up."),
    Column("due_at", Time, nullable=False, comment="It is not tried before."),
    Column("ended_at", Time, comment="When it was delivered or given up."),
    PrimaryKeyConstraint("subscription_id", "cursor", name="deliveries_pkey"),
    Index("deliveries_due_idx", "subscription_id", "due_at", postgresql_where=text("state = 'pending'")),
    Index("deliveries_session_idx", "session_id", "subscription_id", "cursor"),
    Index("deliveries_ended_at_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("deliveries_dead_idx", "subscription_id", "cursor", postgresql_where=text("state = 'dead'")),
    comment="Follow-ups at hand, ids only: content is read as it is sent, and the queue is the feed.",
)

attempts = Table(
    "attempts",
    metadata,
    Column("subscription_id", BigInteger, nullable=False, autoincrement=False, comment="To whom."),
    Column("cursor", BigInteger, nullable=False, autoincrement=False, comment="Which change of the feed."),
    Column("number", Integer, nullable=False, autoincrement=False, comment="1, 2, 3 … of its delivery."),
    Column("at", Time, nullable=False, comment="When it began."),
    Column("seconds", Float, nullable=False, comment="How long it took."),
    Column("status", Integer, comment="Status of the answer; null where there was none."),
    Column("fault", Text, comment="What was wrong; null where it was delivered."),
    Column("answer", LargeBinary, comment="First 256 bytes of the answer; null once what it is about is erased."),
    PrimaryKeyConstraint("subscription_id", "cursor", "number", name="attempts_pkey"),
    comment="Each attempt at a delivery, and what came of it.",
)
