"""`analytics.health` counts the sessions that expired before their history could be read."""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

UNKNOWN = "reason = 'history_gone' OR {state} = 'lost'"
# While a reading is planned, such a session holds back `complete_through()` instead.
UNREAD = "reason IN ('history_unavailable', 'history_unreadable') AND {next} IS NULL"

HEALTH = f"""
    SELECT analytics.complete_through() AS complete_through,
           count(*) FILTER (WHERE reason = 'history_gone') AS unknown_sessions,
           count(*) FILTER (WHERE state = 'lost') AS lost_sessions,
           count(*) FILTER (WHERE {UNREAD.format(next="next_reading_at")}) AS unread_sessions
      FROM analytics.coverage
     WHERE {UNKNOWN.format(state="state")} OR {UNREAD.format(next="next_reading_at")}
"""

# As it was before.
EARLIER = f"""
    SELECT analytics.complete_through() AS complete_through,
           count(*) FILTER (WHERE reason = 'history_gone') AS unknown_sessions,
           count(*) FILTER (WHERE state = 'lost') AS lost_sessions
      FROM analytics.coverage
     WHERE {UNKNOWN.format(state="state")}
"""
COMMENTS = {
    "VIEW analytics.health": "One row: how complete the archive is.",
    "COLUMN analytics.health.complete_through": (
        "Every known session is reconciled up to this time, except those counted in the next columns."
    ),
    "COLUMN analytics.health.unknown_sessions": "Sessions for whose history CallHQ returned 404 or 410.",
    "COLUMN analytics.health.lost_sessions": (
        "Sessions with a turn whose content neither a webhook nor a history delivered."
    ),
}
INDEX = "CREATE INDEX sessions_unknown_idx ON archiver.sessions (first_event_at) WHERE"


def upgrade() -> None:
    op.execute("DROP INDEX archiver.sessions_unknown_idx")
    op.execute(f"{INDEX} {UNKNOWN.format(state='coverage')} OR {UNREAD.format(next='reconcile_at')}")
    op.execute(f"CREATE OR REPLACE VIEW analytics.health AS {HEALTH}")
    op.execute(
        "COMMENT ON COLUMN analytics.health.unread_sessions IS"
        " 'Sessions that expired before CallHQ returned a readable history.'"
    )
    op.execute(
        "COMMENT ON FUNCTION analytics.complete_through() IS 'Every known session is reconciled up to this time,"
        " except those that analytics.health counts.'"
    )


def downgrade() -> None:
    op.execute("DROP VIEW analytics.health")
    op.execute(f"CREATE VIEW analytics.health AS {EARLIER}")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")
    op.execute("DROP INDEX archiver.sessions_unknown_idx")
    op.execute(f"{INDEX} {UNKNOWN.format(state='coverage')}")
    op.execute(
        "COMMENT ON FUNCTION analytics.complete_through() IS 'Up to here every known session is reconciled, except"
        " those that CallHQ reports as unknown and those with lost content; analytics.health counts them.'"
    )
