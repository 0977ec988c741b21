"""Rows that Postgres fetches from tables which it has never analysed, as after an installation."""

from sqlalchemy import Connection, Engine, text

from tests.support.rows import execute

TABLES = ("events", "sessions", "chats", "messages", "changes")
_FETCHED = text(
    """
    SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_xact_user_tables
     WHERE schemaname = 'archiver' AND relname = ANY (:tables)
    """
).bindparams(tables=list(TABLES))


def keep_without_statistics(engine: Engine) -> None:
    """Never analyse the tables of this database."""
    for table in TABLES:
        execute(engine, f"ALTER TABLE archiver.{table} SET (autovacuum_enabled = off)")


def count_fetched(connection: Connection) -> int:
    """Return how many rows were fetched until now; also counts transactions that ended shortly before."""
    return int(connection.scalar(_FETCHED) or 0)
