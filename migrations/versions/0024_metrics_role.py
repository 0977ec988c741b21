"""A role that sees numbers, without content and without variables."""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Its privileges are granted after all migrations. Without the right to create roles, deploy/roles.sql creates it.
    op.execute(
        """
        DO $$
        BEGIN
            CREATE ROLE archiver_metrics NOLOGIN;
        EXCEPTION
            WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
        END
        $$
        """
    )


def downgrade() -> None:
    """Keep the role: it belongs to the whole cluster, and other databases may use it."""
