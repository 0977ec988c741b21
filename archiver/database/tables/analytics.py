"""The tables that are stored for the views of analysts, and derived from sessions, chats and messages."""

from sqlalchemy import BigInteger, Column, Float, Index, Numeric, PrimaryKeyConstraint, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from archiver.database.tables.archive import Time, metadata

summaries = Table(
    "summaries",
    metadata,
    Column("session_id", Text, nullable=False, comment="CallHQ session id."),
    Column("assistant_id", Text, comment="Assistant, from the latest report."),
    Column(
        "started_at",
        Time,
        nullable=False,
        comment="Creation of its first turn or of the session; if not reported, arrival of its first event.",
    ),
    Column("last_message_at", Time, nullable=False, comment="Latest creation or update of its turns."),
    Column("turns", BigInteger, nullable=False, comment="Turns, deleted ones included."),
    Column("messages", BigInteger, nullable=False, comment="Messages, those of deleted turns included."),
    Column("user_messages", BigInteger, nullable=False, comment="Messages of role user."),
    Column("assistant_messages", BigInteger, nullable=False, comment="Messages of role assistant."),
    Column("cost", Numeric, comment="Total cost of its turns; null if none reported a cost."),
    Column("deleted_chats", BigInteger, nullable=False, comment="Turns that upstream deleted."),
    Column("repaired_messages", BigInteger, nullable=False, comment="Messages that history supplied."),
    Column(
        "coverage",
        Text,
        nullable=False,
        comment="open, complete, repaired, ambiguous, unverified or lost; see coverage.",
    ),
    Column("reason", Text, nullable=False, comment="Code of the reason for that state."),
    Column("first_question", Text, comment="First message of role user with text, as now archived; null if none."),
    Column(
        "first_answer",
        Text,
        comment="First message of role assistant with text after first_question, as now archived; null if none.",
    ),
    Column(
        "answer_seconds",
        Float,
        comment="From the creation of the turn of first_question to the update of the first revision that answers it;"
        " null if not reported.",
    ),
    Column("variables", JSONB(none_as_null=True), comment="variableValues of its turns; a later turn's value wins."),
    Column("changed_cursor", BigInteger, nullable=False, comment="Cursor of its last change, see analytics.changes."),
    PrimaryKeyConstraint("session_id", name="summaries_pkey"),
    Index("summaries_last_message_at_idx", "last_message_at", "session_id"),
    Index("summaries_started_at_idx", "started_at", "session_id"),
    Index("summaries_changed_cursor_idx", "changed_cursor"),
    Index(
        "summaries_variables_idx",
        "variables",
        postgresql_using="gin",
        postgresql_ops={"variables": "jsonb_path_ops"},
    ),
    comment="One row per session for analysts, derived from sessions, chats and messages by the publisher of the"
    " feed.",
)
