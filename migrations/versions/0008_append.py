"""What a session needs to take a new turn at the end of its transcript without a look at the rest."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

SCHEMA = "archiver"


def upgrade() -> None:
    # Null until the next reading, or the next rebuild: until then the whole session is aligned again, as before.
    op.add_column(
        "sessions",
        sa.Column("places", sa.Integer(), comment="Messages of its transcript, if its history was read; else null."),
        schema=SCHEMA,
    )
    op.add_column(
        "sessions",
        sa.Column(
            "append_after",
            sa.DateTime(timezone=True),
            comment="A new turn that begins after this is appended to the transcript; null: all is aligned again.",
        ),
        schema=SCHEMA,
    )
    op.create_index(
        "messages_history_idx",
        "messages",
        ["session_id"],
        schema=SCHEMA,
        postgresql_where=sa.text("source = 'history'"),
    )


def downgrade() -> None:
    op.drop_index("messages_history_idx", "messages", schema=SCHEMA)
    for column in ("append_after", "places"):
        op.drop_column("sessions", column, schema=SCHEMA)
