"""Promoted variables: their columns in the view `analytics.sessions`, which `archiver migrate` creates.

The columns follow the view's own columns, in the order in which they were added. A value that is not of the column's
type is null: the conversions raise no error. Variables of type text and boolean are also promoted in the rollups: a
worker stores their values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from archiver.database import Lock, sqlstate, tables
from archiver.errors import ArchiverError
from archiver.settings.variables import Variable

VIEW = "analytics.sessions"
_COMMENT = "One stored row per session: fast, and a moment behind."
_OWN = tuple(column.name for column in tables.summaries.c)
_ROLLED_UP = ("text", "boolean")  # types whose values are few
_TYPES: Mapping[str, str] = {
    "text": "text",
    "number": "numeric",
    "boolean": "boolean",
    "time": "timestamp with time zone",
}

# Each pattern accepts only text that the cast accepts. Before Postgres 16, no function tests this without an error.
_NUMBER = "^ *[+-]?([0-9]{1,100}([.][0-9]{0,100})?|[.][0-9]{1,100})(e[+-]?[0-9]{1,3})? *$"
_DAY = (
    "(?!0000)(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_CLOCK = "[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.][0-9]{1,9})?)?"
_ZONE = "(?:Z|[+-](?:0[0-9]|1[0-4])(?::?[0-5][0-9])?)"


def expression(variable: Variable) -> str:
    """Return the SQL of a column's value."""
    # No name contains a quote: see `settings.variables.column_name`.
    value, as_text = f"(variables -> '{variable.name}')", f"(variables ->> '{variable.name}')"
    if variable.type == "number":
        return (
            f"CASE jsonb_typeof({value}) WHEN 'number' THEN CAST({as_text} AS numeric)"
            f" WHEN 'string' THEN CASE WHEN {as_text} ~* '{_NUMBER}' THEN CAST({as_text} AS numeric) END END"
        )
    if variable.type == "boolean":
        return f"CASE lower({as_text}) WHEN 'true' THEN true WHEN 'false' THEN false END"
    if variable.type == "time":
        return (
            f"CASE WHEN {as_text} ~ '^{_DAY}({_CLOCK})?$' THEN CAST({as_text} AS timestamp) AT TIME ZONE 'UTC'"
            f" WHEN {as_text} ~ '^{_DAY}{_CLOCK} ?{_ZONE}$' THEN CAST({as_text} AS timestamptz) END"
        )
    return as_text


def definition(variables: Sequence[Variable]) -> str:
    """Return the query of the view with these columns."""
    columns = [*_OWN, *(f'{expression(each)} AS "{each.column}"' for each in variables)]
    return f"SELECT {', '.join(columns)} FROM archiver.summaries"  # noqa: S608  # names of columns, and checked names


class VariableColumnError(ArchiverError):
    """The columns cannot be changed, because other objects use the view."""


class Present(msgspec.Struct, frozen=True):
    """A column of the view for a variable: its type and its comment, which names the variable."""

    type: str
    comment: str | None


Catalogue = Mapping[str, Mapping[str, Any]]  # as in `catalogue.reading`


_SELECT = text(
    """
    SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
           col_description(c.oid, a.attnum) AS comment
      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'analytics' AND c.relname = 'sessions' AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
    """
)


def _has_own_columns(connection: Connection) -> bool:
    """Return whether the view begins with all of its own columns, those that are not variables."""
    return [row.name for row in connection.execute(_SELECT)][: len(_OWN)] == [*_OWN]


def select_present(connection: Connection) -> dict[str, Present]:
    """Return the view's present columns for variables, by name, in their order."""
    return {row.name: Present(row.type, row.comment) for row in connection.execute(_SELECT) if row.name not in _OWN}


def wanted(variables: Sequence[Variable]) -> dict[str, Present]:
    """Return the columns that these variables need, by name."""
    return {
        each.column: Present(_TYPES[each.type], f"Variable {each.name} as {each.type}; null if it has no such value.")
        for each in variables
    }


def in_order(variables: Sequence[Variable], present: Mapping[str, Present]) -> list[Variable]:
    """Return the variables: first those that have a column, in the order of the columns, then the others."""
    places = {name: place for place, name in enumerate(present)}
    return sorted(variables, key=lambda each: places.get(each.column, len(places)))


def bring_up_to_date(connection: Connection, variables: Sequence[Variable]) -> None:
    """Make the view have exactly the columns of these variables, and promote them in the rollups.

    New columns are added at the end. If a column is removed or gets another type, the view is dropped and created
    again, with its grants; in that case, raises `VariableColumnError` if another object uses the view.
    """
    _promote(connection, variables)
    present, columns = select_present(connection), wanted(variables)
    if present == columns:
        return
    query = definition(in_order(variables, present))
    is_kept = _has_own_columns(connection) and all(
        name in columns and columns[name].type == each.type for name, each in present.items()
    )
    statements = [f"CREATE OR REPLACE VIEW {VIEW} AS {query}"] if is_kept else _recreating(connection, query)
    statements += [f"COMMENT ON COLUMN {VIEW}.\"{name}\" IS '{column.comment}'" for name, column in columns.items()]
    try:
        for statement in statements:
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if sqlstate(error) != _IN_USE:
            raise
        raise VariableColumnError(
            f"the columns of {VIEW} cannot be changed as ARCHIVER_ANALYTICS_VARIABLES requires, because other objects"
            f" use the view: {_detail(error)}. Drop them, run `archiver migrate`, and create them again."
        ) from None


_SELECT_PROMOTED = text("SELECT name FROM archiver.promoted_variables WHERE state <> 'removed'")
# Their rows contain no content; a worker deletes them.
_DEMOTE = text(
    """
    WITH removed AS (
        UPDATE archiver.promoted_variables SET state = 'removed'
         WHERE state <> 'removed' AND name <> ALL (CAST(:names AS text[])) RETURNING id
    )
    DELETE FROM archiver.variable_values WHERE variable_id IN (SELECT id FROM removed)
    """
)
_PROMOTE = text(
    """
    INSERT INTO archiver.promoted_variables (name, state, collected_through, is_full)
    SELECT name, 'collecting', '', false FROM unnest(CAST(:names AS text[])) AS name
     WHERE name NOT IN (SELECT p.name FROM archiver.promoted_variables p WHERE p.state <> 'removed')
    """
)


def is_promoted(connection: Connection, variables: Sequence[Variable]) -> bool:
    """Return whether the rollups are kept by exactly these variables."""
    return set(connection.scalars(_SELECT_PROMOTED)) == set(_of_rollups(variables))


def _of_rollups(variables: Sequence[Variable]) -> list[str]:
    return [each.name for each in variables if each.type in _ROLLED_UP]


def _promote(connection: Connection, variables: Sequence[Variable]) -> None:
    """Keep the rollups by exactly these variables; a worker stores the values of earlier sessions."""
    if is_promoted(connection, variables):
        return
    Lock.PUBLISHING.take(connection, exclusive=True)  # the publisher must not add values of a removed variable
    for statement in (_DEMOTE, _PROMOTE):
        connection.execute(statement, {"names": _of_rollups(variables)})
    # So few rows are never sampled otherwise, and queries would look up each variable for each sum.
    connection.exec_driver_sql("ANALYZE archiver.promoted_variables")


_IN_USE = "2BP01"  # SQLSTATE: dependent objects still exist


def _detail(error: DBAPIError) -> str:
    """Return which objects depend on the view, as Postgres lists them."""
    detail = getattr(getattr(error.orig, "diag", None), "message_detail", None) or "see the log of Postgres"
    return "; ".join(str(detail).splitlines())


_QUOTED = text(
    "SELECT attname AS name, format('%I', attname) AS quoted FROM pg_attribute"
    " WHERE attrelid = CAST(:view AS regclass) AND attnum > 0"
).bindparams(view=VIEW)
_GRANTS = text(
    """
    SELECT format('GRANT %s ON analytics.sessions TO %s%s', x.privilege_type,
                  CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE format('%I', pg_get_userbyid(x.grantee)) END,
                  CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
      FROM pg_class c CROSS JOIN aclexplode(c.relacl) x
     WHERE c.oid = to_regclass(:view) AND x.grantee <> c.relowner
    """
).bindparams(view=VIEW)


def _recreating(connection: Connection, query: str) -> list[str]:
    """Return the statements that drop the view and create it again with its comments and grants."""
    own = {column.name: str(column.comment).replace("'", "''") for column in tables.summaries.c}
    return [
        f"DROP VIEW IF EXISTS {VIEW}",
        f"CREATE VIEW {VIEW} AS {query}",
        f"COMMENT ON VIEW {VIEW} IS '{_COMMENT}'",
        *(f"COMMENT ON COLUMN {VIEW}.{name} IS '{each}'" for name, each in own.items()),
        *connection.scalars(_GRANTS),
    ]


def name_difference(connection: Connection, variables: Sequence[Variable]) -> str | None:
    """Describe how the columns of the view differ from these variables; None if they are the same."""
    present, columns = select_present(connection), wanted(variables)
    if present == columns:
        return None
    missing = [name for name, each in columns.items() if present.get(name) != each]
    surplus = [name for name in present if name not in columns]
    parts = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("surplus", surplus)) if names]
    return f"The columns of {VIEW} differ from ARCHIVER_ANALYTICS_VARIABLES: {'; '.join(parts)}"


def with_columns(connection: Connection, catalogue: Catalogue, variables: Sequence[Variable]) -> Catalogue:
    """Add the columns of these variables, which the view must have, to the expected catalogue; return the result."""
    if not variables:
        return catalogue
    view, like = f"view {VIEW}", catalogue[f"column {VIEW}.reason"]
    query = definition(in_order(variables, select_present(connection)))
    quoted = {row.name: row.quoted for row in connection.execute(_QUOTED)}
    columns = {
        f"column {VIEW}.{quoted[name]}": {**like, "type": each.type} for name, each in wanted(variables).items()
    }
    return {**catalogue, view: {**catalogue[view], "definition": query}, **columns}
