"""The rewriting of a search partition retries only the exchange; changes say whether they concern one turn alone."""

from typing import Any

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

COLUMNS = {
    ("search_partitions", "stale_since"): (
        "timestamptz",
        "When words of erased messages were first removed; null: its files have none.",
    ),
    ("search_partitions", "attempted_at"): ("timestamptz", "When a worker last began to rewrite it; null: never."),
    ("changes", "is_alone"): (
        "boolean",
        "True: no row of another turn changed with this turn; null: rows of others may have changed.",
    ),
}
FUNCTION = "archiver.rebuild_search(text, integer, double precision)"
EARLIER_FUNCTION = "archiver.rebuild_search(text)"

# The copy has no dead row and no lexeme of one: an index that is only vacuumed or rebuilt in place may keep both.
# Others read and write while the rows are copied. Then the two tables are exchanged, which waits for the transactions
# of readers: only briefly, because other readers queue behind it, and several times, because copying takes long.
REBUILD = """
    CREATE FUNCTION archiver.rebuild_search(partition text, attempts integer DEFAULT 1,
                                            pause double precision DEFAULT 0) RETURNS boolean
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
    DECLARE
        old archiver.search_partitions;
        copied bigint;
        bounds text;
    BEGIN
        -- One rebuild at a time; erasures may update the rows.
        LOCK TABLE archiver.search_partitions IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
        SELECT * INTO old FROM archiver.search_partitions WHERE name = partition AND stale_at IS NOT NULL;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        SELECT page INTO copied FROM archiver.search_state;
        bounds := CASE WHEN old.since IS NULL THEN 'DEFAULT'
                       ELSE format('FOR VALUES FROM (%L) TO (%L)', old.since, old.until) END;
        CREATE TABLE archiver_search.copy (LIKE archiver.search INCLUDING STORAGE);
        ALTER TABLE archiver_search.copy ALTER COLUMN lexemes SET STATISTICS 0, ALTER COLUMN digest SET STATISTICS 0;
        IF old.since IS NOT NULL THEN
            -- So that Postgres need not read the rows again when it attaches them.
            EXECUTE format('ALTER TABLE archiver_search.copy ADD CONSTRAINT bounds'
                           ' CHECK (began_at >= %L AND began_at < %L)', old.since, old.until);
        END IF;
        EXECUTE format('INSERT INTO archiver_search.copy SELECT * FROM archiver_search.%I', old.name);
        ALTER TABLE archiver_search.copy ADD PRIMARY KEY (session_id, chat_id, ordinal, began_at);
        CREATE INDEX ON archiver_search.copy USING gin (lexemes) WITH (fastupdate = off);

        FOR attempt IN 1 .. attempts LOOP
            BEGIN
                LOCK TABLE archiver_jobs.lock_indexing IN EXCLUSIVE MODE;
                EXECUTE format('LOCK TABLE ONLY archiver.search, ONLY archiver_search.%I, ONLY archiver_search.other'
                               ' IN ACCESS EXCLUSIVE MODE', old.name);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                -- Both locks are released.
                IF attempt = attempts THEN
                    RAISE;
                END IF;
            END;
            PERFORM pg_sleep(pause);
        END LOOP;
        EXECUTE format(
            'DELETE FROM archiver_search.copy c WHERE NOT EXISTS ('
            ' SELECT FROM archiver_search.%I o WHERE o.session_id = c.session_id AND o.chat_id = c.chat_id'
            ' AND o.ordinal = c.ordinal AND o.began_at = c.began_at AND o.page = c.page)', old.name);
        EXECUTE format(
            'INSERT INTO archiver_search.copy SELECT * FROM archiver_search.%I o WHERE o.page > %L AND NOT EXISTS ('
            ' SELECT FROM archiver_search.copy c WHERE o.session_id = c.session_id AND o.chat_id = c.chat_id'
            ' AND o.ordinal = c.ordinal AND o.began_at = c.began_at)', old.name, copied);
        EXECUTE format('ALTER TABLE archiver.search DETACH PARTITION archiver_search.%I', old.name);
        EXECUTE format('DROP TABLE archiver_search.%I', old.name);
        EXECUTE format('ALTER TABLE archiver_search.copy RENAME TO %I', old.name);
        EXECUTE format('ALTER TABLE archiver.search ATTACH PARTITION archiver_search.%I %s', old.name, bounds);
        IF old.since IS NOT NULL THEN
            EXECUTE format('ALTER TABLE archiver_search.%I DROP CONSTRAINT bounds', old.name);
        END IF;
        -- Rows that were deleted while the others were copied are in the copy, too.
        UPDATE archiver.search_partitions p
           SET rebuilt_at = clock_timestamp(),
               stale_at = CASE WHEN p.stale_at <> old.stale_at THEN p.stale_at END,
               stale_since = CASE WHEN p.stale_at <> old.stale_at THEN p.stale_at END
         WHERE p.name = old.name;
        RETURN true;
    END
    $$
"""
COMMENT = "Rewrite a partition of archiver.search without deleted rows; false if it is not stale."


def upgrade() -> None:
    for (table, name), (kind, comment) in COLUMNS.items():
        op.execute(f"ALTER TABLE archiver.{table} ADD COLUMN {name} {kind}")
        op.execute(f"COMMENT ON COLUMN archiver.{table}.{name} IS '{comment}'")
    op.execute("UPDATE archiver.search_partitions SET stale_since = stale_at")
    op.execute(f"DROP FUNCTION {EARLIER_FUNCTION}")
    op.execute(REBUILD)
    op.execute(f"REVOKE EXECUTE ON FUNCTION {FUNCTION} FROM PUBLIC")
    op.execute(f"COMMENT ON FUNCTION {FUNCTION} IS '{COMMENT}'")


def downgrade() -> None:
    script: Any = op.get_context().script
    op.execute(f"DROP FUNCTION {FUNCTION}")
    op.execute(script.get_revision("0025").module.REBUILD)
    op.execute(f"REVOKE EXECUTE ON FUNCTION {EARLIER_FUNCTION} FROM PUBLIC")
    op.execute(f"COMMENT ON FUNCTION {EARLIER_FUNCTION} IS '{COMMENT}'")
    for table, name in COLUMNS:
        op.execute(f"ALTER TABLE archiver.{table} DROP COLUMN {name}")
