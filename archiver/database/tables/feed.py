"""The tables of the change feed and of the follow-ups derived from it. They are local: not distributed by session."""

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

from archiver.database.tables.archive import Time, metadata

outbox = Table(
    "outbox",
    metadata,
    Column(
        "id",
        BigInteger,
        Identity(always=True),
        nullable=False,
        comment="Assigned when written, not when committed: not usable as a cursor.",
    ),
    Column("changed_at", Time, nullable=False, comment="When the changes were made."),
    Column(
        "changes",
        JSON(none_as_null=True),
        nullable=False,
        comment="What changed, in order: a list of type, session_id, chat_id and seal_id; no content.",
    ),
    PrimaryKeyConstraint("id", name="outbox_pkey"),
    comment="Changes of each committed transaction, until a worker publishes them.",
)

changes = Table(
    "changes",
    metadata,
    Column(
        "cursor",
        BigInteger,
        autoincrement=False,
        nullable=False,
        comment="1, 2, 3 … in each epoch without gaps; visible in this order.",
    ),
    Column("type", Text, nullable=False, comment="What changed, such as chat.created."),
    Column("session_id", Text, nullable=False, server_default="", comment="Conversation; empty where none is known."),
    Column("chat_id", Text, comment="Turn; null for changes of whole sessions and of seals."),
    Column("seal_id", BigInteger, comment="Seal; null for changes of conversations."),
    Column("changed_at", Time, nullable=False, comment="When it changed; the order is that of cursor."),
    Column(
        "is_alone",
        Boolean,
        comment="True: no row of another turn changed with this turn; null: rows of others may have changed.",
    ),
    PrimaryKeyConstraint("cursor", name="changes_pkey"),
    comment="The change feed: what changed in the archive, once and in an order that never changes.",
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="For archiver followups show."),
    Column("url", Text, nullable=False, comment="Where deliveries are sent."),
    Column("events", ARRAY(Text), nullable=False, comment="Change types that are delivered."),
    Column("assistant_id", Text, comment="Only conversations of this assistant; null: all."),
    Column("variable", Text, comment="Only conversations in which this variable has this value; null: all."),
    Column("value", Text, comment="Value of the variable."),
    Column(
        "contains",
        Text,
        comment="Only conversations with a message that contains this text, ignoring case; null: all.",
    ),
    Column(
        "is_ordered",
        Boolean,
        nullable=False,
        comment="Whether changes of each session are delivered in the order of the feed.",
    ),
    Column("concurrency", Integer, nullable=False, comment="Maximum concurrent deliveries."),
    Column("secret", Text, nullable=False, comment="Signs deliveries; whsec_ and base64."),
    Column("previous_secret", Text, comment="Previous secret, which also signs for a while."),
    Column("previous_until", Time, comment="When the previous secret ends."),
    Column("cursor", BigInteger, nullable=False, comment="The feed is processed up to this cursor."),
    Column("created_at", Time, nullable=False, comment="When it was added."),
    Column("paused_at", Time, comment="When it was paused; null: active."),
    Column("pause_reason", Text, comment="Reason: paused by hand, gone (the receiver returned 410) or failing."),
    Column("failures", Integer, nullable=False, server_default="0", comment="Consecutive failed attempts."),
    Column(
        "failing_since",
        Time,
        comment="Start of the current series of failures; null if the latest attempt succeeded.",
    ),
    Column("open_until", Time, comment="End of the time for which the circuit breaker blocks deliveries."),
    Column("leased_by", Text, comment="Worker that holds the lease."),
    Column("leased_until", Time, comment="End of the lease."),
    PrimaryKeyConstraint("id", name="subscriptions_pkey"),
    comment="Receivers of changes, and the cursor up to which each has read the feed.",
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("subscription_id", BigInteger, nullable=False, autoincrement=False, comment="Subscription."),
    Column("cursor", BigInteger, nullable=False, autoincrement=False, comment="Which change of the feed."),
    Column("type", Text, nullable=False, comment="What changed."),
    Column("session_id", Text, nullable=False, comment="Conversation; empty where none is known."),
    Column("chat_id", Text, comment="Turn; null for changes of whole sessions and of seals."),
    Column("seal_id", BigInteger, comment="Seal; null for changes of conversations."),
    Column("changed_at", Time, nullable=False, comment="When it changed."),
    Column("created_at", Time, nullable=False, comment="When the delivery was created."),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="pending",
        comment="pending, delivered or dead (no further attempts).",
    ),
    Column("attempts", Integer, nullable=False, server_default="0", comment="Attempts so far."),
    Column("last_attempt", Integer, nullable=False, comment="Number of the last attempt before it is dead."),
    Column("due_at", Time, nullable=False, comment="Next attempt not before this time."),
    Column("ended_at", Time, comment="When it was delivered or became dead."),
    PrimaryKeyConstraint("subscription_id", "cursor", name="deliveries_pkey"),
    Index("deliveries_due_idx", "subscription_id", "due_at", postgresql_where=text("state = 'pending'")),
    Index("deliveries_session_idx", "session_id", "subscription_id", "cursor"),
    Index("deliveries_ended_at_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("deliveries_dead_idx", "subscription_id", "cursor", postgresql_where=text("state = 'dead'")),
    comment="Deliveries of follow-ups, ids only: content is read when it is sent.",
)

attempts = Table(
    "attempts",
    metadata,
    Column("subscription_id", BigInteger, nullable=False, autoincrement=False, comment="To whom."),
    Column("cursor", BigInteger, nullable=False, autoincrement=False, comment="Which change of the feed."),
    Column("number", Integer, nullable=False, autoincrement=False, comment="Number of the attempt: 1, 2, 3 …"),
    Column("at", Time, nullable=False, comment="When it began."),
    Column("seconds", Float, nullable=False, comment="How long it took."),
    Column("status", Integer, comment="Status of the answer; null where there was none."),
    Column("fault", Text, comment="Fault code; null if delivered."),
    Column("answer", LargeBinary, comment="First 256 bytes of the response; null once its subject is erased."),
    PrimaryKeyConstraint("subscription_id", "cursor", "number", name="attempts_pkey"),
    comment="Attempts at deliveries, with their results.",
)
