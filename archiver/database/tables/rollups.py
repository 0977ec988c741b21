"""The tables of the rollups: what each session contributes to 15 minutes, and the sums of these by bucket and day."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    Identity,
    Index,
    Integer,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import ARRAY

from archiver.database.tables.archive import Time, metadata

BUCKET = "Start of 15 minutes."
ASSISTANT = "Assistant; empty where none is known."
STARTED = "Conversations whose first turn began then."
CHATS = "Turns that began then."
MESSAGES = "Their messages."
COST = "Sum of their costs; null if none has one."
DELETED = "Those of them that upstream deleted."
REPAIRED = "Those of their messages that only history supplied."
LATENCY = "Numbers of turns by seconds from created_at to updated_at, within the bounds in docs/data-model.md."


def _sums(conversations: str) -> tuple[Column[int], ...]:
    """Return the columns of figures that add up, and the conversations of UTC days."""
    return Column("conversations", Integer, nullable=False, comment=conversations), *_figures()


def _figures() -> tuple[Column[int], ...]:
    """Return the columns of figures that add up."""
    return (
        Column("conversations_started", Integer, nullable=False, comment=STARTED),
        Column("chats", Integer, nullable=False, comment=CHATS),
        Column("messages", Integer, nullable=False, comment=MESSAGES),
        Column("cost", Numeric, comment=COST),
        Column("deleted_chats", Integer, nullable=False, comment=DELETED),
        Column("repaired_messages", Integer, nullable=False, comment=REPAIRED),
    )


contributions = Table(
    "contributions",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation; never empty."),
    Column("bucket", Time, nullable=False, comment=BUCKET),
    Column("assistant_id", Text, nullable=False, comment=ASSISTANT),
    *_sums("1 in the first bucket of the conversation on a UTC day and assistant, else 0."),
    Column("latency", ARRAY(Integer), nullable=False, comment=LATENCY),
    PrimaryKeyConstraint("session_id", "bucket", "assistant_id", name="contributions_pkey"),
    Index("contributions_bucket_idx", "bucket"),
    comment="What each conversation contributes to the rollups, as of its latest published change.",
)

rollups = Table(
    "rollups",
    metadata,
    Column("bucket", Time, nullable=False, comment=BUCKET),
    Column("assistant_id", Text, nullable=False, comment=ASSISTANT),
    *_sums("Conversations whose first bucket of this UTC day and assistant it is."),
    Column("latency", ARRAY(Integer), nullable=False, comment=LATENCY),
    PrimaryKeyConstraint("bucket", "assistant_id", name="rollups_pkey"),
    comment="Sums of the contributions to each bucket, except that buckets in stale_buckets may be outdated.",
)

days = Table(
    "days",
    metadata,
    Column("day", Date, nullable=False, comment="UTC day."),
    Column("assistant_id", Text, nullable=False, comment=ASSISTANT),
    *_sums("Conversations with a turn on this day and assistant."),
    PrimaryKeyConstraint("day", "assistant_id", name="days_pkey"),
    comment="Sums of the rollups of each UTC day, except that days of buckets in stale_buckets may be outdated.",
)

stale_buckets = Table(
    "stale_buckets",
    metadata,
    Column("bucket", Time, nullable=False, comment=BUCKET),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="Of its latest change; grows with time."),
    Column("since", Time, nullable=False, comment="When it was first changed after its latest summing."),
    PrimaryKeyConstraint("bucket", name="stale_buckets_pkey"),
    comment="Buckets whose contributions changed since they were summed.",
)

uncontributed = Table(
    "uncontributed",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation."),
    Column(
        "failed_at", Time, comment="When Postgres first rejected the rows, or took too long; null: not yet computed."
    ),
    Column("retry_at", Time, comment="Time of the next attempt; null: at once."),
    Column("reason", Text, comment="Why the latest attempt failed."),
    PrimaryKeyConstraint("session_id", name="uncontributed_pkey"),
    comment="Conversations without a row in summaries and contributions, which a worker has yet to compute.",
)

NAME = "Name of the variable in variableValues."
VARIABLE = "Promoted variable."
FULL = "Whether conversations had more values than are kept; the others then count as (other)."

promoted_variables = Table(
    "promoted_variables",
    metadata,
    Column("id", Integer, Identity(always=True), nullable=False, comment="Never used again."),
    Column("name", Text, nullable=False, comment=NAME),
    Column(
        "state",
        Text,
        nullable=False,
        comment="collecting: a worker has yet to store the values of some conversations; complete: of all; removed:"
        " no longer promoted, a worker deletes its rows.",
    ),
    Column("collected_through", Text, nullable=False, comment="While collecting: up to this conversation."),
    Column("is_full", Boolean, nullable=False, comment=FULL),
    PrimaryKeyConstraint("id", name="promoted_variables_pkey"),
    comment="Variables of ARCHIVER_ANALYTICS_VARIABLES with variable_rollups, as of archiver migrate.",
)

variable_values = Table(
    "variable_values",
    metadata,
    Column("id", Integer, Identity(always=True), nullable=False, comment="Never used again."),
    Column("variable_id", Integer, nullable=False, comment=VARIABLE),
    Column("value", Text, nullable=False, comment="Value that conversations have."),
    PrimaryKeyConstraint("id", name="variable_values_pkey"),
    UniqueConstraint("variable_id", "value", name="variable_values_variable_id_value_key"),
    comment="Values of promoted variables; deleted when the last conversation with a value changes or is erased.",
)

session_values = Table(
    "session_values",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation."),
    Column("variable_id", Integer, nullable=False, comment=VARIABLE),
    Column("value_id", Integer, nullable=False, comment="Its value; 0: none; -1: (other)."),
    PrimaryKeyConstraint("session_id", "variable_id", name="session_values_pkey"),
    Index("session_values_variable_id_value_id_idx", "variable_id", "value_id"),
    comment="The value of each promoted variable in each conversation, as of its latest published change.",
)

variable_rollups = Table(
    "variable_rollups",
    metadata,
    Column("variable_id", Integer, nullable=False, comment=VARIABLE),
    Column("bucket", Time, nullable=False, comment=BUCKET),
    Column("assistant_id", Text, nullable=False, comment=ASSISTANT),
    Column("value_id", Integer, nullable=False, comment="Value of their conversations; 0: none; -1: (other)."),
    *_figures(),
    Column("latency", ARRAY(Integer), nullable=False, comment=LATENCY),
    PrimaryKeyConstraint("variable_id", "bucket", "assistant_id", "value_id", name="variable_rollups_pkey"),
    comment="Sums of the contributions by value of a variable; buckets in stale_buckets may be outdated.",
)
