"""Sessions whose rows for analysts cannot be stored are set aside; `analytics.health` counts those without rows."""

from typing import Any

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

TABLE = "Conversations without a row in summaries and contributions, which a worker has yet to compute."
EARLIER_TABLE = "Conversations of earlier versions whose contributions a worker has yet to compute."
COLUMNS = {
    "failed_at": ("timestamptz", "When Postgres first rejected the rows, or took too long; null: not yet computed."),
    "retry_at": ("timestamptz", "Time of the next attempt; null: at once."),
    "reason": ("text", "Why the latest attempt failed."),
}
# A worker adds the rows that an earlier version had not yet added.
WITHOUT_SUMMARY = """
    INSERT INTO archiver.uncontributed (session_id)
    SELECT s.session_id FROM archiver.sessions s
     WHERE s.session_id <> '' AND NOT EXISTS (SELECT FROM archiver.summaries t WHERE t.session_id = s.session_id)
    ON CONFLICT DO NOTHING
"""
HEALTH = """
    SELECT h.complete_through, h.unknown_sessions, h.lost_sessions, h.unread_sessions, h.feed_lag_seconds,
           h.oldest_snapshot_seconds,
           CASE WHEN NOT EXISTS (SELECT FROM archiver.uncontributed u WHERE u.failed_at IS NULL)
                THEN h.summary_cursor END AS summary_cursor,
           h.rollups_lag_seconds, (SELECT count(*) FROM archiver.uncontributed) AS waiting_sessions
      FROM ({earlier}) h
"""
COMMENTS = {
    "summary_cursor": (
        "analytics.sessions contains all changes up to this cursor, except those of waiting sessions; null while a"
        " worker adds the rows of sessions of earlier versions."
    ),
    "waiting_sessions": (
        "Sessions without a row in analytics.sessions: of earlier versions, or whose row cannot be stored; queries of"
        " daily and rollups compute their figures."
    ),
}


def _earlier_health() -> tuple[str, dict[str, str]]:
    """Return the definition of the view in the schema before, and its comments by column."""
    script: Any = op.get_context().script
    summaries, rollups = (script.get_revision(number).module for number in ("0022", "0026"))
    comments = summaries.HEALTH_COMMENTS | summaries.NEW_HEALTH_COMMENTS
    lag = "rollups_lag_seconds"
    comments[lag] = rollups.COMMENTS[f"COLUMN analytics.health.{lag}"]
    return rollups.HEALTH.format(earlier=summaries.HEALTH), comments


def upgrade() -> None:
    for name, (kind, comment) in COLUMNS.items():
        op.execute(f"ALTER TABLE archiver.uncontributed ADD COLUMN {name} {kind}")
        op.execute(f"COMMENT ON COLUMN archiver.uncontributed.{name} IS '{comment}'")
    op.execute(f"COMMENT ON TABLE archiver.uncontributed IS '{TABLE}'")
    op.execute(WITHOUT_SUMMARY)
    earlier, _ = _earlier_health()
    op.execute(f"CREATE OR REPLACE VIEW analytics.health AS {HEALTH.format(earlier=earlier)}")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{name} IS '{comment}'")


def downgrade() -> None:
    earlier, comments = _earlier_health()
    op.execute("DROP VIEW analytics.health")
    op.execute(f"CREATE VIEW analytics.health AS {earlier}")
    op.execute("COMMENT ON VIEW analytics.health IS 'One row: how complete and how current the archive is.'")
    for name, comment in comments.items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{name} IS '{comment}'")
    op.execute(f"COMMENT ON TABLE archiver.uncontributed IS '{EARLIER_TABLE}'")
    for name in COLUMNS:
        op.execute(f"ALTER TABLE archiver.uncontributed DROP COLUMN {name}")
