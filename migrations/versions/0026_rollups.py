"""Sums of 15 minutes and of days, kept by a worker; `analytics.daily` reads them and computes only what changed."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
Time = sa.DateTime(timezone=True)

BUCKET = "Start of 15 minutes."
ASSISTANT = "Assistant; empty where none is known."
LATENCY = "Numbers of turns by seconds from created_at to updated_at, within the bounds in docs/data-model.md."
COUNTS = {
    "conversations_started": "Conversations whose first turn began then.",
    "chats": "Turns that began then.",
    "messages": "Their messages.",
    "cost": "Sum of their costs; null if none has one.",
    "deleted_chats": "Those of them that upstream deleted.",
    "repaired_messages": "Those of their messages that only history supplied.",
}
LOCK = "Always empty; it is only locked. One summing of stale buckets at a time."

BEGAN = "coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at)"
IS_TURN = "c.chat_id <> E'\\x1f'"  # not the lines before the first turn
# Upper bounds of the first steps of `latency`, in seconds.
BOUNDS = (0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)
STEPS = range(1, len(BOUNDS) + 2)

# Of any session, in a condition on session_id, at the cost of that session. The empty one has unassigned turns.
CONTRIBUTED = f"""
    SELECT t.session_id, t.bucket, t.assistant_id,
           CASE WHEN t.session_id <> '' AND t.chats > 0 AND row_number() OVER (
               PARTITION BY t.session_id, CAST(t.bucket AT TIME ZONE 'UTC' AS date), t.assistant_id, t.chats > 0
               ORDER BY t.bucket
           ) = 1 THEN 1 ELSE 0 END AS conversations,
           t.conversations_started, t.chats, t.messages, t.cost, t.deleted_chats, t.repaired_messages, t.latency
      FROM (
          SELECT c.session_id, c.bucket, c.assistant_id,
                 count(*) FILTER (WHERE c.is_turn AND c.number = 1 AND c.session_id <> '') AS conversations_started,
                 count(*) FILTER (WHERE c.is_turn) AS chats,
                 sum(c.messages)::bigint AS messages,
                 sum(c.cost) AS cost,
                 count(c.deleted_at) AS deleted_chats,
                 coalesce(sum(c.repaired_messages) FILTER (WHERE c.is_turn), 0)::bigint AS repaired_messages,
                 ARRAY[{", ".join(f"count(*) FILTER (WHERE c.step = {step})" for step in STEPS)}] AS latency
            FROM (
                SELECT c.session_id, c.cost, c.deleted_at, m.messages, m.repaired_messages,
                       to_timestamp(900 * floor(extract(epoch FROM {BEGAN}) / 900)) AS bucket,
                       coalesce(
                           c.assistant_id,
                           CASE WHEN c.session_id <> '' THEN coalesce(
                               first_value(c.assistant_id) OVER (
                                   PARTITION BY c.session_id
                                   ORDER BY c.assistant_id IS NULL, {BEGAN} DESC, c.chat_id DESC
                               ),
                               -- A longer one, from the application or a history, fits into no index entry.
                               CASE WHEN octet_length(s.assistant_id) <= 1024 THEN s.assistant_id END) END,
                           '') AS assistant_id,
                       {IS_TURN} AS is_turn,
                       row_number() OVER (PARTITION BY c.session_id, {IS_TURN} ORDER BY {BEGAN}, c.chat_id) AS number,
                       1 + width_bucket(extract(epoch FROM c.updated_at - c.created_at),
                                        CAST('{{{",".join(map(str, BOUNDS))}}}' AS numeric[])) AS step
                  FROM archiver.chats c
                  JOIN archiver.sessions s ON s.session_id = c.session_id
                 CROSS JOIN LATERAL (
                      SELECT count(*) AS messages, count(*) FILTER (WHERE m.source = 'history') AS repaired_messages
                        FROM archiver.messages m WHERE m.session_id = c.session_id AND m.chat_id = c.chat_id
                  ) m
            ) c GROUP BY c.session_id, c.bucket, c.assistant_id
      ) t
"""
SUMS = f"""
           sum(conversations)::bigint AS conversations,
           sum(conversations_started)::bigint AS conversations_started,
           sum(chats)::bigint AS chats,
           sum(messages)::bigint AS messages,
           sum(cost) AS cost,
           sum(deleted_chats)::bigint AS deleted_chats,
           sum(repaired_messages)::bigint AS repaired_messages,
           ARRAY[{", ".join(f"sum(latency[{step}])::bigint" for step in STEPS)}] AS latency
"""
COUNTED = """
               conversations::bigint, conversations_started::bigint, chats::bigint, messages::bigint, cost,
               deleted_chats::bigint, repaired_messages::bigint"""

# Sessions with unpublished changes, or without contributions yet, are computed from their turns; so are unassigned
# turns. The rest of a stale bucket is summed from contributions. LATERAL and OFFSET 0: in any plan, each is looked up
# by key. An array, because Postgres expects few rows of it, and a hundred times too many of the outbox.
PARTS = """
    WITH live AS MATERIALIZED (
        SELECT unnest(ARRAY(
            SELECT DISTINCT each ->> 'session_id'
              FROM archiver.outbox o CROSS JOIN LATERAL json_array_elements(o.changes) AS each
             WHERE each ->> 'session_id' <> ''
        )) AS session_id
        UNION SELECT session_id FROM archiver.uncontributed
        UNION SELECT '' AS session_id
    ), stale AS MATERIALIZED (
        SELECT bucket FROM archiver.stale_buckets
        UNION
        SELECT c.bucket FROM live l CROSS JOIN LATERAL (
            SELECT c.bucket FROM archiver.contributions c WHERE c.session_id = l.session_id OFFSET 0
        ) c
    )
"""
CURRENT = """
        SELECT c.bucket, c.assistant_id, {figures}
          FROM stale s CROSS JOIN LATERAL (
              SELECT * FROM archiver.contributions c WHERE c.bucket = s.bucket OFFSET 0
          ) c
         WHERE NOT EXISTS (SELECT FROM live l WHERE l.session_id = c.session_id)
        UNION ALL
        SELECT c.bucket, c.assistant_id, {figures}
          FROM live l CROSS JOIN LATERAL (
              SELECT * FROM archiver.contributed c WHERE c.session_id = l.session_id OFFSET 0
          ) c
"""
FIGURES = f"{COUNTED}, latency::bigint[]"
ROLLUPS = f"""
    {PARTS}
    SELECT bucket, nullif(assistant_id, '') AS assistant_id, {SUMS.split(",", 1)[1]}
      FROM (
        SELECT r.bucket, r.assistant_id, {FIGURES} FROM archiver.rollups r
         WHERE NOT EXISTS (SELECT FROM stale s WHERE s.bucket = r.bucket)
        UNION ALL {CURRENT.format(figures=FIGURES)}
      ) part GROUP BY part.bucket, part.assistant_id
"""
DAILY = f"""
    {PARTS}, stale_days AS MATERIALIZED (
        SELECT DISTINCT CAST(bucket AT TIME ZONE 'UTC' AS date) AS day FROM stale
    )
    SELECT day, nullif(assistant_id, '') AS assistant_id, sum(conversations)::bigint AS conversations,
           sum(chats)::bigint AS chats, sum(messages)::bigint AS messages, sum(cost) AS cost,
           sum(deleted_chats)::bigint AS deleted_chats, sum(repaired_messages)::bigint AS repaired_messages,
           sum(conversations_started)::bigint AS conversations_started
      FROM (
        SELECT d.day, d.assistant_id, {COUNTED} FROM archiver.days d
         WHERE NOT EXISTS (SELECT FROM stale_days s WHERE s.day = d.day)
        UNION ALL
        SELECT d.day, r.assistant_id, {COUNTED}
          FROM stale_days d CROSS JOIN LATERAL (
              SELECT * FROM archiver.rollups r
               WHERE r.bucket >= CAST(d.day AS timestamp) AT TIME ZONE 'UTC'
                 AND r.bucket < CAST(d.day + 1 AS timestamp) AT TIME ZONE 'UTC' OFFSET 0
          ) r
         WHERE NOT EXISTS (SELECT FROM stale s WHERE s.bucket = r.bucket)
        UNION ALL
        SELECT CAST(bucket AT TIME ZONE 'UTC' AS date) AS day, assistant_id, {COUNTED}
          FROM ({CURRENT.format(figures=COUNTED)}) AS current
      ) part GROUP BY part.day, part.assistant_id
"""

# The bounds on bucket use the key of the rollups; those on the result are exact.
HOURLY_FUNCTION = f"""
    CREATE FUNCTION analytics.hourly(zone text DEFAULT 'UTC', since timestamptz DEFAULT NULL,
                                     until timestamptz DEFAULT NULL)
        RETURNS TABLE (hour timestamptz, assistant_id text, conversations_started bigint, chats bigint,
                       messages bigint, cost numeric, deleted_chats bigint, repaired_messages bigint,
                       latency bigint[])
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT date_trunc('hour', r.bucket, $1), r.assistant_id, {SUMS.split(",", 1)[1]}
          FROM analytics.rollups r
         WHERE r.bucket >= coalesce($2, '-infinity') AND r.bucket < coalesce($3 + interval '1 hour', 'infinity')
           AND date_trunc('hour', r.bucket, $1) >= coalesce($2, '-infinity')
           AND date_trunc('hour', r.bucket, $1) < coalesce($3, 'infinity')
         GROUP BY 1, 2
    $$
"""
DAILY_FUNCTION = f"""
    CREATE FUNCTION analytics.daily(zone text DEFAULT 'UTC', since date DEFAULT NULL, until date DEFAULT NULL)
        RETURNS TABLE (day date, assistant_id text, conversations_started bigint, chats bigint,
                       messages bigint, cost numeric, deleted_chats bigint, repaired_messages bigint,
                       latency bigint[])
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT CAST(r.bucket AT TIME ZONE $1 AS date), r.assistant_id, {SUMS.split(",", 1)[1]}
          FROM analytics.rollups r
         WHERE r.bucket >= coalesce(CAST($2 - 1 AS timestamp) AT TIME ZONE $1, '-infinity')
           AND r.bucket < coalesce(CAST($3 + 1 AS timestamp) AT TIME ZONE $1, 'infinity')
           AND CAST(r.bucket AT TIME ZONE $1 AS date) >= coalesce($2, '-infinity')
           AND CAST(r.bucket AT TIME ZONE $1 AS date) < coalesce($3, 'infinity')
         GROUP BY 1, 2
    $$
"""
HEALTH = """
    SELECT h.*, coalesce((SELECT extract(epoch FROM clock_timestamp() - min(s.since))::double precision
                            FROM archiver.stale_buckets s), 0) AS rollups_lag_seconds
      FROM ({earlier}) h
"""

COMMENTS = {
    "COLUMN analytics.health.rollups_lag_seconds": (
        "Age of the oldest published change that is not yet summed in archiver.rollups; 0 if none."
    ),
    "VIEW archiver.contributed": "What each conversation contributes to each bucket now, computed from its turns.",
    "COLUMN archiver.contributed.session_id": "Conversation; empty for unassigned turns.",
    "COLUMN archiver.contributed.bucket": BUCKET,
    "COLUMN archiver.contributed.assistant_id": ASSISTANT,
    "COLUMN archiver.contributed.conversations": "As in archiver.contributions.",
    **{f"COLUMN archiver.contributed.{name}": comment for name, comment in COUNTS.items()},
    "COLUMN archiver.contributed.latency": LATENCY,
    "VIEW analytics.rollups": "One row per 15 minutes and assistant; its figures add up. Exact at any time.",
    "COLUMN analytics.rollups.bucket": BUCKET,
    "COLUMN analytics.rollups.assistant_id": "Assistant; null where none is known.",
    **{f"COLUMN analytics.rollups.{name}": comment for name, comment in COUNTS.items()},
    "COLUMN analytics.rollups.latency": LATENCY,
    "FUNCTION analytics.hourly(text, timestamptz, timestamptz)": (
        "One row per hour of a time zone and assistant, for hours that begin at or after since and before until."
    ),
    "FUNCTION analytics.daily(text, date, date)": (
        "One row per day of a time zone and assistant, for days from since to before until."
    ),
}


def _sums(conversations: str) -> list[sa.Column[Any]]:
    kinds: dict[str, Any] = {"cost": sa.Numeric()}
    return [
        sa.Column("conversations", sa.Integer(), nullable=False, comment=conversations),
        *(
            sa.Column(name, kinds.get(name, sa.Integer()), nullable=name in kinds, comment=comment)
            for name, comment in COUNTS.items()
        ),
    ]


def _latency() -> sa.Column[list[int]]:
    return sa.Column("latency", postgresql.ARRAY(sa.Integer), nullable=False, comment=LATENCY)


def _earlier(number: str) -> Any:
    """Return the module of an earlier migration."""
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    return script.get_revision(number).module


def upgrade() -> None:
    op.create_table(
        "contributions",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation; never empty."),
        sa.Column("bucket", Time, nullable=False, comment=BUCKET),
        sa.Column("assistant_id", sa.Text(), nullable=False, comment=ASSISTANT),
        *_sums("1 in the first bucket of the conversation on a UTC day and assistant, else 0."),
        _latency(),
        sa.PrimaryKeyConstraint("session_id", "bucket", "assistant_id", name="contributions_pkey"),
        sa.Index("contributions_bucket_idx", "bucket"),
        schema=SCHEMA,
        comment="What each conversation contributes to the rollups, as of its latest published change.",
    )
    op.create_table(
        "rollups",
        sa.Column("bucket", Time, nullable=False, comment=BUCKET),
        sa.Column("assistant_id", sa.Text(), nullable=False, comment=ASSISTANT),
        *_sums("Conversations whose first bucket of this UTC day and assistant it is."),
        _latency(),
        sa.PrimaryKeyConstraint("bucket", "assistant_id", name="rollups_pkey"),
        schema=SCHEMA,
        comment="Sums of the contributions to each bucket, except that buckets in stale_buckets may be outdated.",
    )
    op.create_table(
        "days",
        sa.Column("day", sa.Date(), nullable=False, comment="UTC day."),
        sa.Column("assistant_id", sa.Text(), nullable=False, comment=ASSISTANT),
        *_sums("Conversations with a turn on this day and assistant."),
        sa.PrimaryKeyConstraint("day", "assistant_id", name="days_pkey"),
        schema=SCHEMA,
        comment="Sums of the rollups of each UTC day, except that days of buckets in stale_buckets may be outdated.",
    )
    op.create_table(
        "stale_buckets",
        sa.Column("bucket", Time, nullable=False, comment=BUCKET),
        sa.Column(
            "id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Of its latest change; grows with time.",
        ),
        sa.Column("since", Time, nullable=False, comment="When it was first changed after its latest summing."),
        sa.PrimaryKeyConstraint("bucket", name="stale_buckets_pkey"),
        schema=SCHEMA,
        comment="Buckets whose contributions changed since they were summed.",
    )
    op.create_table(
        "uncontributed",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation."),
        sa.PrimaryKeyConstraint("session_id", name="uncontributed_pkey"),
        schema=SCHEMA,
        comment="Conversations of earlier versions whose contributions a worker has yet to compute.",
    )
    # The planner keeps no samples of content that an erasure removes.
    for name in ("contributions", "rollups", "days"):
        op.execute(f"ALTER TABLE archiver.{name} ALTER COLUMN cost SET STATISTICS 0")
    op.execute("INSERT INTO archiver.uncontributed SELECT session_id FROM archiver.sessions WHERE session_id <> ''")
    # Otherwise Postgres expects more than a thousand rows until the first rows are there.
    op.execute("ANALYZE archiver.uncontributed, archiver.stale_buckets")
    op.execute("CREATE TABLE archiver_jobs.lock_rollups ()")
    op.execute(f"COMMENT ON TABLE archiver_jobs.lock_rollups IS '{LOCK}'")
    op.execute(f"CREATE VIEW archiver.contributed AS {CONTRIBUTED}")
    op.execute(f"CREATE VIEW analytics.rollups AS {ROLLUPS}")
    op.execute(f"CREATE OR REPLACE VIEW analytics.daily AS {DAILY}")
    op.execute(HOURLY_FUNCTION)
    op.execute(DAILY_FUNCTION)
    op.execute(f"CREATE OR REPLACE VIEW analytics.health AS {HEALTH.format(earlier=_earlier('0022').HEALTH)}")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    health = _earlier("0022")
    op.execute("DROP VIEW analytics.health")
    op.execute(f"CREATE VIEW analytics.health AS {health.HEALTH}")
    op.execute("COMMENT ON VIEW analytics.health IS 'One row: how complete and how current the archive is.'")
    for name, comment in (health.HEALTH_COMMENTS | health.NEW_HEALTH_COMMENTS).items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{name} IS '{comment}'")
    op.execute("DROP FUNCTION analytics.daily(text, date, date)")
    op.execute("DROP FUNCTION analytics.hourly(text, timestamptz, timestamptz)")
    op.execute("DROP VIEW analytics.rollups")
    # With the columns of 0021: that view must not depend on a column that 0022 drops.
    columns = op.get_bind().exec_driver_sql(
        "SELECT string_agg('c.' || attname, ', ' ORDER BY attnum) FROM pg_attribute"
        " WHERE attrelid = 'archiver.chats'::regclass AND attnum > 0 AND NOT attisdropped"
        " AND attname <> 'answered_at'"
    )
    daily = _earlier("0021").NOW["daily"].replace("SELECT c.*,", f"SELECT {columns.scalar()},")
    op.execute(f"CREATE OR REPLACE VIEW analytics.daily AS {daily}")
    op.execute("DROP VIEW archiver.contributed")
    op.execute("DROP TABLE archiver_jobs.lock_rollups")
    for name in ("uncontributed", "stale_buckets", "days", "rollups", "contributions"):
        op.drop_table(name, schema=SCHEMA)
