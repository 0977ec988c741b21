"""Sums of 15 minutes by promoted variable: `analytics.variable_rollups`, `hourly_by` and `daily_by`."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
Time = sa.DateTime(timezone=True)

NAME = "Name of the variable in variableValues."
STATE = (
    "collecting: a worker has yet to store the values of some conversations; complete: of all; removed: no longer"
    " promoted, a worker deletes its rows."
)
FULL = "Whether conversations had more values than are kept; the others then count as (other)."
VARIABLE = "Promoted variable."
VALUE = "Value that conversations have."
OF_SESSION = "Value of its conversation as text; null if it has none; (other): too long, or not kept."
OTHER = "(other)"
MAX_BYTES = 200  # of a value

MERGED = """
        SELECT jsonb_object_agg(v.key, v.value
                                ORDER BY coalesce(t.began_at, t.created_at, t.occurred_at, t.first_received_at),
                                         t.occurred_at, t.first_received_at, t.chat_id) AS variables
          FROM archiver.chats t CROSS JOIN LATERAL jsonb_each(t.variables) v
         WHERE t.session_id = l.session_id AND t.session_id <> ''
"""


def value(variables: str) -> str:
    """Return the SQL of the value of variable `p` in a JSON object."""
    raw = f"({variables} ->> p.name)"
    return f"""
           CASE WHEN {raw} IS NULL THEN NULL
                WHEN octet_length({raw}) > {MAX_BYTES}
                  OR p.is_full AND NOT EXISTS (SELECT FROM archiver.variable_values k
                                                WHERE k.variable_id = p.id AND k.value = {raw})
                THEN '{OTHER}' ELSE {raw} END"""


STORED = f"CASE WHEN {{id}} = -1 THEN '{OTHER}' ELSE k.value END"

# Sessions with unpublished changes, or without stored rows, are computed from their turns. While a variable is being
# collected, values are looked up in the stored sessions.
ROLLUPS = """
    {parts}, kept AS MATERIALIZED (
        SELECT id AS value_id, value FROM archiver.variable_values
    )
    SELECT part.bucket, nullif(part.assistant_id, '') AS assistant_id, part.variable, part.value, {sums}
      FROM (
        SELECT r.bucket, r.assistant_id, p.name AS variable, {of_sum} AS value, {figures}
          FROM archiver.promoted_variables p
          JOIN archiver.variable_rollups r ON r.variable_id = p.id
          LEFT JOIN kept k ON k.value_id = r.value_id
         WHERE p.state = 'complete' AND NOT EXISTS (SELECT FROM stale s WHERE s.bucket = r.bucket)
        UNION ALL
        SELECT c.bucket, c.assistant_id, p.name AS variable, {of_session} AS value, {figures}
          FROM archiver.promoted_variables p
         CROSS JOIN stale s
         CROSS JOIN LATERAL (SELECT * FROM archiver.contributions c WHERE c.bucket = s.bucket OFFSET 0) c
          LEFT JOIN archiver.session_values v ON v.session_id = c.session_id AND v.variable_id = p.id
          LEFT JOIN kept k ON k.value_id = v.value_id
         WHERE p.state = 'complete' AND NOT EXISTS (SELECT FROM live l WHERE l.session_id = c.session_id)
        UNION ALL
        SELECT c.bucket, c.assistant_id, p.name AS variable, {of_summary} AS value, {figures}
          FROM archiver.promoted_variables p
         CROSS JOIN archiver.contributions c
          LEFT JOIN (SELECT session_id AS of, variables FROM archiver.summaries) t ON t.of = c.session_id
         WHERE p.state = 'collecting' AND NOT EXISTS (SELECT FROM live l WHERE l.session_id = c.session_id)
           AND EXISTS (SELECT FROM archiver.promoted_variables WHERE state = 'collecting')  -- once, before the others
        UNION ALL
        SELECT c.bucket, c.assistant_id, p.name AS variable, {of_turns} AS value, {figures}
          FROM archiver.promoted_variables p
         CROSS JOIN live l
         CROSS JOIN LATERAL (SELECT * FROM archiver.contributed c WHERE c.session_id = l.session_id OFFSET 0) c
         CROSS JOIN LATERAL ({merged}) m
         WHERE p.state <> 'removed'
      ) part GROUP BY part.bucket, part.assistant_id, part.variable, part.value
"""
VARIABLES = """
    SELECT p.name, p.state,
           (SELECT count(*) FROM archiver.variable_values k WHERE k.variable_id = p.id) AS known_values, p.is_full
      FROM archiver.promoted_variables p WHERE p.state <> 'removed'
"""
_COLUMNS = """value text, conversations_started bigint, chats bigint,
                       messages bigint, cost numeric, deleted_chats bigint, repaired_messages bigint,
                       latency bigint[])"""
# The bounds on bucket use the key of the rollups; those on the result are exact.
HOURLY_FUNCTION = """
    CREATE FUNCTION analytics.hourly_by(variable text, zone text DEFAULT 'UTC', since timestamptz DEFAULT NULL,
                                        until timestamptz DEFAULT NULL)
        RETURNS TABLE (hour timestamptz, assistant_id text, {columns}
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT date_trunc('hour', r.bucket, $2), r.assistant_id, r.value, {sums}
          FROM analytics.variable_rollups r
         WHERE r.variable = $1
           AND r.bucket >= coalesce($3, '-infinity') AND r.bucket < coalesce($4 + interval '1 hour', 'infinity')
           AND date_trunc('hour', r.bucket, $2) >= coalesce($3, '-infinity')
           AND date_trunc('hour', r.bucket, $2) < coalesce($4, 'infinity')
         GROUP BY 1, 2, 3
    $$
"""
DAILY_FUNCTION = """
    CREATE FUNCTION analytics.daily_by(variable text, zone text DEFAULT 'UTC', since date DEFAULT NULL,
                                       until date DEFAULT NULL)
        RETURNS TABLE (day date, assistant_id text, {columns}
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT CAST(r.bucket AT TIME ZONE $2 AS date), r.assistant_id, r.value, {sums}
          FROM analytics.variable_rollups r
         WHERE r.variable = $1
           AND r.bucket >= coalesce(CAST($3 - 1 AS timestamp) AT TIME ZONE $2, '-infinity')
           AND r.bucket < coalesce(CAST($4 + 1 AS timestamp) AT TIME ZONE $2, 'infinity')
           AND CAST(r.bucket AT TIME ZONE $2 AS date) >= coalesce($3, '-infinity')
           AND CAST(r.bucket AT TIME ZONE $2 AS date) < coalesce($4, 'infinity')
         GROUP BY 1, 2, 3
    $$
"""
HOURLY, DAILY = (
    "analytics.hourly_by(text, text, timestamptz, timestamptz)",
    "analytics.daily_by(text, text, date, date)",
)


def _comments(earlier: Any) -> dict[str, str]:
    """Return the comments of the views and functions."""
    return {
        "VIEW analytics.variables": "One row per promoted variable by which analytics.variable_rollups has figures.",
        "COLUMN analytics.variables.name": NAME,
        "COLUMN analytics.variables.state": (
            "collecting: a worker is storing its values, and queries compute the figures; complete: all are stored."
        ),
        "COLUMN analytics.variables.known_values": "Number of values that are kept.",
        "COLUMN analytics.variables.is_full": FULL,
        "VIEW analytics.variable_rollups": (
            "One row per 15 minutes, assistant, promoted variable and value; for one variable, its figures add up."
            " Exact at any time."
        ),
        "COLUMN analytics.variable_rollups.bucket": earlier.BUCKET,
        "COLUMN analytics.variable_rollups.assistant_id": "Assistant; null where none is known.",
        "COLUMN analytics.variable_rollups.variable": NAME,
        "COLUMN analytics.variable_rollups.value": OF_SESSION,
        **{f"COLUMN analytics.variable_rollups.{name}": comment for name, comment in earlier.COUNTS.items()},
        "COLUMN analytics.variable_rollups.latency": earlier.LATENCY,
        f"FUNCTION {HOURLY}": (
            "One row per hour of a time zone, assistant and value of a promoted variable, for hours that begin at or"
            " after since and before until."
        ),
        f"FUNCTION {DAILY}": (
            "One row per day of a time zone, assistant and value of a promoted variable, for days from since to"
            " before until."
        ),
    }


def _create_tables(earlier: Any) -> None:
    op.create_table(
        "promoted_variables",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False, comment="Never used again."),
        sa.Column("name", sa.Text(), nullable=False, comment=NAME),
        sa.Column("state", sa.Text(), nullable=False, comment=STATE),
        sa.Column(
            "collected_through", sa.Text(), nullable=False, comment="While collecting: up to this conversation."
        ),
        sa.Column("is_full", sa.Boolean(), nullable=False, comment=FULL),
        sa.PrimaryKeyConstraint("id", name="promoted_variables_pkey"),
        schema=SCHEMA,
        comment="Variables of ARCHIVER_ANALYTICS_VARIABLES with variable_rollups, as of archiver migrate.",
    )
    op.create_table(
        "variable_values",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False, comment="Never used again."),
        sa.Column("variable_id", sa.Integer(), nullable=False, comment=VARIABLE),
        sa.Column("value", sa.Text(), nullable=False, comment=VALUE),
        sa.PrimaryKeyConstraint("id", name="variable_values_pkey"),
        sa.UniqueConstraint("variable_id", "value", name="variable_values_variable_id_value_key"),
        schema=SCHEMA,
        comment="Values of promoted variables; deleted when the last conversation with a value changes or is erased.",
    )
    op.create_table(
        "session_values",
        sa.Column("session_id", sa.Text(), nullable=False, comment="Conversation."),
        sa.Column("variable_id", sa.Integer(), nullable=False, comment=VARIABLE),
        sa.Column("value_id", sa.Integer(), nullable=False, comment="Its value; 0: none; -1: (other)."),
        sa.PrimaryKeyConstraint("session_id", "variable_id", name="session_values_pkey"),
        sa.Index("session_values_variable_id_value_id_idx", "variable_id", "value_id"),
        schema=SCHEMA,
        comment="The value of each promoted variable in each conversation, as of its latest published change.",
    )
    op.create_table(
        "variable_rollups",
        sa.Column("variable_id", sa.Integer(), nullable=False, comment=VARIABLE),
        sa.Column("bucket", Time, nullable=False, comment=earlier.BUCKET),
        sa.Column("assistant_id", sa.Text(), nullable=False, comment=earlier.ASSISTANT),
        sa.Column(
            "value_id", sa.Integer(), nullable=False, comment="Value of their conversations; 0: none; -1: (other)."
        ),
        *(
            sa.Column(
                name,
                sa.Numeric() if name == "cost" else sa.Integer(),
                nullable=name == "cost",
                comment=comment,
            )
            for name, comment in earlier.COUNTS.items()
        ),
        sa.Column("latency", postgresql.ARRAY(sa.Integer), nullable=False, comment=earlier.LATENCY),
        sa.PrimaryKeyConstraint("variable_id", "bucket", "assistant_id", "value_id", name="variable_rollups_pkey"),
        schema=SCHEMA,
        comment="Sums of the contributions by value of a variable; buckets in stale_buckets may be outdated.",
    )
    # The planner keeps no samples of content that an erasure removes.
    op.execute("ALTER TABLE archiver.variable_values ALTER COLUMN value SET STATISTICS 0")
    op.execute("ALTER TABLE archiver.variable_rollups ALTER COLUMN cost SET STATISTICS 0")


def _rollups() -> Any:
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    return script.get_revision("0026").module


def upgrade() -> None:
    earlier = _rollups()
    _create_tables(earlier)
    sums, figures = (each.split(",", 1)[1] for each in (earlier.SUMS, earlier.FIGURES))
    view = ROLLUPS.format(
        parts=earlier.PARTS,
        sums=sums,
        figures=figures,
        of_sum=STORED.format(id="r.value_id"),
        of_session=STORED.format(id="v.value_id"),
        of_summary=value("t.variables"),
        of_turns=value("m.variables"),
        merged=MERGED,
    )
    op.execute(sa.text(f"CREATE VIEW analytics.variables AS {VARIABLES}"))
    op.get_bind().exec_driver_sql(f"CREATE VIEW analytics.variable_rollups AS {view}")
    op.get_bind().exec_driver_sql(HOURLY_FUNCTION.format(columns=_COLUMNS, sums=sums))
    op.get_bind().exec_driver_sql(DAILY_FUNCTION.format(columns=_COLUMNS, sums=sums))
    for name, comment in _comments(earlier).items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {DAILY}")
    op.execute(f"DROP FUNCTION {HOURLY}")
    op.execute("DROP VIEW analytics.variable_rollups")
    op.execute("DROP VIEW analytics.variables")
    for name in ("variable_rollups", "session_values", "variable_values", "promoted_variables"):
        op.drop_table(name, schema=SCHEMA)
