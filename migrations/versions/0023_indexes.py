"""Indexes for questions about a time, a turn or an update. `archiver migrate` creates them concurrently."""

from alembic import op
from sqlalchemy import text

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# In an archive that is in use, all of these exist before the migration runs: see `archiver.database.schema`.
CONCURRENTLY = {
    "sessions_first_event_at_idx": "archiver.sessions (first_event_at)",
    "sessions_incomplete_idx": (
        "archiver.sessions (coalesce(reconciled_at, first_event_at))"
        " WHERE session_id <> '' AND (coverage = 'open' OR reconcile_at IS NOT NULL)"
        " AND NOT (reason = 'history_gone' OR coverage = 'lost')"
    ),
    "chats_began_at_idx": "archiver.chats (coalesce(began_at, created_at, occurred_at, first_received_at))",
    "chats_history_turn_id_idx": (
        "archiver.chats ((session_id || '#' || coalesce(nullif(substr(chat_id, 2), ''), '0')))"
        " WHERE source = 'history'"
    ),
    "chats_updated_at_idx": "archiver.chats (updated_at) WHERE updated_at IS NOT NULL",
}


def upgrade() -> None:
    for name, definition in CONCURRENTLY.items():
        if op.get_bind().scalar(text("SELECT to_regclass(:name)"), {"name": f"archiver.{name}"}) is None:
            op.execute(f"CREATE INDEX {name} ON {definition}")
    op.execute("DROP INDEX archiver.sessions_open_idx")


def downgrade() -> None:
    op.execute("CREATE INDEX sessions_open_idx ON archiver.sessions (first_event_at) WHERE coverage = 'open'")
    for name in reversed(CONCURRENTLY):
        op.execute(f"DROP INDEX archiver.{name}")
