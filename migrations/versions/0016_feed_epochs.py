"""Epochs in the change feed, and what machines found wrong with an epoch."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
GIVEN = "Greatest cursor known to be given before it, lost ones included; null in rows of older versions."

# The first epoch covers the changes before it, too. Its name differs between copies that are adopted apart.
EPOCHS = """
    CREATE VIEW analytics.epochs AS
    SELECT id AS number,
           id || '-' || substr(md5(concat_ws(' ', system_identifier, database_oid, extract(epoch FROM began_at))),
                               1, 8) AS epoch,
           began_at,
           CASE WHEN id = first THEN 0 ELSE cursor END AS cursor,
           CASE WHEN id = first THEN 0 ELSE coalesce(given, cursor) END AS given
      FROM archiver.epochs CROSS JOIN (SELECT min(id) AS first FROM archiver.epochs) AS f
"""
EPOCH_COMMENTS = {
    "number": "1, 2, 3 …; the last counts.",
    "epoch": "Its name in analytics.changes.",
    "began_at": "When it began.",
    "cursor": "Newest change that the database had at its beginning.",
    "given": "Greatest cursor known to be given before it: those after cursor are of changes that the database lost.",
}

CHANGES = """
    CREATE OR REPLACE VIEW analytics.changes AS
    SELECT cursor, type, session_id, chat_id, seal_id, changed_at{epoch} FROM archiver.changes
"""
EPOCH = """,
           (SELECT e.epoch FROM analytics.epochs e WHERE e.cursor < changes.cursor ORDER BY e.number DESC LIMIT 1)
               AS epoch"""
EPOCH_COMMENT = (
    "Epoch in which its cursor was given, see analytics.epochs; null before any process served the database."
)

CURSOR = (
    "1, 2, 3 … in each epoch without gaps, visible in this order: read WHERE cursor > the last that you have seen."
)


def upgrade() -> None:
    op.add_column("epochs", sa.Column("given", sa.BigInteger(), comment=GIVEN), schema=SCHEMA)
    op.create_table(
        "epoch_faults",
        sa.Column(
            "epoch_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Epoch in which it was found."
        ),
        sa.Column("host", sa.Text(), nullable=False, comment="Host name of the machine that found it."),
        sa.Column(
            "reason",
            sa.Text(),
            nullable=False,
            comment="What the database lacks of what that machine saw committed.",
        ),
        sa.Column(
            "cursor", sa.BigInteger(), nullable=False, comment="Newest change that the machine saw in that epoch."
        ),
        sa.Column(
            "found_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When it was found, on the clock of Postgres.",
        ),
        sa.PrimaryKeyConstraint("epoch_id", name="epoch_faults_pkey"),
        schema=SCHEMA,
        comment="Epochs in which the database went back: it is not served until archiver adopt begins another.",
    )
    op.execute(EPOCHS)
    op.execute("COMMENT ON VIEW analytics.epochs IS 'One row an epoch of the change feed.'")
    for column, comment in EPOCH_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.epochs.{column} IS '{comment}'")
    op.execute(CHANGES.format(epoch=EPOCH))
    op.execute(f"COMMENT ON COLUMN analytics.changes.epoch IS '{EPOCH_COMMENT}'")
    op.execute(f"COMMENT ON COLUMN analytics.changes.cursor IS '{CURSOR}'")


def downgrade() -> None:
    op.execute("DROP VIEW analytics.changes")
    op.execute("DROP VIEW analytics.epochs")
    op.execute(CHANGES.format(epoch=""))
    op.execute("COMMENT ON VIEW analytics.changes IS 'One row a change of the archive: a feed to poll by cursor.'")
    for column, comment in EARLIER.items():
        op.execute(f"COMMENT ON COLUMN analytics.changes.{column} IS '{comment}'")
    op.drop_table("epoch_faults", schema=SCHEMA)
    op.drop_column("epochs", "given", schema=SCHEMA)


# As it was before.
EARLIER = {
    "cursor": "1, 2, 3 … without gaps, visible in this order: read WHERE cursor > the last one that you have seen.",
    "type": "What changed, such as chat.created; docs/changes.md lists the types.",
    "session_id": "CallHQ session id; empty where none is known.",
    "chat_id": "CallHQ chat id; null for changes of whole sessions and of seals.",
    "seal_id": "Seal; null for changes of conversations.",
    "changed_at": "When it changed.",
}
