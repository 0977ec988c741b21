"""Workers: what each reports about its duties, and when shared duties were last begun."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False, comment="Host, process id and a random part."),
        sa.Column("host", sa.Text(), nullable=False, comment="Host name of the machine."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Process id there."),
        sa.Column("version", sa.Text(), nullable=False, comment="Version of callhq-archiver."),
        sa.Column("started_at", TIME, nullable=False, comment="When the process started, on its own clock."),
        sa.Column("beat_at", TIME, nullable=False, comment="When it last reported, on the clock of Postgres."),
        sa.Column(
            "duties",
            postgresql.JSON(),
            nullable=False,
            comment="Each duty: state (starting, running, failed, hanging or off), since when, why, restarts.",
        ),
        sa.PrimaryKeyConstraint("id", name="workers_pkey"),
        sa.Index("workers_beat_at_idx", "beat_at"),
        schema=SCHEMA,
        comment="What each worker last reported about its duties; rows that are a day old are deleted.",
    )
    op.create_table(
        "duties",
        sa.Column("name", sa.Text(), nullable=False, comment="A duty that one worker at a time does."),
        sa.Column("begun_at", TIME, nullable=False, comment="When a worker last began it, on the clock of Postgres."),
        sa.PrimaryKeyConstraint("name", name="duties_pkey"),
        schema=SCHEMA,
        comment="When duties that workers share were last begun.",
    )


def downgrade() -> None:
    for table in ("duties", "workers"):
        op.drop_table(table, schema=SCHEMA)
