"""History responses in pieces: their messages once for each session, and the guards that keep the bytes provable."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
BODY = "The exact bytes of the first delivery; null once erased, and where frame and runs are in their place."
OLDER_BODY = "The exact bytes of the first delivery; null once erased."
CONTENT = (("pieces", "content"), ("pieces", "digest"), ("events", "frame"))


def upgrade() -> None:
    for name, kind, comment in COLUMNS:
        op.add_column("events", sa.Column(name, postgresql.ARRAY(kind), comment=comment), schema=SCHEMA)
    op.execute(f"COMMENT ON COLUMN archiver.events.body IS '{BODY}'")
    op.create_table(
        "pieces",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation."),
        sa.Column("number", sa.Integer(), nullable=False, comment="1, 2, 3 … within the session."),
        sa.Column(
            "digest", sa.LargeBinary(), nullable=False, comment="First 16 bytes of the SHA-256 of the content."
        ),
        sa.Column(
            "content",
            sa.LargeBinary(),
            nullable=False,
            comment="A message as a history response has it, byte for byte.",
        ),
        sa.PrimaryKeyConstraint("session_id", "number", name="pieces_pkey"),
        schema=SCHEMA,
        comment="The messages of history responses that the ledger holds in pieces, each once for its session.",
    )
    # Content that an erasure takes: the planner must keep no samples of it.
    for table, column in CONTENT:
        op.execute(f"ALTER TABLE archiver.{table} ALTER COLUMN {column} SET STATISTICS 0")
    op.execute(BODY_OF)
    op.execute(
        "COMMENT ON FUNCTION archiver.body_of(text, bytea[], integer[])"
        " IS 'The exact bytes of a history response in pieces: of its session_id, frame and runs.'"
    )
    op.execute(GUARD_EVENT)
    op.execute(GUARD_PIECES)
    op.execute("DROP TRIGGER events_guard ON archiver.events")
    op.execute(_events_guard(", frame, runs"))
    op.execute(
        "CREATE TRIGGER pieces_guard AFTER DELETE ON archiver.pieces REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION archiver.guard_pieces()"
    )
    op.execute(
        "CREATE TRIGGER pieces_no_update BEFORE UPDATE ON archiver.pieces"
        " FOR EACH ROW EXECUTE FUNCTION archiver.refuse_change()"
    )
    op.execute(
        "CREATE TRIGGER pieces_no_truncate BEFORE TRUNCATE ON archiver.pieces"
        " FOR EACH STATEMENT EXECUTE FUNCTION archiver.refuse_change()"
    )


def downgrade() -> None:
    # The older schema knows a response only as its bytes, and its guard lets nothing be put back.
    op.execute("ALTER TABLE archiver.events DISABLE TRIGGER events_guard")
    op.execute(
        "UPDATE archiver.events SET body = archiver.body_of(session_id, frame, runs), frame = NULL, runs = NULL"
        " WHERE runs IS NOT NULL"
    )
    op.execute("ALTER TABLE archiver.events ENABLE TRIGGER events_guard")
    op.drop_table("pieces", schema=SCHEMA)
    op.execute("DROP FUNCTION archiver.guard_pieces()")
    op.execute("DROP TRIGGER events_guard ON archiver.events")
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    older = script.get_revision("0003").module.GUARD_EVENT
    op.execute(older.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1))
    op.execute(_events_guard(""))
    op.execute("DROP FUNCTION archiver.body_of(text, bytea[], integer[])")
    op.execute(f"COMMENT ON COLUMN archiver.events.body IS '{OLDER_BODY}'")
    for name, _, _ in COLUMNS:
        op.drop_column("events", name, schema=SCHEMA)


COLUMNS = (
    (
        "frame",
        sa.LargeBinary(),
        "Of a history response in pieces: its bytes before the messages, between two of them, after them.",
    ),
    (
        "runs",
        sa.Integer(),
        "Of a history response in pieces: first and last number of each run of pieces that it is made of.",
    ),
)


def _events_guard(more: str) -> str:
    return (
        "CREATE TRIGGER events_guard BEFORE DELETE OR UPDATE OF session_id, dedupe_key, id, type, source, chat_id,"
        f" received_at, occurred_at, key_id, body, salt, body_digest{more} ON archiver.events"
        " FOR EACH ROW EXECUTE FUNCTION archiver.guard_event()"
    )


# With the rights of the caller, who reads the pieces.
BODY_OF = """
    CREATE FUNCTION archiver.body_of(session_id text, frame bytea[], runs integer[]) RETURNS bytea
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
        SELECT frame[1] || coalesce(string_agg(p.content, frame[2] ORDER BY r.place, p.number), '') || frame[3]
          FROM generate_series(1, array_length(runs, 1), 2) AS r (place)
          JOIN archiver.pieces p ON p.session_id = body_of.session_id
           AND p.number BETWEEN runs[r.place] AND runs[r.place + 1]
    $$
"""

# Of a ledger row only three things change: its counters, upwards; its content goes, once and for all; and its bytes
# give way to a frame and runs of pieces that make exactly these bytes.
GUARD_EVENT = """
    CREATE OR REPLACE FUNCTION archiver.guard_event() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            IF NOT EXISTS (SELECT FROM archiver.removals r WHERE r.event_id = OLD.id) THEN
                RAISE EXCEPTION 'archiver.events is append-only: event % may not be removed', OLD.id
                    USING ERRCODE = 'restrict_violation';
            END IF;
            RETURN OLD;
        END IF;
        IF (NEW.session_id, NEW.id, NEW.type, NEW.source, NEW.chat_id, NEW.received_at, NEW.occurred_at, NEW.key_id,
            NEW.body_digest)
           IS NOT DISTINCT FROM
           (OLD.session_id, OLD.id, OLD.type, OLD.source, OLD.chat_id, OLD.received_at, OLD.occurred_at, OLD.key_id,
            OLD.body_digest)
        THEN
            IF (NEW.dedupe_key, NEW.body, NEW.salt, NEW.frame, NEW.runs)
               IS NOT DISTINCT FROM (OLD.dedupe_key, OLD.body, OLD.salt, OLD.frame, OLD.runs)
            THEN
                RETURN NEW;
            END IF;
            IF NEW.body IS NULL AND NEW.salt IS NULL AND NEW.frame IS NULL AND NEW.runs IS NULL
               AND (OLD.body IS NOT NULL OR OLD.runs IS NOT NULL)
               AND NEW.dedupe_key = coalesce(sha256(OLD.salt || OLD.dedupe_key), '')
            THEN
                RETURN NEW;
            END IF;
            IF NEW.body IS NULL AND OLD.body IS NOT NULL AND OLD.runs IS NULL AND NEW.runs IS NOT NULL
               AND (NEW.dedupe_key, NEW.salt) IS NOT DISTINCT FROM (OLD.dedupe_key, OLD.salt)
               AND archiver.body_of(NEW.session_id, NEW.frame, NEW.runs) = OLD.body
            THEN
                RETURN NEW;
            END IF;
        END IF;
        RAISE EXCEPTION 'archiver.events is append-only: event % may not be changed', OLD.id
            USING ERRCODE = 'restrict_violation';
    END
    $$
"""

# Pieces go with the last response that is made of them, which an erasure takes.
GUARD_PIECES = """
    CREATE FUNCTION archiver.guard_pieces() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        IF EXISTS (
            SELECT FROM (SELECT DISTINCT session_id FROM gone) g
              JOIN archiver.events e ON e.session_id = g.session_id AND e.runs IS NOT NULL
        ) THEN
            RAISE EXCEPTION 'archiver.pieces: a history response is made of these pieces'
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NULL;
    END
    $$
"""
