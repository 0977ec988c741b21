"""One stored row per session for analysts; `analytics.health` shows how far it and the feed are."""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

COLUMNS = {
    "session_id": "CallHQ session id.",
    "assistant_id": "Assistant, from the latest report.",
    "started_at": "Creation of its first turn or of the session; if not reported, arrival of its first event.",
    "last_message_at": "Latest creation or update of its turns.",
    "turns": "Turns, deleted ones included.",
    "messages": "Messages, those of deleted turns included.",
    "user_messages": "Messages of role user.",
    "assistant_messages": "Messages of role assistant.",
    "cost": "Total cost of its turns; null if none reported a cost.",
    "deleted_chats": "Turns that upstream deleted.",
    "repaired_messages": "Messages that history supplied.",
    "coverage": "open, complete, repaired, ambiguous, unverified or lost; see coverage.",
    "reason": "Code of the reason for that state.",
    "first_question": "First message of role user with text, as now archived; null if none.",
    "first_answer": "First message of role assistant with text after first_question, as now archived; null if none.",
    "answer_seconds": (
        "From the creation of the turn of first_question to the update of the first revision that answers it;"
        " null if not reported."
    ),
    "variables": "variableValues of its turns; a later turn''s value wins.",
    "changed_cursor": "Cursor of its last change, see analytics.changes.",
}
TABLE = """
    CREATE TABLE archiver.summaries (
        session_id text NOT NULL,
        assistant_id text,
        started_at timestamptz NOT NULL,
        last_message_at timestamptz NOT NULL,
        turns bigint NOT NULL,
        messages bigint NOT NULL,
        user_messages bigint NOT NULL,
        assistant_messages bigint NOT NULL,
        cost numeric,
        deleted_chats bigint NOT NULL,
        repaired_messages bigint NOT NULL,
        coverage text NOT NULL,
        reason text NOT NULL,
        first_question text,
        first_answer text,
        answer_seconds double precision,
        variables jsonb,
        changed_cursor bigint NOT NULL,
        CONSTRAINT summaries_pkey PRIMARY KEY (session_id)
    )
"""
INDEXES = {
    "last_message_at": "(last_message_at, session_id)",
    "started_at": "(started_at, session_id)",
    "changed_cursor": "(changed_cursor)",
    "variables": "USING gin (variables jsonb_path_ops)",
}
# Of turns of sessions that will be read again; otherwise their next reading would report a change of each of them.
ANSWERED = """
    UPDATE archiver.chats c SET answered_at = c.updated_at
      FROM archiver.sessions s
     WHERE s.session_id = c.session_id AND s.reconcile_at IS NOT NULL AND s.session_id <> ''
       AND c.updated_at IS NOT NULL
       AND EXISTS (SELECT FROM archiver.messages m
                    WHERE m.session_id = c.session_id AND m.chat_id = c.chat_id
                      AND m.role = 'assistant' AND m.content <> '')
"""
# The planner keeps no samples of content that an erasure removes.
UNSAMPLED = ("cost", "first_question", "first_answer", "variables")

UNREAD = "reason IN ('history_unavailable', 'history_unreadable') AND next_reading_at IS NULL"
EARLIER_HEALTH = f"""
    SELECT analytics.complete_through() AS complete_through,
           count(*) FILTER (WHERE reason = 'history_gone') AS unknown_sessions,
           count(*) FILTER (WHERE state = 'lost') AS lost_sessions,
           count(*) FILTER (WHERE {UNREAD}) AS unread_sessions
      FROM analytics.coverage
     WHERE reason = 'history_gone' OR state = 'lost' OR {UNREAD}
"""
HEALTH = f"""
    SELECT h.*,
           coalesce((SELECT extract(epoch FROM clock_timestamp() - o.changed_at)::double precision
                       FROM archiver.outbox o ORDER BY o.id LIMIT 1), 0) AS feed_lag_seconds,
           (SELECT extract(epoch FROM clock_timestamp() - min(a.xact_start))::double precision
              FROM pg_stat_activity a
             WHERE a.datname = current_database() AND a.backend_xmin IS NOT NULL) AS oldest_snapshot_seconds,
           (SELECT max(c.cursor) FROM archiver.changes c) AS summary_cursor
      FROM ({EARLIER_HEALTH}) h
"""
HEALTH_COMMENTS = {
    "complete_through": (
        "Every known session is reconciled up to this time, except those counted in the next columns."
    ),
    "unknown_sessions": "Sessions for whose history CallHQ returned 404 or 410.",
    "lost_sessions": "Sessions with a turn whose content neither a webhook nor a history delivered.",
    "unread_sessions": "Sessions that expired before CallHQ returned a readable history.",
}
NEW_HEALTH_COMMENTS = {
    "feed_lag_seconds": (
        "Age of the oldest change that is not yet in analytics.changes and analytics.sessions; 0 if none."
    ),
    "oldest_snapshot_seconds": (
        "Age of the oldest transaction that holds a snapshot, among those that this user may see (pg_read_all_stats)."
    ),
    "summary_cursor": "analytics.sessions contains all changes up to this cursor; null if the feed is empty.",
}


def upgrade() -> None:
    op.execute("ALTER TABLE archiver.chats ADD COLUMN answered_at timestamptz")
    op.execute(
        "COMMENT ON COLUMN archiver.chats.answered_at IS 'Upstream time of its first revision with an answer;"
        " null if not reported, and in rows of older versions.'"
    )
    op.execute(ANSWERED)
    op.execute(TABLE)
    for name in UNSAMPLED:
        op.execute(f"ALTER TABLE archiver.summaries ALTER COLUMN {name} SET STATISTICS 0")
    for name, definition in INDEXES.items():
        op.execute(f"CREATE INDEX summaries_{name}_idx ON archiver.summaries {definition}")
    op.execute(
        "COMMENT ON TABLE archiver.summaries IS 'One row per session for analysts, derived from sessions, chats and"
        " messages by the publisher of the feed.'"
    )
    op.execute(f"CREATE VIEW analytics.sessions AS SELECT {', '.join(COLUMNS)} FROM archiver.summaries")
    op.execute("COMMENT ON VIEW analytics.sessions IS 'One stored row per session: fast, and a moment behind.'")
    for name, comment in COLUMNS.items():
        op.execute(f"COMMENT ON COLUMN archiver.summaries.{name} IS '{comment}'")
        op.execute(f"COMMENT ON COLUMN analytics.sessions.{name} IS '{comment}'")
    op.execute(f"CREATE OR REPLACE VIEW analytics.health AS {HEALTH}")
    op.execute("COMMENT ON VIEW analytics.health IS 'One row: how complete and how current the archive is.'")
    for name, comment in NEW_HEALTH_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW analytics.health")
    op.execute(f"CREATE VIEW analytics.health AS {EARLIER_HEALTH}")
    op.execute("COMMENT ON VIEW analytics.health IS 'One row: how complete the archive is.'")
    for name, comment in HEALTH_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN analytics.health.{name} IS '{comment}'")
    op.execute("DROP VIEW analytics.sessions")
    op.execute("DROP TABLE archiver.summaries")
    op.execute("ALTER TABLE archiver.chats DROP COLUMN answered_at")
