"""History: what readings tell, what they repaired, when the next is due; the job queue; the views that show it."""

from importlib import resources
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    _add_columns()
    _create_tables()
    # What was archived before has never been read: it is due, the oldest first.
    op.execute(
        "UPDATE archiver.sessions SET reconcile_at = last_event_at, read_by = first_event_at + interval '23 hours'"
        " WHERE session_id <> ''"
    )
    create_views(VIEWS)
    op.execute(COMPLETE_THROUGH)
    op.execute("COMMENT ON FUNCTION analytics.complete_through() IS 'Up to here every known session is reconciled.'")
    for table, column, comment in COMMENTS:
        op.execute(f"COMMENT ON COLUMN archiver.{table}.{column} IS '{comment}'")
    _create_jobs()


def downgrade() -> None:
    op.execute("DROP SCHEMA archiver_jobs CASCADE")
    op.execute("DROP FUNCTION analytics.complete_through()")
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW analytics.{name}")
    # Turns that only history knows have no place in the older schema; the ledger keeps what told them.
    for table in ("messages", "chats"):
        op.execute(f"DELETE FROM archiver.{table} WHERE starts_with(chat_id, E'\\x1f')")
    op.execute("DELETE FROM archiver.quarantine WHERE source <> 'webhook'")
    for name in ("backfills", "pauses"):
        op.drop_table(name, schema=SCHEMA)
    op.drop_index("sessions_open_idx", "sessions", schema=SCHEMA)
    op.drop_index("sessions_reconcile_at_idx", "sessions", schema=SCHEMA)
    for table, added in columns().items():
        for column in added:
            op.drop_column(table, column.name, schema=SCHEMA)
    for table, name, _ in COMMENTS:
        op.execute(f"COMMENT ON COLUMN archiver.{table}.{name} IS '{_older(table, name)}'")
    create_views(_older_views())


def columns() -> dict[str, list[sa.Column[Any]]]:
    """New columns by table."""
    return {
        "sessions": [
            sa.Column(
                "reason",
                sa.Text(),
                nullable=False,
                server_default="awaiting_history",
                comment="Code of why it is so.",
            ),
            sa.Column(
                "reconciled_at",
                TIME,
                comment="Start of the latest reading that told its messages; null if none did.",
            ),
            sa.Column(
                "read_at", TIME, comment="Start of the latest reading, whatever it told; null if there was none."
            ),
            sa.Column(
                "repaired_messages",
                sa.Integer(),
                nullable=False,
                server_default="0",
                comment="Messages that history supplied.",
            ),
            sa.Column("name", sa.Text(), comment="Name, as history or the application told it."),
            sa.Column("status", sa.Text(), comment="Upstream status, as history told it."),
            sa.Column("assistant_id", sa.Text(), comment="Assistant, as history or the application told it."),
            sa.Column("created_at", TIME, comment="Upstream creation, as history or the application told it."),
            sa.Column("read_by", TIME, comment="A last reading is due by then, before upstream forgets the session."),
            sa.Column("reconcile_at", TIME, comment="When its history is to be read next; null: never again."),
            sa.Column("leased_until", TIME, comment="A worker reads it at present; free again after this time."),
            sa.Column(
                "failing_since",
                TIME,
                comment="Since then every reading has failed; null if the latest did not.",
            ),
        ],
        "messages": [
            sa.Column(
                "place", sa.Integer(), comment="1, 2, 3 … in true order, once history has been read; null before."
            ),
            sa.Column(
                "in_history", sa.Boolean(), comment="Whether the latest reading shows it; null where none could."
            ),
        ],
        "quarantine": [
            sa.Column(
                "source",
                sa.Text(),
                nullable=False,
                server_default="webhook",
                comment="Whence it came: webhook, history or application.",
            ),
            sa.Column("type", sa.Text(), comment="Kind of a fact of ours, such as history.read; null for a webhook."),
            sa.Column("session_id", sa.Text(), comment="Session of a fact of ours; null for a webhook."),
            sa.Column(
                "dedupe_key", sa.LargeBinary(), comment="Key in the ledger of a fact of ours; null for a webhook."
            ),
        ],
    }


COMMENTS = [
    ("events", "source", "Whence it came: webhook, history or application."),
    ("events", "type", "Event type as told, such as chat.created; or ours, by source."),
    ("chats", "chat_id", "CallHQ''s chat id: one turn; U+001F and a number: only history knows."),
    ("chats", "source", "Whence it is known: webhook or history."),
    ("messages", "chat_id", "Turn; U+001F alone: said before any turn, such as a greeting."),
    ("messages", "source", "Whence it is known: webhook or history."),
    (
        "quarantine",
        "body_digest",
        "SHA-256 of what it is told apart by: the bytes, and of a fact of ours whose it is.",
    ),
]

OLDER_COMMENTS = {
    ("events", "source"): "Whence it came: webhook.",
    ("events", "type"): "Event type as told, such as chat.created.",
    ("chats", "chat_id"): "CallHQ''s chat id: one turn.",
    ("messages", "chat_id"): "Turn.",
    ("quarantine", "body_digest"): "SHA-256 of the bytes: the same bytes are kept once.",
}


def _older(table: str, column: str) -> str:
    return OLDER_COMMENTS.get((table, column), "Whence it is known: webhook.")


def _add_columns() -> None:
    for table, added in columns().items():
        for column in added:
            op.add_column(table, column, schema=SCHEMA)
    op.create_index(
        "sessions_reconcile_at_idx",
        "sessions",
        ["reconcile_at"],
        schema=SCHEMA,
        postgresql_where=sa.text("reconcile_at IS NOT NULL"),
    )
    op.create_index(
        "sessions_open_idx",
        "sessions",
        ["first_event_at"],
        schema=SCHEMA,
        postgresql_where=sa.text("coverage = 'open'"),
    )


def _create_tables() -> None:
    op.create_table(
        "pauses",
        sa.Column("name", sa.Text(), nullable=False, comment="What pauses: callhq."),
        sa.Column("until", TIME, nullable=False, comment="Nobody calls before."),
        sa.Column("reason", sa.Text(), nullable=False, comment="What was answered."),
        sa.PrimaryKeyConstraint("name", name="pauses_pkey"),
        schema=SCHEMA,
        comment="A pause that every worker obeys.",
    )
    op.create_table(
        "backfills",
        sa.Column("selection", sa.Text(), nullable=False, comment="Digest of what was asked for."),
        sa.Column("started_at", TIME, nullable=False, comment="Sessions read since then need not be read again."),
        sa.PrimaryKeyConstraint("selection", name="backfills_pkey"),
        schema=SCHEMA,
        comment="Backfills that have begun and not ended, so that they can go on.",
    )


def _create_jobs() -> None:
    """Procrastinate's own schema, as the pinned version has it, apart from our tables."""
    connection = op.get_bind()
    jobs = resources.files("procrastinate.sql").joinpath("schema.sql").read_text(encoding="utf-8")
    statements = f"SET LOCAL search_path = archiver_jobs; {jobs}; RESET search_path"
    connection.exec_driver_sql("CREATE SCHEMA archiver_jobs")
    # Several statements in one, which goes only without parameters, not even none.
    connection.exec_driver_sql(statements, execution_options={"no_parameters": True})
    op.execute("COMMENT ON SCHEMA archiver_jobs IS 'Background jobs of callhq-archiver (procrastinate). Internal.'")


def create_views(views: dict[str, tuple[str, str, dict[str, str]]]) -> None:
    for name, (meaning, query, comments) in views.items():
        op.execute(f"CREATE OR REPLACE VIEW analytics.{name} AS {query}")
        op.execute(f"COMMENT ON VIEW analytics.{name} IS '{meaning}'")
        for column, comment in comments.items():
            op.execute(f"COMMENT ON COLUMN analytics.{name}.{column} IS '{comment}'")


def _older_views() -> dict[str, tuple[str, str, dict[str, str]]]:
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    views: dict[str, tuple[str, str, dict[str, str]]] = script.get_revision("0001").module.VIEWS
    return views


# A turn without an upstream creation time stands where its first telling, or else its arrival, puts it.
BEGAN = "coalesce(c.created_at, c.occurred_at, c.first_received_at)"


def told_id(alias: str) -> str:
    """A chat's id; null where only history knows the turn."""
    return f"CASE WHEN starts_with({alias}.chat_id, E'\\x1f') THEN NULL ELSE {alias}.chat_id END"


def newest(column: str) -> str:
    """What the last of a session's turns that tells a column tells."""
    order = f"ORDER BY {BEGAN} DESC, c.chat_id DESC"
    return f"(array_agg(c.{column} {order}) FILTER (WHERE c.{column} IS NOT NULL))[1]"


VIEWS: dict[str, tuple[str, str, dict[str, str]]] = {
    "conversations": (
        "One row a session.",
        f"""
        SELECT s.session_id,
               coalesce(c.assistant_id, s.assistant_id) AS assistant_id,
               coalesce(c.name, s.name) AS name,
               coalesce(s.status, c.status) AS status,
               coalesce(least(c.started_at, s.created_at), s.first_event_at) AS started_at,
               coalesce(c.last_message_at, s.last_event_at) AS last_message_at,
               coalesce(c.chats, 0) AS chats,
               coalesce(m.messages, 0) AS messages,
               coalesce(m.user_messages, 0) AS user_messages,
               coalesce(m.assistant_messages, 0) AS assistant_messages,
               c.cost,
               coalesce(c.deleted_chats, 0) AS deleted_chats,
               s.coverage,
               s.repaired_messages,
               s.reconciled_at
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
            "started_at": "Creation of its first turn or of the session; where not told, when we first heard of it.",
            "last_message_at": "Latest creation or update of its turns.",
            "chats": "Turns, deleted ones included.",
            "messages": "Messages, those of deleted turns included.",
            "user_messages": "Messages of role user.",
            "assistant_messages": "Messages of role assistant.",
            "cost": "Sum of what its turns cost; null where none told.",
            "deleted_chats": "Turns that upstream deleted.",
            "coverage": "open, complete, repaired, unverified or lost; see coverage.",
            "repaired_messages": "Messages that history supplied.",
            "reconciled_at": "When its history last told its messages; null if it never did.",
        },
    ),
    "chats": (
        "One row a turn.",
        f"""
        SELECT c.session_id, {told_id("c")} AS chat_id, c.assistant_id, c.status, c.cost, c.variables, c.created_at,
               c.updated_at, c.source, c.deleted_at, c.external_id, c.first_received_at
          FROM archiver.chats c
        """,
        {
            "session_id": "CallHQ session id; empty where no delivery told it.",
            "chat_id": "CallHQ chat id; null where only history knows the turn.",
            "assistant_id": "Assistant that answered.",
            "status": "Upstream status of the turn.",
            "cost": "What the turn cost.",
            "variables": "variableValues of the turn.",
            "created_at": "Upstream creation time; null if not told.",
            "updated_at": "Upstream time of the newest revision; null if not told.",
            "source": "Whence it is known: webhook or history.",
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
                   ORDER BY m.place, {BEGAN}, c.occurred_at, c.first_received_at, m.chat_id, m.ordinal
               ) AS position,
               {told_id("m")} AS chat_id, m.role, m.content, c.created_at, m.source, c.deleted_at, m.in_history
          FROM archiver.messages m
          LEFT JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
        """,
        {
            "session_id": "CallHQ session id; empty where no delivery told it.",
            "position": "1, 2, 3 … within the session.",
            "chat_id": "CallHQ chat id; null where only history knows it.",
            "role": "user, assistant, system, tool …",
            "content": "Text.",
            "created_at": "Upstream creation time of its turn; null if not told.",
            "source": "Whence it is known: webhook or history.",
            "deleted_at": "When upstream deleted its turn; null if it did not.",
            "in_history": "Whether the latest reading of the history shows it; null where none could.",
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
              SELECT c.session_id, coalesce({newest("assistant_id")}, min(s.assistant_id)) AS assistant_id
                FROM archiver.chats c JOIN archiver.sessions s ON s.session_id = c.session_id
               WHERE c.session_id <> '' GROUP BY c.session_id
          ) s ON s.session_id = c.session_id
          LEFT JOIN (
              SELECT session_id, chat_id, count(*) AS messages,
                     count(*) FILTER (WHERE source = 'history') AS repaired_messages
                FROM archiver.messages GROUP BY session_id, chat_id
          ) m ON m.session_id = c.session_id AND m.chat_id = c.chat_id
         GROUP BY 1, 2
        """,
        {
            "day": "Day in UTC; of a turn that only history knows, the day on which it was first read.",
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
        SELECT session_id, coverage AS state, first_event_at, reconciled_at,
               repaired_messages::bigint AS repaired_messages, reason, reconcile_at AS next_reading_at
          FROM archiver.sessions
         WHERE session_id <> ''
        """,
        {
            "session_id": "CallHQ session id.",
            "state": "open, complete, repaired, unverified or lost.",
            "first_event_at": "When we first heard of it.",
            "reconciled_at": "When its history last told its messages; null if it never did.",
            "repaired_messages": "Messages that history supplied.",
            "reason": "Code of why it is in that state.",
            "next_reading_at": "When its history is to be read next; null: never again.",
        },
    ),
}

# It reads a view, which is all that the reader role may read.
COMPLETE_THROUGH = """
    CREATE FUNCTION analytics.complete_through() RETURNS timestamptz LANGUAGE sql STABLE AS $$
        SELECT coalesce(min(coalesce(reconciled_at, first_event_at)), now())
          FROM analytics.coverage WHERE state = 'open' OR next_reading_at IS NOT NULL
    $$
"""
