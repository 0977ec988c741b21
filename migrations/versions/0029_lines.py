"""`analytics.lines` with a join whose size Postgres estimates, so that from Postgres 17 a LIMIT ends it early."""

from typing import Any

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def _earlier(number: str) -> Any:
    """Return the module of an earlier migration."""
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    return script.get_revision(number).module


def _lines() -> str:
    """Return the view.

    Postgres estimates few rows for an inner join on two columns, and then prepares the whole join for a LIMIT. It
    estimates at least the turns for an outer join. The condition on ordinal keeps the join an outer one; a strict
    one (`ordinal >= 0`) would turn it into an inner join.
    """
    turns = _earlier("0021")
    messages = (
        "FROM archiver.chats c"
        " LEFT JOIN archiver.messages m ON m.session_id = c.session_id AND m.chat_id = c.chat_id"
        " WHERE coalesce(m.ordinal, -1) >= 0"
    )
    text = "m.ordinal, m.role, m.content, m.content_kind"
    return f"""
        SELECT c.chat_id AS turn_id, c.session_id, {text}, {turns.BEGAN_NOW} AS began_at,
               {turns.IS_TOLD} AS began_is_told, m.source, c.deleted_at, m.history_content
          {messages} AND c.source <> 'history'
        UNION ALL
        SELECT {turns.TURN_ID_OF.format(turn="c")}, c.session_id, {text}, {turns.BEGAN_NOW},
               false, m.source, NULL::timestamptz, m.history_content
          {messages} AND c.source = 'history'
    """


def upgrade() -> None:
    op.execute(f"CREATE OR REPLACE VIEW analytics.lines AS {_lines()}")


def downgrade() -> None:
    op.execute(f"CREATE OR REPLACE VIEW analytics.lines AS {_earlier('0021').LINES}")
