"""Look up what the database user of this process may read."""

from sqlalchemy import Connection, text

# By object id: a name cannot be resolved in a schema without the USAGE privilege.
_MAY_SELECT = text(
    """
    SELECT EXISTS (
        SELECT FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE n.nspname = 'archiver' AND c.relname = :table
           AND (a.attname = CAST(:column AS text) OR CAST(:column AS text) IS NULL)
           AND has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT')
    )
    """
)


def may_select(connection: Connection, table: str, column: str | None = None) -> bool:
    """Return whether this user may read this column, or any, of a table; False also if the schema lacks it."""
    return bool(connection.scalar(_MAY_SELECT, {"table": table, "column": column}))
