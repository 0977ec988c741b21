"""A test of a follow-up has a kind of its own in the audit log."""

from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(GUARD_ACT.format(tests=", 'followups.test'"))


def downgrade() -> None:
    op.execute(GUARD_ACT.format(tests=""))


# As in 0027, with tests of follow-ups.
GUARD_ACT = """
    CREATE OR REPLACE FUNCTION archiver.guard_act() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        is_allowed boolean := CASE
            WHEN NEW.kind IN ('export', 'export.done') THEN true
            WHEN NEW.kind IN ('erase', 'erase.refused', 'erase.replay', 'erase.replay.refused', 'retention')
                THEN has_column_privilege(current_user, 'archiver.erasures', 'act_id', 'INSERT')
            WHEN NEW.kind IN ('followups.add', 'followups.pause', 'followups.remove', 'followups.resume',
                              'followups.retry', 'followups.rotate'{tests})
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
                THEN has_column_privilege(current_user, 'archiver.holds', 'released_at', 'UPDATE')
            WHEN NEW.kind IN ('console.login', 'console.view', 'console.search', 'console.download')
                THEN has_table_privilege(current_user, 'archiver.logins', 'INSERT')
            WHEN NEW.kind IN ('users.add', 'users.disable', 'users.enable', 'users.reset')
                THEN has_table_privilege(current_user, 'archiver.users', 'UPDATE')
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
