"""The tables of full-text search. The partitions of `search` are in the schema `archiver_search`."""

from sqlalchemy import BigInteger, Column, Index, Integer, PrimaryKeyConstraint, Table, Text
from sqlalchemy.dialects.postgresql import TSVECTOR

from archiver.database.tables.archive import Time, metadata

search = Table(
    "search",
    metadata,
    Column("session_id", Text, nullable=False, comment="Conversation; empty for an unassigned turn."),
    Column(
        "chat_id",
        Text,
        nullable=False,
        comment="CallHQ's chat id; U+001F and a number: known only from history; U+001F: lines before any turn.",
    ),
    Column("ordinal", Integer, nullable=False, comment="0, 1, 2 … within the turn."),
    Column(
        "began_at",
        Time,
        nullable=False,
        comment="When the turn began, as in analytics.messages; selects the partition.",
    ),
    Column("assistant_id", Text, comment="Assistant of the turn; null if the turn names none."),
    Column("digest", BigInteger, nullable=False, comment="Digest of the text, by which a changed text is found."),
    Column("page", BigInteger, nullable=False, comment="Number of the transaction that wrote the row."),
    Column("lexemes", TSVECTOR, nullable=False, comment="Words of the text and their positions."),
    PrimaryKeyConstraint("session_id", "chat_id", "ordinal", "began_at", name="search_pkey"),
    Index("search_lexemes_idx", "lexemes", postgresql_using="gin", postgresql_with={"fastupdate": "off"}),
    comment="The words of each message, for analytics.search; derived from messages by a worker.",
    postgresql_partition_by="RANGE (began_at)",
)

search_partitions = Table(
    "search_partitions",
    metadata,
    Column("name", Text, nullable=False, comment="Its table in the schema archiver_search."),
    Column("since", Time, comment="First time of the month, in UTC; null: times of no other partition."),
    Column("until", Time, comment="End of the month, exclusive; null: times of no other partition."),
    Column("stale_at", Time, comment="When words of erased messages were last removed; null: its files have none."),
    Column("rebuilt_at", Time, comment="When it was last rewritten without such words; null: never."),
    Column(
        "stale_since", Time, comment="When words of erased messages were first removed; null: its files have none."
    ),
    Column("attempted_at", Time, comment="When a worker last began to rewrite it; null: never."),
    PrimaryKeyConstraint("name", name="search_partitions_pkey"),
    comment="The partitions of search: one for each month, and one for other times.",
)

search_state = Table(
    "search_state",
    metadata,
    Column("id", Integer, nullable=False, autoincrement=False, comment="1."),
    Column("language", Text, comment="Text search configuration of Postgres; null: search is off."),
    Column("cursor", BigInteger, nullable=False, comment="The change feed is followed up to this cursor."),
    Column("page", BigInteger, nullable=False, comment="Transactions that wrote rows of search."),
    Column("backlog_session", Text, comment="Earlier turns are indexed up to this session; null: all are."),
    Column("backlog_chat", Text, comment="The turn of that session."),
    PrimaryKeyConstraint("id", name="search_state_pkey"),
    comment="One row: how far search follows the archive.",
)
