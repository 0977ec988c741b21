"""Postgres refuses an audit entry with a long actor or reason; two comments say on what they depend."""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

# Each comment, and the one before.
COMMENTS = {
    "archiver.chats.deleted_at": (
        "Tombstone: when upstream deleted it; content stays, unless ARCHIVER_ON_DELETE=erase.",
        "Tombstone: when upstream deleted it; content stays.",
    ),
    "archiver.changes.cursor": (
        "1, 2, 3 … in each epoch without gaps; visible in this order.",
        "1, 2, 3 … without gaps; visible in this order.",
    ),
}


def upgrade() -> None:
    op.execute(LIMIT_ACT)
    op.execute(
        "CREATE TRIGGER acts_limit BEFORE INSERT ON archiver.acts FOR EACH ROW EXECUTE FUNCTION archiver.limit_act()"
    )
    for column, (comment, _) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN {column} IS '{comment}'")


def downgrade() -> None:
    for column, (_, comment) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN {column} IS '{comment}'")
    op.execute("DROP TRIGGER acts_limit ON archiver.acts")
    op.execute("DROP FUNCTION archiver.limit_act()")


# Not a constraint, because longer texts of earlier entries stay: they are sealed.
LIMIT_ACT = """
    CREATE FUNCTION archiver.limit_act() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        IF greatest(length(NEW.actor), length(NEW.reason)) > 1000 THEN
            RAISE EXCEPTION 'actor and reason of an audit entry have at most 1000 characters each'
                USING ERRCODE = 'string_data_right_truncation';
        END IF;
        RETURN NEW;
    END
    $$
"""
