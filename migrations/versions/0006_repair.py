"""Repair databases that an earlier text of migrations 0001 to 0005 created.

Some of these migrations were edited after the first databases had run them. `repair` brings such a database to the
schema that the present text gives; on any other database it changes nothing that a dump of the schema shows.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    repair(op.get_bind(), script, "0005")


def downgrade() -> None:
    """Nothing to undo: the present text of the older migrations describes the repaired schema."""


def repair(connection: Connection, script: ScriptDirectory, at: str) -> None:
    """Bring a database at revision `at`, from 0001 to 0005, to what the present text of that revision gives.

    A database below 0005 needs it before the next migration, which relies on columns that an earlier text lacked.
    """
    modules = {number: script.get_revision(number).module for number in ("0001", "0002", "0003")}
    _repair_0001(connection, modules["0001"], at)
    if at >= "0002":
        _repair_0002(connection, modules)
        _create_views(connection, modules, with_erasures=at >= "0003")
    if at >= "0003":
        _repair_0003(connection, modules["0003"])
    if at >= "0005":
        _run(connection, f"COMMENT ON TABLE archiver.deliveries IS '{DELIVERIES}'")


def _run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(sa.text(statement.replace(":", r"\:")))


def _has_column(connection: Connection, table: str, column: str) -> bool:
    query = sa.text(
        "SELECT EXISTS (SELECT FROM information_schema.columns"
        " WHERE table_schema = 'archiver' AND table_name = :table AND column_name = :column)"
    )
    return bool(connection.scalar(query, {"table": table, "column": column}))


def _repair_0001(connection: Connection, module: Any, at: str) -> None:
    if at == "0001" and _has_column(connection, "sessions", "assistant_id_at"):
        _replace_first_tables(connection, module)
    _run(
        connection,
        "COMMENT ON TABLE archiver.schema_version IS 'The revision of this schema; kept by archiver migrate.'",
        "COMMENT ON COLUMN archiver.schema_version.version_num IS 'Newest migration applied.'",
        "ALTER TABLE archiver.messages DROP CONSTRAINT IF EXISTS messages_session_id_chat_id_fkey",
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at) VALUES ('', 'epoch', 'epoch')"
        " ON CONFLICT DO NOTHING",
    )


def _replace_first_tables(connection: Connection, module: Any) -> None:
    """The first text of 0001 kept name, status and assistant with the session instead of with the turn."""
    for name in reversed(module.VIEWS):
        _run(connection, f"DROP VIEW analytics.{name}")
    _run(
        connection,
        "ALTER TABLE archiver.chats ADD COLUMN session_name text, ADD COLUMN session_status text,"
        " ADD COLUMN later_deleted_at timestamptz, ADD COLUMN later_source text",
        "UPDATE archiver.chats c SET session_name = s.name, session_status = s.status,"
        " assistant_id = coalesce(c.assistant_id, s.assistant_id),"
        " later_deleted_at = c.deleted_at, later_source = c.source"
        " FROM archiver.sessions s WHERE s.session_id = c.session_id",
        "ALTER TABLE archiver.chats DROP COLUMN deleted_at, DROP COLUMN source",
        # The order of the columns is part of what a dump shows: these two come last.
        "ALTER TABLE archiver.chats RENAME COLUMN later_deleted_at TO deleted_at",
        "ALTER TABLE archiver.chats RENAME COLUMN later_source TO source",
        "ALTER TABLE archiver.chats ALTER COLUMN source SET NOT NULL",
        "ALTER TABLE archiver.sessions DROP COLUMN assistant_id, DROP COLUMN assistant_id_at, DROP COLUMN name,"
        " DROP COLUMN name_at, DROP COLUMN status, DROP COLUMN status_at",
        *(f"COMMENT ON COLUMN archiver.chats.{column} IS '{comment}'" for column, comment in CHATS.items()),
    )
    for name, (meaning, query, columns) in module.VIEWS.items():
        _create_view(connection, name, meaning, query, columns)


def _repair_0002(connection: Connection, modules: dict[str, Any]) -> None:
    _run(
        connection,
        "ALTER TABLE archiver.sessions ADD COLUMN IF NOT EXISTS failing_since timestamptz",
        "ALTER TABLE archiver.quarantine ADD COLUMN IF NOT EXISTS source text NOT NULL DEFAULT 'webhook',"
        " ADD COLUMN IF NOT EXISTS type text, ADD COLUMN IF NOT EXISTS session_id text,"
        " ADD COLUMN IF NOT EXISTS dedupe_key bytea",
    )
    added = modules["0002"].columns()
    for table in ("sessions", "quarantine"):
        for column in added[table]:
            _run(connection, f"COMMENT ON COLUMN archiver.{table}.{column.name} IS '{column.comment}'")
    for table, column, comment in modules["0002"].COMMENTS:
        _run(connection, f"COMMENT ON COLUMN archiver.{table}.{column} IS '{comment}'")


def _create_views(connection: Connection, modules: dict[str, Any], *, with_erasures: bool) -> None:
    for name, (meaning, query, comments) in modules["0002"].VIEWS.items():
        columns = comments
        if with_erasures and name in modules["0003"].ERASED_AT:
            query = query.replace(*modules["0003"].ERASED_AT[name])  # noqa: PLW2901
            columns = comments | {"erased_at": "When its content was erased; null if it was not."}
        _create_view(connection, name, meaning, query, columns)
    _run(connection, _or_replace(modules["0002"].COMPLETE_THROUGH))


def _create_view(connection: Connection, name: str, meaning: str, query: str, columns: dict[str, str]) -> None:
    _run(
        connection,
        f"CREATE OR REPLACE VIEW analytics.{name} AS {query}",
        f"COMMENT ON VIEW analytics.{name} IS '{meaning}'",
        *(f"COMMENT ON COLUMN analytics.{name}.{column} IS '{comment}'" for column, comment in columns.items()),
    )


def _repair_0003(connection: Connection, module: Any) -> None:
    for function in (module.GUARD_EVENT, module.GUARD_COUNTERS, module.GUARD_HOLD, module.REFUSE_CHANGE):
        _run(connection, _or_replace(function))
    _run(
        connection,
        "DROP TRIGGER IF EXISTS events_guard ON archiver.events",
        "CREATE TRIGGER events_guard BEFORE DELETE OR UPDATE OF session_id, dedupe_key, id, type, source, chat_id,"
        " received_at, occurred_at, key_id, body, salt, body_digest ON archiver.events"
        " FOR EACH ROW EXECUTE FUNCTION archiver.guard_event()",
        "DROP TRIGGER IF EXISTS events_guard_counters ON archiver.events",
        "CREATE TRIGGER events_guard_counters BEFORE UPDATE OF delivery_count, last_received_at, earliest_at"
        " ON archiver.events FOR EACH ROW EXECUTE FUNCTION archiver.guard_counters()",
        # An earlier guard left the value of a released hold, which may identify a person.
        "DROP TRIGGER IF EXISTS holds_guard ON archiver.holds",
        "UPDATE archiver.holds SET value = NULL WHERE released_at IS NOT NULL AND value IS NOT NULL",
        "CREATE TRIGGER holds_guard BEFORE UPDATE OR DELETE ON archiver.holds"
        " FOR EACH ROW EXECUTE FUNCTION archiver.guard_hold()",
        "COMMENT ON COLUMN archiver.holds.value IS 'Value of the variable; null once released.'",
    )
    for table, columns in module.CONTENT.items():
        for column in columns:
            _run(connection, f"ALTER TABLE archiver.{table} ALTER COLUMN {column} SET STATISTICS 0")


def _or_replace(function: str) -> str:
    return function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)


DELIVERIES = "Follow-ups at hand, ids only: content is read as it is sent, and the queue is the feed."
CHATS = {
    "session_name": "Name of the session, where its deliveries told it.",
    "session_status": "Status of the session, where its deliveries told it.",
    "deleted_at": "Tombstone: when upstream deleted it; content stays.",
    "source": "Whence it is known: webhook.",
}
