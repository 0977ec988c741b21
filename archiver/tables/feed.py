"""The change feed, and the follow-ups that are made of it. Local tables: none of them is distributed by session."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON

from archiver.tables.archive import Time, metadata

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
