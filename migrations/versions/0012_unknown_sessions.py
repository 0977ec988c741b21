"""Unknown and lost sessions hold back `complete_through()` no longer; `analytics.health` counts them."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# An answer of 404 or 410, or a turn whose content no source ever gave.
UNKNOWN = "reason = 'history_gone' OR {state} = 'lost'"

COMPLETE_THROUGH = f"""
    CREATE OR REPLACE FUNCTION analytics.complete_through() RETURNS timestamptz LANGUAGE sql STABLE AS $$
        SELECT coalesce(min(coalesce(reconciled_at, first_event_at)), now())
          FROM analytics.coverage
         WHERE (state = 'open' OR next_reading_at IS NOT NULL) AND NOT ({UNKNOWN.format(state="state")})
    $$
"""

HEALTH = """
    SELECT analytics.complete_through() AS complete_through,
           count(*) FILTER (WHERE reason = 'history_gone') AS unknown_sessions,
           count(*) FILTER (WHERE state = 'lost') AS lost_sessions
      FROM analytics.coverage
     WHERE reason = 'history_gone' OR state = 'lost'
"""

COMMENTS = {
    "complete_through": "Up to here every known session is reconciled, except those that the next columns count.",
    "unknown_sessions": "Sessions whose history CallHQ answered with 404 or 410.",
    "lost_sessions": "Sessions with a turn whose content no webhook and no history gave.",
}

# As it was before.
EARLIER = """
    CREATE OR REPLACE FUNCTION analytics.complete_through() RETURNS timestamptz LANGUAGE sql STABLE AS $$
        SELECT coalesce(min(coalesce(reconciled_at, first_event_at)), now())
          FROM analytics.coverage WHERE state = 'open' OR next_reading_at IS NOT NULL
    $$
"""


def upgrade() -> None:
    op.execute(
        "CREATE INDEX sessions_unknown_idx ON archiver.sessions (first_event_at)"
        f" WHERE {UNKNOWN.format(state='coverage')}"
    )
    op.execute(COMPLETE_THROUGH)
    op.execute(
        "COMMENT ON FUNCTION analytics.complete_through() IS 'Up to here every known session is reconciled, except"
        " those that CallHQ reports as unknown and those with lost content; analytics.health counts them.'"
    )
    op.execute(f"CREATE VIEW analytics.health AS {HEALTH}")
    op.execute("COMMENT ON VIEW analytics.health IS 'One row: how complete the archive is.'")
    for column, comment in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{column} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW analytics.health")
    op.execute(EARLIER)
    op.execute("COMMENT ON FUNCTION analytics.complete_through() IS 'Up to here every known session is reconciled.'")
    op.execute("DROP INDEX archiver.sessions_unknown_idx")
