"""Follow-ups: who is told of changes, what is on its way to them, and each attempt at it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)

# What is secret or may be content: the planner would keep samples of it, for which it has no use.
UNSAMPLED = {
    "subscriptions": ("url", "value", "contains", "secret", "previous_secret"),
    "attempts": ("answer",),
}


def upgrade() -> None:
    op.create_table(
        "subscriptions",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="For archiver followups show."
        ),
        sa.Column("url", sa.Text(), nullable=False, comment="Where deliveries are sent."),
        sa.Column("events", postgresql.ARRAY(sa.Text()), nullable=False, comment="Types of changes that are told."),
        sa.Column("assistant_id", sa.Text(), comment="Only of conversations of this assistant; null: of any."),
        sa.Column("variable", sa.Text(), comment="Only where this variable has this value; null: anywhere."),
        sa.Column("value", sa.Text(), comment="Value of the variable."),
        sa.Column(
            "contains", sa.Text(), comment="Only where a message holds this text, in whatever case; null: anywhere."
        ),
        sa.Column(
            "is_ordered",
            sa.Boolean(),
            nullable=False,
            comment="Whether each session is told in the order of the feed.",
        ),
        sa.Column("concurrency", sa.Integer(), nullable=False, comment="Deliveries that may be under way at a time."),
        sa.Column("secret", sa.Text(), nullable=False, comment="Signs deliveries; whsec_ and base64."),
        sa.Column("previous_secret", sa.Text(), comment="The one before, which signs as well for a while."),
        sa.Column("previous_until", TIME, comment="Until then."),
        sa.Column("cursor", sa.BigInteger(), nullable=False, comment="Up to here the feed was looked at."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was added."),
        sa.Column("paused_at", TIME, comment="When it was paused; null: it is at work."),
        sa.Column(
            "pause_reason",
            sa.Text(),
            comment="Why: paused by hand, gone (the receiver said 410), or failing for long.",
        ),
        sa.Column(
            "failures", sa.Integer(), nullable=False, server_default="0", comment="Attempts that failed in a row."
        ),
        sa.Column("failing_since", TIME, comment="When the first of them did; null where the latest did not."),
        sa.Column("closed_until", TIME, comment="Its receiver is left alone until then."),
        sa.Column("leased_by", sa.Text(), comment="Which worker sends for it at present."),
        sa.Column("leased_until", TIME, comment="Another may after this time."),
        sa.PrimaryKeyConstraint("id", name="subscriptions_pkey"),
        schema=SCHEMA,
        comment="Who is told of changes, and up to where they were.",
    )

    op.create_table(
        "deliveries",
        sa.Column("subscription_id", sa.BigInteger(), nullable=False, autoincrement=False, comment="To whom."),
        sa.Column(
            "cursor", sa.BigInteger(), nullable=False, autoincrement=False, comment="Which change of the feed."
        ),
        sa.Column("type", sa.Text(), nullable=False, comment="What changed."),
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation; empty where none is known."),
        sa.Column("chat_id", sa.Text(), comment="Turn; null for changes of whole sessions and of seals."),
        sa.Column("seal_id", sa.BigInteger(), comment="Seal; null for changes of conversations."),
        sa.Column("changed_at", TIME, nullable=False, comment="When it changed."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was found to be for this subscription."),
        sa.Column(
            "state",
            sa.Text(),
            nullable=False,
            server_default="pending",
            comment="pending, delivered or dead: given up.",
        ),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0", comment="Attempts so far."),
        sa.Column(
            "last_attempt", sa.Integer(), nullable=False, comment="Number of the attempt after which it is given up."
        ),
        sa.Column("due_at", TIME, nullable=False, comment="It is not tried before."),
        sa.Column("ended_at", TIME, comment="When it was delivered or given up."),
        sa.PrimaryKeyConstraint("subscription_id", "cursor", name="deliveries_pkey"),
        sa.Index("deliveries_due_idx", "subscription_id", "due_at", postgresql_where=sa.text("state = 'pending'")),
        sa.Index("deliveries_session_idx", "session_id", "subscription_id", "cursor"),
        sa.Index("deliveries_ended_at_idx", "ended_at", postgresql_where=sa.text("ended_at IS NOT NULL")),
        sa.Index("deliveries_dead_idx", "subscription_id", "cursor", postgresql_where=sa.text("state = 'dead'")),
        schema=SCHEMA,
        comment="Follow-ups at hand, ids only: content is read as it is sent, and the queue is the feed.",
    )

    op.create_table(
        "attempts",
        sa.Column("subscription_id", sa.BigInteger(), nullable=False, autoincrement=False, comment="To whom."),
        sa.Column(
            "cursor", sa.BigInteger(), nullable=False, autoincrement=False, comment="Which change of the feed."
        ),
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False, comment="1, 2, 3 … of its delivery."),
        sa.Column("at", TIME, nullable=False, comment="When it began."),
        sa.Column("seconds", sa.Float(), nullable=False, comment="How long it took."),
        sa.Column("status", sa.Integer(), comment="Status of the answer; null where there was none."),
        sa.Column("fault", sa.Text(), comment="What was wrong; null where it was delivered."),
        sa.Column(
            "answer", sa.LargeBinary(), comment="First 256 bytes of the answer; null once what it is about is erased."
        ),
        sa.PrimaryKeyConstraint("subscription_id", "cursor", "number", name="attempts_pkey"),
        schema=SCHEMA,
        comment="Each attempt at a delivery, and what came of it.",
    )
    for table, columns in UNSAMPLED.items():
        for column in columns:
            op.execute(f"ALTER TABLE archiver.{table} ALTER COLUMN {column} SET STATISTICS 0")
    # Most rows change state within moments: what is dead must not be walked over for long.
    op.execute(
        "ALTER TABLE archiver.deliveries SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02,"
        " autovacuum_vacuum_threshold = 5000)"
    )
    op.execute("ALTER TABLE archiver.subscriptions SET (fillfactor = 20)")  # few rows, changed all the time


def downgrade() -> None:
    for table in ("attempts", "deliveries", "subscriptions"):
        op.drop_table(table, schema=SCHEMA)
