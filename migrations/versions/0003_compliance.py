"""Compliance: an append-only ledger, seals, the audit trail, erasures, legal holds; the roles that may touch them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
TIME = sa.DateTime(timezone=True)

NEW_TABLES = ("seals", "holds", "removals", "erasures", "acts", "recounts")
APPEND_ONLY = ("recounts", "acts", "erasures", "removals", "seals")
ROLES = ("archiver_writer", "archiver_auditor")


def upgrade() -> None:
    op.add_column(
        "events",
        sa.Column("earliest_at", TIME, comment="Earlier time that a later delivery told; null if none did."),
        schema=SCHEMA,
    )
    op.add_column(
        "events",
        sa.Column(
            "is_recounted",
            sa.Boolean(),
            nullable=False,
            server_default="false",
            comment="It was delivered again since its counters were last sealed.",
        ),
        schema=SCHEMA,
    )
    op.create_index("events_recounted_idx", "events", ["id"], schema=SCHEMA, postgresql_where=sa.text("is_recounted"))
    op.create_index(
        "chats_deleted_at_idx",
        "chats",
        ["deleted_at"],
        schema=SCHEMA,
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )
    _create_tables()
    for table, column, comment, _ in COMMENTS:
        op.execute(f"COMMENT ON COLUMN archiver.{table}.{column} IS '{comment}'")
    _create_guards()
    op.execute(SETTLE)
    op.execute("REVOKE EXECUTE ON FUNCTION archiver.settle() FROM PUBLIC")
    for name in ("conversations", "chats"):
        _create_view(name, with_erasures=True)
    for role in ROLES:
        op.execute(CREATE_ROLE.format(role=role))
    for table, columns in CONTENT.items():
        for column in columns:
            op.execute(f"ALTER TABLE archiver.{table} ALTER COLUMN {column} SET STATISTICS 0")


def downgrade() -> None:
    # The roles stay: they belong to the whole cluster, and other databases may use them.
    for table, columns in CONTENT.items():
        for column in columns:
            op.execute(f"ALTER TABLE archiver.{table} ALTER COLUMN {column} SET STATISTICS -1")
    for name in ("conversations", "chats"):
        op.execute(f"DROP VIEW analytics.{name}")
        _create_view(name, with_erasures=False)
    op.execute("DROP FUNCTION archiver.settle()")
    op.execute("DROP TRIGGER events_no_truncate ON archiver.events")
    op.execute("DROP TRIGGER events_guard_counters ON archiver.events")
    op.execute("DROP TRIGGER events_guard ON archiver.events")
    for name in NEW_TABLES:
        op.drop_table(name, schema=SCHEMA)
    for function in ("guard_event", "guard_counters", "guard_hold", "refuse_change"):
        op.execute(f"DROP FUNCTION archiver.{function}()")
    op.drop_index("chats_deleted_at_idx", "chats", schema=SCHEMA)
    op.drop_index("events_recounted_idx", "events", schema=SCHEMA)
    op.execute(
        "UPDATE archiver.events SET occurred_at = least(occurred_at, earliest_at) WHERE earliest_at IS NOT NULL"
    )
    for column in ("earliest_at", "is_recounted"):
        op.drop_column("events", column, schema=SCHEMA)
    for table, column, _, older in COMMENTS:
        op.execute(f"COMMENT ON COLUMN archiver.{table}.{column} IS '{older}'")


# What an erasure takes away. The planner would keep samples of it, which no erasure reaches; it has no use for them:
# these are looked up by unique keys, or not at all. Of assistants it keeps some: they tell it how many there are.
CONTENT = {
    "events": ("dedupe_key", "body", "salt"),
    "quarantine": ("body", "body_digest", "dedupe_key", "detail"),
    "sessions": ("name", "status"),
    "chats": ("variables", "session_name", "session_status", "external_id", "status", "cost"),
    "messages": ("content", "role"),
    "holds": ("value",),
}

COMMENTS = (
    (
        "events",
        "dedupe_key",
        "SHA-256 over event type, chat id and canonical chat; once erased SHA-256 over the salt and that.",
        "SHA-256 over event type, chat id and canonical chat.",
    ),
    (
        "events",
        "occurred_at",
        "Time that its first delivery told in the envelope.",
        "Earliest time that any of its deliveries told in the envelope.",
    ),
    (
        "events",
        "body",
        "The exact bytes of the first delivery; null once erased.",
        "The exact bytes of the first delivery.",
    ),
    (
        "events",
        "salt",
        "Random bytes that body_digest is salted with; null once erased.",
        "Random bytes that body_digest is salted with.",
    ),
)


def _identity(comment: str) -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment=comment)


def _text(name: str, comment: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable, comment=comment)


def _time(name: str, comment: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, TIME, nullable=nullable, comment=comment)


def _number(name: str, comment: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, autoincrement=False, comment=comment)


def _bytes(name: str, comment: str, *, nullable: bool = False) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(), nullable=nullable, comment=comment)


def _create_tables() -> None:
    op.create_table(
        "recounts",
        _identity("Grows with sealing."),
        _number("event_id", "Event that was delivered again."),
        sa.Column("delivery_count", sa.Integer(), nullable=False, comment="Its deliveries when this was sealed."),
        _time("last_received_at", "Its latest delivery when this was sealed."),
        _time("earliest_at", "Its earliest_at when this was sealed.", nullable=True),
        sa.PrimaryKeyConstraint("id", name="recounts_pkey"),
        sa.Index("recounts_event_id_idx", "event_id", "id"),
        schema=SCHEMA,
        comment="What the counters of an event stood at when they were sealed; append-only.",
    )
    op.create_table(
        "acts",
        _identity("Grows with time."),
        _time("at", "When it was done."),
        _text("actor", "Who did it: a user of the operating system, or a part of ours."),
        _text("kind", "What was done, such as erase or hold.add."),
        _text("reason", "Why, as the actor said.", nullable=True),
        sa.Column(
            "detail",
            postgresql.JSONB(none_as_null=True),
            nullable=False,
            comment="To what, and with which result; no content.",
        ),
        sa.PrimaryKeyConstraint("id", name="acts_pkey"),
        schema=SCHEMA,
        comment="The audit trail of administrative acts; append-only and sealed.",
    )
    op.create_table(
        "erasures",
        _text("session_id", "Session; empty for facts that do not tell theirs."),
        _text("chat_id", "Turn; empty: the whole session."),
        _identity("Grows with time."),
        _time("erased_at", "When it was ordered; the content goes right after."),
        _text("rule", "Under which rule: request, chat.deleted or retention."),
        _number("act_id", "The act that tells who and why."),
        sa.PrimaryKeyConstraint("session_id", "chat_id", name="erasures_pkey"),
        sa.Index("erasures_id_idx", "id"),
        schema=SCHEMA,
        comment="What was erased and does not come back: no content, and none is taken for it; append-only.",
    )
    op.create_table(
        "removals",
        _identity("Grows with time."),
        _number("event_id", "Event whose row was removed; its leaf stays in its seal."),
        _number("act_id", "The act that tells by which rule."),
        sa.PrimaryKeyConstraint("id", name="removals_pkey"),
        sa.UniqueConstraint("event_id", name="removals_event_id_key"),
        schema=SCHEMA,
        comment="Ledger rows that retention removed, metadata and all; append-only.",
    )
    op.create_table(
        "holds",
        _identity("For archiver hold release."),
        _time("placed_at", "When it was placed."),
        _text("author", "Who placed it."),
        _text("reason", "Why."),
        _text("session_id", "Holds this session; null: any.", nullable=True),
        _text("assistant_id", "Holds sessions of this assistant; null: any.", nullable=True),
        _text("variable", "Holds sessions with this variable at this value; null: any.", nullable=True),
        _text("value", "Value of the variable; null once released.", nullable=True),
        _time("since", "Holds sessions with a turn at or after this time; null: any.", nullable=True),
        _time("until", "Holds sessions with a turn before this time; null: any.", nullable=True),
        _time("released_at", "When it was released; null: in force.", nullable=True),
        _text("released_by", "Who released it.", nullable=True),
        sa.PrimaryKeyConstraint("id", name="holds_pkey"),
        schema=SCHEMA,
        comment="Legal holds: what one in force covers is neither erased nor expired.",
    )
    op.create_table(
        "seals",
        _number("id", "1, 2, 3 … without gaps."),
        _time("sealed_at", "When it was made."),
        _number("events_through", "Events up to this id are sealed, here or before."),
        _number("recounts_through", "Likewise of recounts."),
        _number("acts_through", "Likewise of acts."),
        _number("erasures_through", "Likewise of erasures."),
        _number("removals_through", "Likewise of removals."),
        _bytes("entries", "41 bytes a leaf: kind, id as 8 bytes, leaf hash."),
        _bytes("root", "Root of the Merkle tree (RFC 6962) over the leaf hashes."),
        _bytes("previous", "Hash of the seal before; zeros at the first."),
        _bytes("hash", "SHA-256 of the statement that docs/seals.md describes."),
        _text("key_id", "Which key signed; null: unsigned.", nullable=True),
        _bytes("signature", "Ed25519 over the statement; null: unsigned.", nullable=True),
        sa.PrimaryKeyConstraint("id", name="seals_pkey"),
        schema=SCHEMA,
        comment="The chain of seals: each proves what the ledger held, and that nothing before it was changed.",
    )
    # Hashes do not compress.
    op.execute("ALTER TABLE archiver.seals ALTER COLUMN entries SET STORAGE EXTERNAL")


def _create_guards() -> None:
    for function in (GUARD_EVENT, GUARD_COUNTERS, GUARD_HOLD, REFUSE_CHANGE):
        op.execute(function)
    op.execute(
        "CREATE TRIGGER events_guard BEFORE DELETE OR UPDATE OF session_id, dedupe_key, id, type, source, chat_id,"
        " received_at, occurred_at, key_id, body, salt, body_digest ON archiver.events"
        " FOR EACH ROW EXECUTE FUNCTION archiver.guard_event()"
    )
    # Apart, because the one above reads the body, which each redelivery would pay for.
    op.execute(
        "CREATE TRIGGER events_guard_counters BEFORE UPDATE OF delivery_count, last_received_at, earliest_at"
        " ON archiver.events FOR EACH ROW EXECUTE FUNCTION archiver.guard_counters()"
    )
    op.execute(
        "CREATE TRIGGER holds_guard BEFORE UPDATE OR DELETE ON archiver.holds"
        " FOR EACH ROW EXECUTE FUNCTION archiver.guard_hold()"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON archiver.{table}"
            " FOR EACH ROW EXECUTE FUNCTION archiver.refuse_change()"
        )
    for table in ("events", "holds", *APPEND_ONLY):
        op.execute(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON archiver.{table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION archiver.refuse_change()"
        )


def _create_view(name: str, *, with_erasures: bool) -> None:
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    meaning, query, comments = script.get_revision("0002").module.VIEWS[name]
    if with_erasures:
        query = query.replace(*ERASED_AT[name])
        if "erased_at" not in query:
            raise RuntimeError(f"The view {name} is not as this migration knows it.")
        comments = comments | {"erased_at": "When its content was erased; null if it was not."}
    op.execute(f"CREATE OR REPLACE VIEW analytics.{name} AS {query}")
    op.execute(f"COMMENT ON VIEW analytics.{name} IS '{meaning}'")
    for column, comment in comments.items():
        op.execute(f"COMMENT ON COLUMN analytics.{name}.{column} IS '{comment}'")


# The column that is added to each view: after which text, and that text with it.
ERASED_AT = {
    "conversations": (
        "s.reconciled_at\n",
        "s.reconciled_at,\n               (SELECT e.erased_at FROM archiver.erasures e"
        " WHERE e.session_id = s.session_id AND e.chat_id = '') AS erased_at\n",
    ),
    "chats": (
        "c.first_received_at\n",
        "c.first_received_at,\n               (SELECT min(e.erased_at) FROM archiver.erasures e"
        " WHERE e.session_id = c.session_id AND (e.chat_id = c.chat_id OR (e.chat_id = '' AND e.session_id <> '')))"
        " AS erased_at\n",
    ),
}

# Of a ledger row only the counters change, upwards, and content goes, once and for all. Whatever search_path somebody
# sets, the names in here mean what they do in Postgres.
GUARD_EVENT = """
    CREATE FUNCTION archiver.guard_event() RETURNS trigger LANGUAGE plpgsql
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
           IS DISTINCT FROM
           (OLD.session_id, OLD.id, OLD.type, OLD.source, OLD.chat_id, OLD.received_at, OLD.occurred_at, OLD.key_id,
            OLD.body_digest)
           OR NOT (
               (NEW.dedupe_key, NEW.body, NEW.salt) IS NOT DISTINCT FROM (OLD.dedupe_key, OLD.body, OLD.salt)
               OR (NEW.body IS NULL AND NEW.salt IS NULL AND OLD.body IS NOT NULL
                   AND NEW.dedupe_key = coalesce(sha256(OLD.salt || OLD.dedupe_key), ''))
           )
        THEN
            RAISE EXCEPTION 'archiver.events is append-only: event % may not be changed', OLD.id
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END
    $$
"""

# Each redelivery runs it: operators by their full names cost nothing, a search_path of its own does.
GUARD_COUNTERS = """
    CREATE FUNCTION archiver.guard_counters() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.delivery_count OPERATOR(pg_catalog.<) OLD.delivery_count
           OR NEW.last_received_at OPERATOR(pg_catalog.<) OLD.last_received_at
           OR coalesce(NEW.earliest_at OPERATOR(pg_catalog.>) OLD.earliest_at,
                       NEW.earliest_at IS NULL AND OLD.earliest_at IS NOT NULL)
        THEN
            RAISE EXCEPTION 'the counters of event % may only grow', OLD.id USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END
    $$
"""

# The value may say who somebody is: it goes with the release, whoever may do no more than release.
GUARD_HOLD = """
    CREATE FUNCTION archiver.guard_hold() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            IF OLD.released_at IS NULL
               AND to_jsonb(NEW) - '{released_at,released_by}'::text[]
                   = to_jsonb(OLD) - '{released_at,released_by}'::text[]
            THEN
                IF NEW.released_at IS NOT NULL THEN
                    NEW.value := NULL;
                END IF;
                RETURN NEW;
            END IF;
        END IF;
        RAISE EXCEPTION 'a legal hold is only placed and released' USING ERRCODE = 'restrict_violation';
    END
    $$
"""

REFUSE_CHANGE = """
    CREATE FUNCTION archiver.refuse_change() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        RAISE EXCEPTION 'archiver.% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END
    $$
"""

# As its owner, because a lock on a whole table asks for more rights than a writer has. Once the locks are had, nobody
# who has taken an id has not committed yet; they are let go at the end of the transaction.
SETTLE = """
    CREATE FUNCTION archiver.settle(
        OUT events_through bigint, OUT acts_through bigint, OUT erasures_through bigint, OUT removals_through bigint
    ) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        LOCK TABLE archiver.events, archiver.acts, archiver.erasures, archiver.removals IN SHARE MODE;
        SELECT coalesce(max(id), 0) INTO events_through FROM archiver.events;
        SELECT coalesce(max(id), 0) INTO acts_through FROM archiver.acts;
        SELECT coalesce(max(id), 0) INTO erasures_through FROM archiver.erasures;
        SELECT coalesce(max(id), 0) INTO removals_through FROM archiver.removals;
    END
    $$
"""

CREATE_ROLE = """
    DO $$
    BEGIN
        CREATE ROLE {role} NOLOGIN;
    EXCEPTION
        WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
    END
    $$
"""
