"""Epochs: which database this is, so that a copy or one that went back is recognised."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

SCHEMA = "archiver"


def upgrade() -> None:
    op.create_table(
        "epochs",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False, comment="1, 2, 3 …; the last counts."),
        sa.Column(
            "system_identifier",
            sa.Text(),
            nullable=False,
            comment="Of the cluster; empty where the user may not ask.",
        ),
        sa.Column("database_oid", sa.BigInteger(), nullable=False, comment="Object id of the database."),
        sa.Column("timeline", sa.BigInteger(), comment="At its beginning."),
        sa.Column("place", sa.Text(), comment="Which files an embedded database has; null of any other."),
        sa.Column("cursor", sa.BigInteger(), nullable=False, comment="Newest change at its beginning."),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False, comment="When it began."),
        sa.PrimaryKeyConstraint("id", name="epochs_pkey"),
        schema=SCHEMA,
        comment="Which database this is: begun by the first process that served it, and by archiver adopt.",
    )


def downgrade() -> None:
    op.drop_table("epochs", schema=SCHEMA)
