"""A sealed ledger, and what a forger may do to it."""

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, text

from tests.support.rows import execute

NOW = datetime(2026, 1, 1, tzinfo=UTC)


KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def erase(engine: Engine, session_id: str, chat_id: str) -> None:
    execute(
        engine,
        "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
        f" VALUES ('{session_id}', '{chat_id}', now(), 'request', 1)",
        "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = sha256(salt || dedupe_key)"
        f" WHERE session_id = '{session_id}' AND chat_id = '{chat_id}'",
    )


def forge(connection: Connection, statement: str, renumbered: str | None = None) -> int:
    """The rows that a statement changed, in a transaction of its own that stays open."""
    connection.rollback()
    connection.execute(text("SET LOCAL session_replication_role = replica"))
    if renumbered is not None:
        connection.execute(text(f"ALTER TABLE archiver.{renumbered} ALTER COLUMN id DROP IDENTITY IF EXISTS"))
    return connection.execute(text(statement)).rowcount
