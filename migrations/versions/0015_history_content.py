"""History's own wording of a message; and the comments of the views name every state of coverage."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
NEW = "history_content"
MEANING = (
    "Text of the history where it differs from content; null where it does not, or no history shows the message."
)

STATES = "open, complete, repaired, ambiguous, unverified or lost"
STATES_BEFORE = "open, complete, repaired, unverified or lost"


def upgrade() -> None:
    # Nullable and without a default: no row is rewritten.
    op.add_column("messages", sa.Column(NEW, sa.Text(), comment=MEANING), schema=SCHEMA)
    # As of content: what people say is not sampled.
    op.execute(f"ALTER TABLE archiver.messages ALTER COLUMN {NEW} SET STATISTICS 0")
    op.execute(f"CREATE OR REPLACE VIEW analytics.messages AS {MESSAGES.format(added=f', m.{NEW}')}")
    op.execute(f"COMMENT ON COLUMN analytics.messages.{NEW} IS '{MEANING}'")
    _comment(STATES)


def downgrade() -> None:
    op.execute("DROP VIEW analytics.messages")
    op.execute(f"CREATE VIEW analytics.messages AS {MESSAGES.format(added='')}")
    op.execute(f"COMMENT ON VIEW analytics.messages IS '{MESSAGES_MEANING}'")
    for column, comment in MESSAGES_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.messages.{column} IS '{comment}'")
    op.drop_column("messages", NEW, schema=SCHEMA)
    _comment(STATES_BEFORE)


def _comment(states: str) -> None:
    op.execute(f"COMMENT ON COLUMN analytics.conversations.coverage IS '{states}; see coverage.'")
    op.execute(f"COMMENT ON COLUMN analytics.coverage.state IS '{states}.'")


# As in 0011, and what is added.
MESSAGES = """
    SELECT m.session_id,
           row_number() OVER (
               PARTITION BY m.session_id
               ORDER BY m.place, coalesce(c.created_at, c.occurred_at, c.first_received_at), c.occurred_at,
                        c.first_received_at, m.chat_id, m.ordinal
           ) AS position,
           CASE WHEN starts_with(m.chat_id, E'\\x1f') THEN NULL ELSE m.chat_id END AS chat_id,
           m.role, m.content, c.created_at, m.source, c.deleted_at, m.in_history, m.content_kind{added}
      FROM archiver.messages m
      LEFT JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
"""
MESSAGES_MEANING = "One row a message, in the order in which it was said."
MESSAGES_COMMENTS = {
    "session_id": "CallHQ session id; empty where no delivery told it.",
    "position": "1, 2, 3 … within the session.",
    "chat_id": "CallHQ chat id; null where only history knows it.",
    "role": "user, assistant, system, tool …",
    "content": "Text.",
    "created_at": "Upstream creation time of its turn; null if not told.",
    "source": "Whence it is known: webhook or history.",
    "deleted_at": "When upstream deleted its turn; null if it did not.",
    "in_history": "Whether the latest reading of the history shows it; null where none could.",
    "content_kind": "What content is: text, refusal, tool_call or other.",
}
