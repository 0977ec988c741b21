"""Sequences that were set back, so that new rows would get ids that are in use.

Logical replication does not copy sequences, and a partial restore may leave them behind their tables.
"""

from collections.abc import Collection, Iterator, Sequence

import msgspec
from sqlalchemy import Connection, text


class Behind(msgspec.Struct, frozen=True):
    """A sequence whose next id is not above the newest id of its table. Names are qualified and quoted.

    `newest_sql`: the query for the newest id, which may be that of a row that retention removed.
    """

    name: str
    table: str
    column: str
    next: int
    newest: int
    newest_sql: str

    @property
    def remedy(self) -> str:
        """Return the SQL that sets the sequence forward."""
        return f"SELECT setval('{self.name}', {self.newest})"

    def __str__(self) -> str:
        return f"would assign {self.next}, although {self.table} has or had ids up to {self.newest}"


# The sequences that this user may compare.
_SEQUENCES = text(
    """
    SELECT format('%I.%I', n.nspname, s.relname) AS name, format('%I.%I', n.nspname, t.relname) AS relation,
           format('%I', a.attname) AS attribute
      FROM pg_depend d
      JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
      JOIN pg_class t ON t.oid = d.refobjid
      JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
      JOIN pg_namespace n ON n.oid = s.relnamespace AND n.oid = t.relnamespace
     WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
       AND n.nspname = ANY (CAST(:schemas AS text[]))
       AND has_schema_privilege(n.oid, 'USAGE')
       AND CASE WHEN s.relkind = 'S' THEN has_sequence_privilege(s.oid, 'SELECT') END
       AND has_column_privilege(t.oid, a.attnum, 'SELECT')
     ORDER BY 1
    """
)


# Retention removes rows of the ledger. Their ids are sealed, so they must not return. A removal beyond the sealed ids
# is forged, or concerns a row that no seal contains: it must neither stop sealing nor exhaust the sequence.
_REMOVED = {
    "archiver.events": """
        SELECT max(event_id) FROM archiver.removals
         WHERE event_id <= (SELECT events_through FROM archiver.seals ORDER BY id DESC LIMIT 1)
    """
}
_MAY_READ_REMOVED = text(
    """
    SELECT bool_and(has_table_privilege(to_regclass(name), 'SELECT'))
      FROM unnest(ARRAY['archiver.removals', 'archiver.seals']) AS name
    """
)


def select_behind(connection: Connection, schemas: Sequence[str], of: Collection[str] | None = None) -> list[Behind]:
    """Return the sequences of these schemas that were set back, except those that this user may not read.

    `of`: only those of these tables; no other table is read, so a lock on one does not delay the caller.
    """
    return list(_select_behind(connection, schemas, of))


def _select_behind(connection: Connection, schemas: Sequence[str], of: Collection[str] | None) -> Iterator[Behind]:
    for name, table, column in connection.execute(_SEQUENCES, {"schemas": list(schemas)}).all():
        if of is not None and table not in of:
            continue
        # A sequence is read as it is now, its table as of the start of the statement: never ahead of the sequence.
        newest_sql = f"SELECT max({column}) FROM {table}"  # noqa: S608  # quoted
        if (removed := _removed(connection, table)) is not None:
            newest_sql = f"SELECT greatest(({newest_sql}), ({removed}))"
        following = "s.last_value + CASE WHEN s.is_called THEN 1 ELSE 0 END"
        query = f"SELECT {following}, t.newest FROM ({newest_sql}) t (newest), {name} s"  # noqa: S608  # quoted
        expected, newest = connection.exec_driver_sql(query).one()
        if newest is not None and expected <= newest:
            yield Behind(name, table, column, expected, newest, newest_sql)


def _removed(connection: Connection, table: str) -> str | None:
    """Return the query for the newest removed id of a table; None if it has none that this user may read."""
    return _REMOVED[table] if table in _REMOVED and connection.scalar(_MAY_READ_REMOVED) else None
