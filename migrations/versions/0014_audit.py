"""The audit log: who may add which entry, when Postgres recorded it and as whom; bounds on what a seal may reach."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
USER = "Database user that added the row (session_user of Postgres); null in rows of older versions."
WHEN = "When Postgres added the row; null in rows of older versions."
WHOSE = "Session of the event, empty where it names none; null in rows of older versions."

COLUMNS = (
    ("acts", "database_user", sa.Text(), USER),
    ("erasures", "recorded_at", sa.DateTime(timezone=True), WHEN),
    ("erasures", "database_user", sa.Text(), USER),
    ("removals", "recorded_at", sa.DateTime(timezone=True), WHEN),
    ("removals", "session_id", sa.Text(), WHOSE),
    ("removals", "database_user", sa.Text(), USER),
    (
        "holds",
        "salt",
        sa.LargeBinary(),
        "Random bytes that the audit log's digest of the value is salted with; null once released.",
    ),
)
TRIGGERS = {"acts": "guard_act", "erasures": "stamp_erasure", "removals": "stamp_removal", "seals": "guard_seal"}
AT = "When it was done, by the clock of Postgres."
AT_BEFORE = "When it was done."


def upgrade() -> None:
    for table, name, kind, comment in COLUMNS:
        op.add_column(table, sa.Column(name, kind, comment=comment), schema=SCHEMA)
    op.execute(f"COMMENT ON COLUMN archiver.acts.at IS '{AT}'")
    # As of the value itself: what identifies a person is not sampled.
    op.execute("ALTER TABLE archiver.holds ALTER COLUMN salt SET STATISTICS 0")
    op.create_index(
        "acts_holds_idx",
        "acts",
        ["id"],
        schema=SCHEMA,
        postgresql_where=sa.text("kind IN ('hold.add', 'hold.release')"),
    )
    for function in (GUARD_ACT, STAMP_ERASURE, STAMP_REMOVAL, GUARD_SEAL):
        op.execute(function)
    op.execute(GUARD_HOLD.format(salt="NEW.salt := NULL;"))
    for table, function in TRIGGERS.items():
        op.execute(
            f"CREATE TRIGGER {table}_{function.split('_')[0]} BEFORE INSERT ON archiver.{table}"
            f" FOR EACH ROW EXECUTE FUNCTION archiver.{function}()"
        )


def downgrade() -> None:
    for table, function in TRIGGERS.items():
        op.execute(f"DROP TRIGGER {table}_{function.split('_')[0]} ON archiver.{table}")
        op.execute(f"DROP FUNCTION archiver.{function}()")
    op.execute(GUARD_HOLD.format(salt=""))
    op.drop_index("acts_holds_idx", "acts", schema=SCHEMA)
    op.execute(f"COMMENT ON COLUMN archiver.acts.at IS '{AT_BEFORE}'")
    for table, name, _, _ in reversed(COLUMNS):
        op.drop_column(table, name, schema=SCHEMA)


# Each kind of entry, and what whoever adds it must be allowed to do: the privileges of the command that makes it. The
# owner of the table may add any. Time and user are never the caller's.
GUARD_ACT = """
    CREATE FUNCTION archiver.guard_act() RETURNS trigger LANGUAGE plpgsql
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
                THEN has_column_privilege(current_user, 'archiver.holds', 'released_at', 'UPDATE')
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

STAMP_ERASURE = """
    CREATE FUNCTION archiver.stamp_erasure() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        NEW.recorded_at := clock_timestamp();
        NEW.database_user := session_user;
        RETURN NEW;
    END
    $$
"""

# The event goes right after: its session is known only now.
STAMP_REMOVAL = """
    CREATE FUNCTION archiver.stamp_removal() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        NEW.recorded_at := clock_timestamp();
        NEW.database_user := session_user;
        NEW.session_id := coalesce((SELECT e.session_id FROM archiver.events e WHERE e.id = NEW.event_id), '');
        RETURN NEW;
    END
    $$
"""

# A seal follows the newest one, reaches no further than there are rows, and lists a leaf for each of them.
# Events that retention removed are in `removals`. The first seal of a table also lists rows of ids below 1.
GUARD_SEAL = """
    CREATE FUNCTION archiver.guard_seal() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        before record;
        reached bigint[] := ARRAY[
            NEW.events_through, NEW.recounts_through, NEW.acts_through, NEW.erasures_through, NEW.removals_through];
        since bigint[];
        newest bigint[];
        leaves bigint;
    BEGIN
        SELECT s.id, ARRAY[s.events_through, s.recounts_through, s.acts_through, s.erasures_through,
                           s.removals_through] AS reached
          INTO before FROM archiver.seals s ORDER BY s.id DESC LIMIT 1;
        since := coalesce(before.reached, ARRAY[0, 0, 0, 0, 0]::bigint[]);
        IF NEW.id <> coalesce(before.id, 0) + 1 THEN
            RAISE EXCEPTION 'seal % does not follow seal %', NEW.id, coalesce(before.id, 0)
                USING ERRCODE = 'check_violation';
        END IF;
        newest := ARRAY[
            greatest((SELECT max(id) FROM archiver.events), (SELECT max(event_id) FROM archiver.removals)),
            (SELECT max(id) FROM archiver.recounts), (SELECT max(id) FROM archiver.acts),
            (SELECT max(id) FROM archiver.erasures), (SELECT max(id) FROM archiver.removals)];
        FOR place IN 1..5 LOOP
            IF reached[place] < since[place] OR reached[place] > greatest(newest[place], since[place]) THEN
                RAISE EXCEPTION 'seal % reaches beyond the rows that there are, or back', NEW.id
                    USING ERRCODE = 'check_violation';
            END IF;
        END LOOP;
        SELECT (SELECT count(*) FROM archiver.events WHERE id > since[1] AND id <= reached[1])
             + (SELECT count(*) FROM archiver.recounts WHERE id > since[2] AND id <= reached[2])
             + (SELECT count(*) FROM archiver.acts WHERE id > since[3] AND id <= reached[3])
             + (SELECT count(*) FROM archiver.erasures WHERE id > since[4] AND id <= reached[4])
             + (SELECT count(*) FROM archiver.removals WHERE id > since[5] AND id <= reached[5])
          INTO leaves;
        IF octet_length(NEW.entries) <> 41 * leaves OR leaves = 0 THEN
            RAISE EXCEPTION 'seal % lists other than the % rows that it reaches', NEW.id, leaves
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END
    $$
"""

# As in 0003, but that the salt goes with the value.
GUARD_HOLD = """
    CREATE OR REPLACE FUNCTION archiver.guard_hold() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            IF OLD.released_at IS NULL
               AND to_jsonb(NEW) - '{{released_at,released_by}}'::text[]
                   = to_jsonb(OLD) - '{{released_at,released_by}}'::text[]
            THEN
                IF NEW.released_at IS NOT NULL THEN
                    NEW.value := NULL;
                    {salt}
                END IF;
                RETURN NEW;
            END IF;
        END IF;
        RAISE EXCEPTION 'a legal hold is only placed and released' USING ERRCODE = 'restrict_violation';
    END
    $$
"""
