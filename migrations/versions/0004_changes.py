"""The change feed: what a transaction changed, written with it, and the order in which consumers see it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "outbox",
        sa.Column(
            "id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Grows with writing, not with committing: nothing may be read by it.",
        ),
        sa.Column("changed_at", TIME, nullable=False, comment="When the changes were made."),
        sa.Column(
            "changes",
            postgresql.JSON(none_as_null=True),
            nullable=False,
            comment="What changed, in order: a list of type, session_id, chat_id and seal_id; no content.",
        ),
        sa.PrimaryKeyConstraint("id", name="outbox_pkey"),
        schema=SCHEMA,
        comment="Changes as they were committed, one row a transaction, until a worker publishes them.",
    )
    op.create_table(
        "changes",
        sa.Column(
            "cursor",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="1, 2, 3 … without gaps; visible in this order.",
        ),
        sa.Column("type", sa.Text(), nullable=False, comment="What changed, such as chat.created."),
        sa.Column(
            "session_id",
            sa.Text(),
            nullable=False,
            server_default="",
            comment="Conversation; empty where none is known.",
        ),
        sa.Column("chat_id", sa.Text(), comment="Turn; null for changes of whole sessions and of seals."),
        sa.Column("seal_id", sa.BigInteger(), comment="Seal; null for changes of conversations."),
        sa.Column("changed_at", TIME, nullable=False, comment="When it changed; the order is that of cursor."),
        sa.PrimaryKeyConstraint("cursor", name="changes_pkey"),
        schema=SCHEMA,
        comment="The change feed: what changed in the archive, once and in an order that never changes.",
    )
    # A row lives for as long as nobody has published it: what is dead must not be walked over for long.
    op.execute(
        "ALTER TABLE archiver.outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)"
    )
    op.execute(
        "CREATE VIEW analytics.changes AS"
        " SELECT cursor, type, session_id, chat_id, seal_id, changed_at FROM archiver.changes"
    )
    op.execute("COMMENT ON VIEW analytics.changes IS 'One row a change of the archive: a feed to poll by cursor.'")
    for column, comment in VIEW_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.changes.{column} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW analytics.changes")
    op.drop_table("changes", schema=SCHEMA)
    op.drop_table("outbox", schema=SCHEMA)


VIEW_COMMENTS = {
    "cursor": "1, 2, 3 … without gaps, visible in this order: read WHERE cursor > the last one that you have seen.",
    "type": "What changed, such as chat.created; docs/changes.md lists the types.",
    "session_id": "CallHQ session id; empty where none is known.",
    "chat_id": "CallHQ chat id; null for changes of whole sessions and of seals.",
    "seal_id": "Seal; null for changes of conversations.",
    "changed_at": "When it changed.",
}
