"""Check for settings of an administrator that make writes to the tables unsafe, slow or impossible."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from archiver.database.schema import SCHEMAS
from archiver.operations.doctor.finding import Finding, shortened

# A trigger without ENABLE ALWAYS does not run in sessions with role `replica`. The setting may be another user's.
_OTHER_ROLES = text(
    """
    SELECT concat_ws(' ', 'ALTER',
                     CASE WHEN setrole <> 0 THEN format('ROLE %I', pg_get_userbyid(setrole))
                          WHEN setdatabase = 0 THEN 'ROLE ALL' END,
                     CASE WHEN setdatabase <> 0
                          THEN format(CASE WHEN setrole <> 0 THEN 'IN DATABASE %I' ELSE 'DATABASE %I' END,
                                      current_database()) END,
                     'RESET session_replication_role;')
      FROM pg_db_role_setting, unnest(setconfig) AS setting
     WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
       AND setting = 'session_replication_role=replica'
     ORDER BY 1
    """
)
# Postgres refuses to update or delete rows of a published table if subscribers could not identify them.
_UNIDENTIFIED = text(
    """
    SELECT DISTINCT format('%I.%I', n.nspname, c.relname)
      FROM pg_publication p
      JOIN pg_publication_tables t ON t.pubname = p.pubname
      JOIN pg_namespace n ON n.nspname = t.schemaname AND n.nspname = ANY (CAST(:schemas AS text[]))
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename
     WHERE (p.pubupdate OR p.pubdelete)
       AND (c.relreplident = 'n' OR c.relreplident = 'i' AND NOT EXISTS (
                SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid))
     ORDER BY 1
    """
)
_NOT_VACUUMED = text(
    """
    SELECT format('%I.%I', n.nspname, c.relname)
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN pg_class toast ON toast.oid = c.reltoastrelid
     WHERE c.relkind IN ('r', 'm') AND n.nspname = ANY (CAST(:schemas AS text[]))
       AND EXISTS (SELECT FROM unnest(coalesce(c.reloptions, '{}') || coalesce(toast.reloptions, '{}')) AS option
                    WHERE split_part(option, '=', 1) = 'autovacuum_enabled'
                      AND NOT CAST(split_part(option, '=', 2) AS boolean))
     ORDER BY 1
    """
)


def examine_tables(connection: Connection) -> Iterator[Finding]:
    """Report settings under which guards do not run, rows cannot be changed, or tables are not vacuumed."""
    if connection.scalar(text("SELECT current_setting('session_replication_role')")) == "replica":
        detail = "session_replication_role is replica: the triggers that guard the ledger do not run."
        yield Finding("guards", "failure", detail, _reset(connection))
    elif others := list(connection.scalars(_OTHER_ROLES)):
        detail = "For some users session_replication_role is replica: no trigger guards the ledger from them."
        yield Finding("guards", "failure", detail, f"As an administrator: {' '.join(others)}")
    parameters = {"schemas": list(SCHEMAS)}
    if tables := list(connection.scalars(_UNIDENTIFIED, parameters)):
        detail = f"Postgres refuses changes to published tables without replica identity: {shortened(tables)}."
        advice = f"As their owner: ALTER TABLE {tables[0]} REPLICA IDENTITY DEFAULT; and the same for the others."
        yield Finding("replication", "failure", detail, advice)
    if tables := list(connection.scalars(_NOT_VACUUMED, parameters)):
        detail = f"autovacuum is off for {shortened(tables)}: they grow, and statements become slow."
        advice = f"As their owner: ALTER TABLE {tables[0]} RESET (autovacuum_enabled, toast.autovacuum_enabled);"
        yield Finding("autovacuum", "warning", detail, advice)
    for name in ("autovacuum", "track_counts"):
        if connection.scalar(text("SELECT reset_val FROM pg_settings WHERE name = :name"), {"name": name}) != "on":
            advice = f"Set {name} = on in postgresql.conf, unless another program vacuums the tables."
            yield Finding("autovacuum", "warning", f"{name} is off: tables grow, and statements become slow.", advice)


def _reset(connection: Connection) -> str:
    resets = list(connection.scalars(_OTHER_ROLES))
    general = "ALTER ROLE … RESET session_replication_role; and the same for ALTER DATABASE."
    return f"As an administrator: {' '.join(resets) or general}"
