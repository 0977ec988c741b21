"""The time until which a subscription's circuit breaker is open, under the field's name."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("subscriptions", "closed_until", new_column_name="open_until", schema="archiver")


def downgrade() -> None:
    op.alter_column("subscriptions", "open_until", new_column_name="closed_until", schema="archiver")
