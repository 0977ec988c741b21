"""The ledger, the archive derived from it, the quarantine, and the first views."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    _create_tables()
    # No conversation, but the place of turns whose session is not known.
    op.execute(
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at) VALUES ('', 'epoch', 'epoch')"
    )
    op.execute("COMMENT ON TABLE archiver.schema_version IS 'The revision of this schema; kept by archiver migrate.'")
    op.execute("COMMENT ON COLUMN archiver.schema_version.version_num IS 'Newest migration applied.'")
    op.execute("CREATE SCHEMA IF NOT EXISTS analytics")
    op.execute("COMMENT ON SCHEMA archiver IS 'Tables of callhq-archiver. Auditors read events and quarantine.'")
    op.execute("COMMENT ON SCHEMA analytics IS 'What dashboards may read. Columns are added, never renamed.'")
    for name, (meaning, query, columns) in VIEWS.items():
        op.execute(f"CREATE VIEW analytics.{name} AS {query}")
        op.execute(f"COMMENT ON VIEW analytics.{name} IS '{meaning}'")
        for column, comment in columns.items():
            op.execute(f"COMMENT ON COLUMN analytics.{name}.{column} IS '{comment}'")
    op.execute(CREATE_READER)


def downgrade() -> None:
    # The role stays: it belongs to the whole cluster, and other databases may use it.
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW analytics.{name}")
    op.execute("DROP SCHEMA analytics")
    for name in ("quarantine", "messages", "chats", "sessions", "events"):
        op.drop_table(name, schema=SCHEMA)


def _create_tables() -> None:
    op.create_table(
        "events",
        sa.Column(
            "session_id",
            sa.Text(),
            nullable=False,
            comment="Session it belongs to; empty where the delivery does not tell.",
        ),
        sa.Column(
            "dedupe_key",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 over event type, chat id and canonical chat.",
        ),
        sa.Column(
            "id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Grows with arrival; gaps are normal.",
        ),
        sa.Column("type", sa.Text(), nullable=False, comment="Event type as told, such as chat.created."),
        sa.Column("source", sa.Text(), nullable=False, comment="Whence it came: webhook."),
        sa.Column("chat_id", sa.Text(), nullable=True, comment="Turn it speaks of; null for events without one."),
        sa.Column("received_at", TIME, nullable=False, comment="When its first delivery reached us."),
        sa.Column("last_received_at", TIME, nullable=False, comment="When its latest delivery reached us."),
        sa.Column(
            "delivery_count",
            sa.Integer(),
            nullable=False,
            comment="Deliveries of this same fact, the first included.",
        ),
        sa.Column(
            "occurred_at",
            TIME,
            nullable=True,
            comment="Earliest time that any of its deliveries told in the envelope.",
        ),
        sa.Column(
            "key_id",
            sa.Text(),
            nullable=True,
            comment="Which webhook secret matched its first delivery; none where unsigned.",
        ),
        sa.Column("body", sa.LargeBinary(), nullable=True, comment="The exact bytes of the first delivery."),
        sa.Column("salt", sa.LargeBinary(), nullable=True, comment="Random bytes that body_digest is salted with."),
        sa.Column("body_digest", sa.LargeBinary(), nullable=False, comment="SHA-256 over salt and body."),
        sa.CheckConstraint("delivery_count > 0", name="events_delivery_count_positive"),
        sa.PrimaryKeyConstraint("session_id", "dedupe_key", name="events_pkey"),
        schema=SCHEMA,
        comment="The ledger: each distinct fact once, byte for byte. Everything else is derived from it.",
    )
    op.create_index("events_id_idx", "events", ["id"], unique=False, schema=SCHEMA)
    op.create_index("events_session_id_chat_id_idx", "events", ["session_id", "chat_id"], unique=False, schema=SCHEMA)
    op.create_table(
        "sessions",
        sa.Column(
            "session_id",
            sa.Text(),
            nullable=False,
            comment="CallHQ's session id; empty: turns whose session is not known.",
        ),
        sa.Column("first_event_at", TIME, nullable=False, comment="When we first heard of it."),
        sa.Column("last_event_at", TIME, nullable=False, comment="When we last heard something new of it."),
        sa.Column(
            "coverage", sa.Text(), server_default="open", nullable=False, comment="What is known of its completeness."
        ),
        sa.PrimaryKeyConstraint("session_id", name="sessions_pkey"),
        schema=SCHEMA,
        comment="One row a conversation, derived from the ledger.",
    )
    op.create_table(
        "chats",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation; empty where no delivery told it."),
        sa.Column("chat_id", sa.Text(), nullable=False, comment="CallHQ's chat id: one turn."),
        sa.Column("assistant_id", sa.Text(), nullable=True, comment="Assistant that answered."),
        sa.Column("external_id", sa.Text(), nullable=True, comment="CallHQ's externalChatId."),
        sa.Column("status", sa.Text(), nullable=True, comment="Upstream status of the turn."),
        sa.Column("cost", sa.Numeric(), nullable=True, comment="What the turn cost, as told upstream."),
        sa.Column(
            "variables",
            postgresql.JSONB(none_as_null=True),
            nullable=True,
            comment="variableValues of the turn.",
        ),
        sa.Column("created_at", TIME, nullable=True, comment="Upstream creation time; null if not told."),
        sa.Column(
            "updated_at", TIME, nullable=True, comment="Upstream time of the newest revision; null if not told."
        ),
        sa.Column(
            "occurred_at",
            TIME,
            nullable=True,
            comment="Earliest time that any of its deliveries told; orders turns of one instant.",
        ),
        sa.Column("first_received_at", TIME, nullable=False, comment="When we first heard of it."),
        sa.Column(
            "session_name", sa.Text(), nullable=True, comment="Name of the session, where its deliveries told it."
        ),
        sa.Column(
            "session_status", sa.Text(), nullable=True, comment="Status of the session, where its deliveries told it."
        ),
        sa.Column("deleted_at", TIME, nullable=True, comment="Tombstone: when upstream deleted it; content stays."),
        sa.Column("source", sa.Text(), nullable=False, comment="Whence it is known: webhook."),
        sa.ForeignKeyConstraint(["session_id"], ["archiver.sessions.session_id"], name="chats_session_id_fkey"),
        sa.PrimaryKeyConstraint("session_id", "chat_id", name="chats_pkey"),
        schema=SCHEMA,
        comment="One row a turn: its newest revision, derived from the ledger.",
    )
    op.create_index("chats_chat_id_idx", "chats", ["chat_id"], unique=False, schema=SCHEMA)
    op.create_table(
        "messages",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation."),
        sa.Column("chat_id", sa.Text(), nullable=False, comment="Turn."),
        sa.Column(
            "ordinal", sa.Integer(), nullable=False, comment="0, 1, 2 … within the turn: input first, then output."
        ),
        sa.Column("role", sa.Text(), nullable=False, comment="user, assistant, system, tool …"),
        sa.Column("content", sa.Text(), nullable=False, comment="Text; U+0000 and lone surrogates became U+FFFD."),
        sa.Column("source", sa.Text(), nullable=False, comment="Whence it is known: webhook."),
        sa.PrimaryKeyConstraint("session_id", "chat_id", "ordinal", name="messages_pkey"),
        schema=SCHEMA,
        comment="One row a message, derived from the ledger.",
    )
    op.create_table(
        "quarantine",
        sa.Column(
            "id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="For archiver quarantine show and retry.",
        ),
        sa.Column("received_at", TIME, nullable=False, comment="When its first delivery reached us."),
        sa.Column("last_received_at", TIME, nullable=False, comment="When its latest delivery reached us."),
        sa.Column("delivery_count", sa.Integer(), nullable=False, comment="Deliveries of these same bytes."),
        sa.Column("reason", sa.Text(), nullable=False, comment="Stable code of why it was not archived."),
        sa.Column("detail", sa.Text(), nullable=False, comment="The reason as a sentence, without content."),
        sa.Column("key_id", sa.Text(), nullable=True, comment="Which webhook secret matched."),
        sa.Column("body", sa.LargeBinary(), nullable=False, comment="The exact bytes."),
        sa.Column(
            "body_digest",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of the bytes: the same bytes are kept once.",
        ),
        sa.PrimaryKeyConstraint("id", name="quarantine_pkey"),
        sa.UniqueConstraint("body_digest", name="quarantine_body_digest_key"),
        schema=SCHEMA,
        comment="Authenticated deliveries that could not be archived, with the reason.",
    )


# A turn without an upstream creation time stands where its first telling, or else its arrival, puts it.
BEGAN = "coalesce(c.created_at, c.occurred_at, c.first_received_at)"


def newest(column: str) -> str:
    """What the last of a session's turns that tells a column tells."""
    order = f"ORDER BY {BEGAN} DESC, c.chat_id DESC"
    return f"(array_agg(c.{column} {order}) FILTER (WHERE c.{column} IS NOT NULL))[1]"


VIEWS: dict[str, tuple[str, str, dict[str, str]]] = {
    "conversations": (
        "One row a session.",
        f"""
        SELECT s.session_id, c.assistant_id, c.name, c.status,
               coalesce(c.started_at, s.first_event_at) AS started_at,
               coalesce(c.last_message_at, s.last_event_at) AS last_message_at,
               coalesce(c.chats, 0) AS chats,
               coalesce(m.messages, 0) AS messages,
               coalesce(m.user_messages, 0) AS user_messages,
               coalesce(m.assistant_messages, 0) AS assistant_messages,
               c.cost,
               coalesce(c.deleted_chats, 0) AS deleted_chats,
               s.coverage
          FROM archiver.sessions s
          LEFT JOIN (
              SELECT c.session_id, min({BEGAN}) AS started_at,
                     max(greatest({BEGAN}, c.updated_at)) AS last_message_at,
                     count(*) AS chats, sum(c.cost) AS cost, count(c.deleted_at) AS deleted_chats,
                     {newest("assistant_id")} AS assistant_id,
                     {newest("session_name")} AS name,
                     {newest("session_status")} AS status
                FROM archiver.chats c GROUP BY c.session_id
          ) c ON c.session_id = s.session_id
          LEFT JOIN (
              SELECT session_id, count(*) AS messages,
                     count(*) FILTER (WHERE role = 'user') AS user_messages,
                     count(*) FILTER (WHERE role = 'assistant') AS assistant_messages
                FROM archiver.messages GROUP BY session_id
          ) m ON m.session_id = s.session_id
         WHERE s.session_id <> ''
        """,
        {
            "session_id": "CallHQ session id.",
            "assistant_id": "Assistant, as told last.",
            "name": "Name of the session, where told.",
            "status": "Upstream status, where told.",
            "started_at": "Creation of its first turn, or when we first heard of it.",
            "last_message_at": "Latest creation or update of its turns.",
            "chats": "Turns, deleted ones included.",
            "messages": "Messages, those of deleted turns included.",
            "user_messages": "Messages of role user.",
            "assistant_messages": "Messages of role assistant.",
            "cost": "Sum of what its turns cost; null where none told.",
            "deleted_chats": "Turns that upstream deleted.",
            "coverage": "open until its history has been read.",
        },
    ),
    "chats": (
        "One row a turn.",
        """
        SELECT session_id, chat_id, assistant_id, status, cost, variables, created_at, updated_at, source, deleted_at,
               external_id, first_received_at
          FROM archiver.chats
        """,
        {
            "session_id": "CallHQ session id; empty where no delivery told it.",
            "chat_id": "CallHQ chat id.",
            "assistant_id": "Assistant that answered.",
            "status": "Upstream status of the turn.",
            "cost": "What the turn cost.",
            "variables": "variableValues of the turn.",
            "created_at": "Upstream creation time; null if not told.",
            "updated_at": "Upstream time of the newest revision; null if not told.",
            "source": "Whence it is known.",
            "deleted_at": "When upstream deleted it; null if it did not.",
            "external_id": "CallHQ externalChatId.",
            "first_received_at": "When we first heard of it.",
        },
    ),
    "messages": (
        "One row a message, in the order in which it was said.",
        f"""
        SELECT m.session_id,
               row_number() OVER (
                   PARTITION BY m.session_id
                   ORDER BY {BEGAN}, c.occurred_at, c.first_received_at, m.chat_id, m.ordinal
               ) AS position,
               m.chat_id, m.role, m.content, c.created_at, m.source, c.deleted_at
          FROM archiver.messages m
          JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
        """,
        {
            "session_id": "CallHQ session id; empty where no delivery told it.",
            "position": "1, 2, 3 … within the session.",
            "chat_id": "CallHQ chat id.",
            "role": "user, assistant, system, tool …",
            "content": "Text.",
            "created_at": "Upstream creation time of its turn; null if not told.",
            "source": "Whence it is known.",
            "deleted_at": "When upstream deleted its turn; null if it did not.",
        },
    ),
    "daily": (
        "One row a day (UTC, by the creation of the turn) and assistant.",
        f"""
        SELECT ({BEGAN} AT TIME ZONE 'UTC')::date AS day,
               coalesce(c.assistant_id, s.assistant_id) AS assistant_id,
               count(DISTINCT c.session_id) FILTER (WHERE c.session_id <> '') AS conversations,
               count(*) AS chats,
               coalesce(sum(m.messages), 0)::bigint AS messages,
               sum(c.cost) AS cost,
               count(c.deleted_at) AS deleted_chats,
               coalesce(sum(m.repaired_messages), 0)::bigint AS repaired_messages
          FROM archiver.chats c
          LEFT JOIN (
              SELECT c.session_id, {newest("assistant_id")} AS assistant_id
                FROM archiver.chats c WHERE c.session_id <> '' GROUP BY c.session_id
          ) s ON s.session_id = c.session_id
          LEFT JOIN (
              SELECT session_id, chat_id, count(*) AS messages,
                     count(*) FILTER (WHERE source = 'history') AS repaired_messages
                FROM archiver.messages GROUP BY session_id, chat_id
          ) m ON m.session_id = c.session_id AND m.chat_id = c.chat_id
         GROUP BY 1, 2
        """,
        {
            "day": "Day in UTC.",
            "assistant_id": "Assistant of the turn, or else of its session; null where not told.",
            "conversations": "Sessions with a turn on that day.",
            "chats": "Turns.",
            "messages": "Messages.",
            "cost": "Sum of what the turns cost; null where none told.",
            "deleted_chats": "Turns that upstream deleted.",
            "repaired_messages": "Messages that history supplied.",
        },
    ),
    "coverage": (
        "One row a session: how complete it is known to be.",
        """
        SELECT session_id, coverage AS state, first_event_at, NULL::timestamptz AS reconciled_at,
               0::bigint AS repaired_messages, 'its history has not been read yet' AS reason
          FROM archiver.sessions
         WHERE session_id <> ''
        """,
        {
            "session_id": "CallHQ session id.",
            "state": "open, complete, repaired, unverified or lost.",
            "first_event_at": "When we first heard of it.",
            "reconciled_at": "When its history was last read; null if never.",
            "repaired_messages": "Messages that history supplied.",
            "reason": "Why it is in that state.",
        },
    ),
}

# An ordinary user may lack the right to create roles: then `archiver doctor` tells what an administrator must run.
CREATE_READER = """
    DO $$
    BEGIN
        CREATE ROLE archiver_reader NOLOGIN;
    EXCEPTION
        WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
    END
    $$
"""
