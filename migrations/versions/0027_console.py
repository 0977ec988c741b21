"""The users of the console and their logins; what each database user may record about them in the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

SCHEMA = "archiver"


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("name", sa.Text(), nullable=False, comment="Name for the login; lower case."),
        sa.Column("role", sa.Text(), nullable=False, comment="viewer, reader, auditor or operator."),
        sa.Column(
            "password_hash",
            sa.Text(),
            nullable=False,
            comment="Argon2id hash of the password, with salt and parameters.",
        ),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False, comment="When the user was added."),
        sa.Column(
            "changed_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Latest change of role, password or state.",
        ),
        sa.Column(
            "disabled_at",
            sa.DateTime(timezone=True),
            comment="Since when the user may not log in; null: the user may.",
        ),
        sa.PrimaryKeyConstraint("name", name="users_pkey"),
        sa.CheckConstraint("role IN ('viewer', 'reader', 'auditor', 'operator')", name="users_role_known"),
        schema=SCHEMA,
        comment="People who may log in to the console.",
    )
    op.create_table(
        "logins",
        sa.Column(
            "token_digest",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of the token in the browser's cookie.",
        ),
        sa.Column("user_name", sa.Text(), nullable=False, comment="User."),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False, comment="When the user logged in."),
        sa.Column(
            "seen_at", sa.DateTime(timezone=True), nullable=False, comment="Latest request, to within a minute."
        ),
        sa.PrimaryKeyConstraint("token_digest", name="logins_pkey"),
        schema=SCHEMA,
        comment="Current logins to the console; a row is deleted when its login ends.",
    )
    op.create_index("logins_user_name_idx", "logins", ["user_name"], schema=SCHEMA)
    op.execute(GUARD_ACT.format(console=CONSOLE))


def downgrade() -> None:
    op.execute(GUARD_ACT.format(console=""))
    op.drop_table("logins", schema=SCHEMA)
    op.drop_table("users", schema=SCHEMA)


# Who may log in others may record it; who may add users may record that.
CONSOLE = """
            WHEN NEW.kind IN ('console.login', 'console.view', 'console.search', 'console.download')
                THEN has_table_privilege(current_user, 'archiver.logins', 'INSERT')
            WHEN NEW.kind IN ('users.add', 'users.disable', 'users.enable', 'users.reset')
                THEN has_table_privilege(current_user, 'archiver.users', 'UPDATE')"""

# As in 0014, with the kinds of the console.
GUARD_ACT = """
    CREATE OR REPLACE FUNCTION archiver.guard_act() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        is_allowed boolean := CASE
            WHEN NEW.kind IN ('export', 'export.done') THEN true
            WHEN NEW.kind IN ('erase', 'erase.refused', 'erase.replay', 'erase.replay.refused', 'retention')
                THEN has_column_privilege(current_user, 'archiver.erasures', 'act_id', 'INSERT')
            WHEN NEW.kind IN ('followups.add', 'followups.pause', 'followups.remove', 'followups.resume',
                              'followups.retry', 'followups.rotate')
                THEN has_table_privilege(current_user, 'archiver.subscriptions', 'UPDATE')
            WHEN NEW.kind IN ('quarantine.retry')
                THEN has_table_privilege(current_user, 'archiver.quarantine', 'DELETE')
            WHEN NEW.kind IN ('settings.changed')
                THEN has_column_privilege(current_user, 'archiver.events', 'body', 'INSERT')
            WHEN NEW.kind IN ('adopt')
                THEN has_table_privilege(current_user, 'archiver.epochs', 'INSERT')
            WHEN NEW.kind IN ('hold.add')
                THEN has_table_privilege(current_user, 'archiver.holds', 'INSERT')
            WHEN NEW.kind IN ('hold.release')
                THEN has_column_privilege(current_user, 'archiver.holds', 'released_at', 'UPDATE'){console}
            ELSE false
        END;
    BEGIN
        IF NOT is_allowed AND NOT (
            SELECT pg_has_role(current_user, c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = TG_RELID
        ) THEN
            RAISE EXCEPTION 'database user % may not add entries of kind % to the audit log', current_user, NEW.kind
                USING ERRCODE = 'insufficient_privilege';
        END IF;
        NEW.at := clock_timestamp();
        NEW.database_user := session_user;
        RETURN NEW;
    END
    $$
"""
