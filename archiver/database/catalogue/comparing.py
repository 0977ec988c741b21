"""Differences between a database's catalogue and the expected one, each with its remedy."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from archiver.database import roles, schema, sequences, variable_columns
from archiver.database.catalogue.difference import Difference
from archiver.database.catalogue.granted import examine_grants
from archiver.database.catalogue.reading import SCHEMAS, Catalogue, decode, qualify, read
from archiver.settings.variables import Variable

FILE = "catalogue.json"
_REPAIR = "Run `archiver migrate --repair` as the owner of the schema archiver."
_MAX_SQL = 200  # characters of a statement that is worth printing


def select_differences(connection: Connection, variables: Sequence[Variable] = ()) -> list[Difference]:
    """Return each difference between the database and what this version expects; the database must be at head.

    `variables`: those that are columns of `analytics.sessions`. Leaves the transaction's search path as it was.
    """
    before = connection.scalar(text("SELECT current_setting('search_path')"))
    expected, item = read_expected(), read(connection)
    columns = variable_columns.name_difference(connection, variables)
    if columns is None:
        expected = variable_columns.with_columns(connection, expected, variables)
    else:
        expected, item = _without_view(expected), _without_view(item)
    differences = [*_differences(connection, expected, item), *examine_grants(connection), *_sequences(connection)]
    if columns is not None:
        advice = "Run `archiver migrate` with the settings of the worker."
        differences.append(Difference(f"view {variable_columns.VIEW}", "failure", f"{columns}.", advice))
    connection.execute(text("SELECT set_config('search_path', :before, true)"), {"before": before})
    return sorted(differences, key=lambda each: (each.verdict, each.object))


def _without_view(catalogue: Catalogue) -> Catalogue:
    """Return the catalogue without the view that has columns for variables."""
    of_view = f"column {variable_columns.VIEW}."
    return {
        name: each
        for name, each in catalogue.items()
        if name != f"view {variable_columns.VIEW}" and not name.startswith(of_view)
    }


def _sequences(connection: Connection) -> Iterator[Difference]:
    for each in sequences.select_behind(connection, SCHEMAS):
        advice = f"{_REPAIR[:-1]}, or as the owner: {each.remedy};"
        statements = (
            f"LOCK TABLE {each.table} IN SHARE ROW EXCLUSIVE MODE",  # otherwise new rows could get even higher ids
            f"SELECT setval('{each.name}', ({each.newest_sql}))",
        )
        detail = f"sequence {each.name} {each}: new rows get ids that are in use."
        yield Difference(f"sequence {each.name}", "failure", detail, advice, statements)


def read_expected() -> Catalogue:
    """Return the catalogue of a database that the migrations of this version created, as Postgres 18 writes it."""
    return decode((schema.scripts() / FILE).read_bytes())


def _differences(connection: Connection, expected: Catalogue, found: Catalogue) -> Iterator[Difference]:
    views = list(_views(connection, expected, found))
    yield from views
    changed = tuple(f"column {each.object.removeprefix('view ')}." for each in views if each.verdict == "failure")
    for name, properties in expected.items():
        if name.startswith(changed):
            continue  # reported with its view
        if name not in found:
            if not name.startswith("view ") and not _is_part_of(name, expected, found):
                yield _missing(name, properties, found)
            continue
        for key, target_value, actual in _differing(properties, found[name]):
            if key != "definition" or not name.startswith(("function ", "view ")):  # compared by parts, or above
                yield _property(name, properties, key, target_value, actual)
    for name in found:
        if name not in expected and not name.startswith(changed) and not _is_part_of(name, found, expected):
            yield _extra(name, found[name])


def _views(connection: Connection, expected: Catalogue, found: Catalogue) -> Iterator[Difference]:
    for name, properties in expected.items():
        if not name.startswith("view "):
            continue
        if name not in found:
            yield _missing(name, properties, found)
        elif properties["definition"] != found[name]["definition"]:
            yield from _view(connection, name, properties["definition"], found[name]["definition"])


def _differing(target_value: Mapping[str, Any], actual: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(target_value.keys() | actual.keys()):
        if target_value.get(key) != actual.get(key):
            yield key, target_value.get(key), actual.get(key)


_PARTS = ("column", "constraint", "trigger", "rule", "policy", "extended statistics")
_RELATIONS = ("table", "view", "materialized view")


def _is_part_of(name: str, of: Catalogue, absent_in: Catalogue) -> bool:
    """Return whether an object belongs to another that is reported itself, because `absent_in` lacks that one."""
    kind, _, qualified = name.rpartition(" ")
    if kind == "sequence options of":
        parents = [f"sequence {qualified}"]
    elif kind in _PARTS:
        relation = ".".join(qualified.split(".")[:2])
        parents = [f"{each} {relation}" for each in _RELATIONS]
    elif kind == "foreign key triggers of":
        return True  # reported with the constraint
    elif kind == "index":
        relation = str(of[name]["table"])
        parents = [f"{each} {relation}" for each in _RELATIONS]
        if of[name].get("of constraint"):
            return True
    else:
        return False
    return any(parent in of and parent not in absent_in for parent in parents)


def _advice(statements: tuple[str, ...]) -> str:
    sql = "; ".join(statements)
    return _REPAIR if len(sql) > _MAX_SQL or "\n" in sql else f"{_REPAIR[:-1]}, which runs: {sql};"


def _difference(
    name: str,
    detail: str,
    *statements: str,
    verdict: Literal["failure", "warning"] = "failure",
    advice: str | None = None,
) -> Difference:
    return Difference(name, verdict, f"{name} {detail}.", advice or _advice(statements), statements)


_RESTORE = "Restore the database from a backup: no command can recreate the content of this object."


def _missing(name: str, properties: Mapping[str, Any], found: Catalogue) -> Difference:
    kind, _, qualified = name.partition(" ")
    for other in _RELATIONS:
        if kind == "view" and f"{other} {qualified}" in found:
            return _difference(name, f"is a {other}", advice=f"Rename or drop the {other}. {_REPAIR}")
    statements = tuple(_creating(name, properties))
    if statements:
        return _difference(name, "is missing", *statements)
    return _difference(name, "is missing", advice=_RESTORE)


def _creating(name: str, properties: Mapping[str, Any]) -> Iterator[str]:
    """Return the SQL that recreates an object; empty if rows were lost with it."""
    kind, _, qualified = name.partition(" ")
    relation, _, part = qualified.rpartition(".")
    if kind == "view":
        yield f"CREATE VIEW {qualified} AS {properties['definition']}"
    elif kind in {"function", "index", "trigger"}:
        yield str(properties["definition"])
        if kind == "function" and not properties["public may execute"]:
            yield f"REVOKE EXECUTE ON ROUTINE {qualified} FROM PUBLIC"
    elif kind == "constraint":
        yield f"ALTER TABLE {relation} ADD CONSTRAINT {part} {properties['definition']}"


def _extra(name: str, properties: Mapping[str, Any]) -> Difference:
    kind, _, qualified = name.partition(" ")
    relation, _, part = qualified.rpartition(".")
    foreign = "is not part of this version"
    if kind in {"trigger", "rule", "policy"}:
        return _difference(name, foreign, f"DROP {kind.upper()} {part} ON {relation}")
    if kind == "constraint":
        return _difference(name, foreign, f"ALTER TABLE {relation} DROP CONSTRAINT {part}")
    if kind == "column":
        return _difference(name, foreign, advice=f"Unless it is needed: ALTER TABLE {relation} DROP COLUMN {part};")
    if kind == "extended":
        schema_name = relation.partition(".")[0]
        return _difference(name, foreign, advice=f"As its owner: DROP STATISTICS {schema_name}.{part};")
    if kind == "index" and properties["unique"]:
        return _difference(name, f"{foreign} and may reject rows", f"DROP INDEX {qualified}")
    advice = "Move it to another schema, or drop it."
    if kind == "index":  # always in the schema of its table
        advice = f"It can reject rows, for example rows with long text. Unless it is needed: DROP INDEX {qualified};"
    return _difference(name, foreign, verdict="warning", advice=advice)


def _property(name: str, properties: Mapping[str, Any], key: str, target_value: Any, actual: Any) -> Difference:
    detail = f"differs in its {key} from what this version expects"
    if len(f"{target_value}{actual}") < _MAX_SQL:
        detail = f"has {key} {_shown(actual)} instead of {_shown(target_value)}"
    statements = tuple(_altering(name, properties, key, target_value, actual))
    verdict: Literal["failure", "warning"] = "failure"
    if key == "statistics target" and target_value != 0:
        verdict = "warning"
    advice = None if statements else "Undo that change as the owner of the schema archiver, or restore a backup."
    return _difference(name, detail, *statements, verdict=verdict, advice=advice)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _altering(name: str, properties: Mapping[str, Any], key: str, target_value: Any, actual: Any) -> Iterator[str]:
    """Return the SQL that restores a property; empty if no statement can."""
    kind, _, qualified = name.partition(" ")
    relation, _, part = qualified.rpartition(".")
    if kind == "function":
        if key == "public may execute":
            yield (
                f"GRANT EXECUTE ON ROUTINE {qualified} TO PUBLIC"
                if target_value
                else f"REVOKE EXECUTE ON ROUTINE {qualified} FROM PUBLIC"
            )
        elif key not in {"result", "arguments", "kind"}:
            yield str(properties["definition"])
    elif kind == "trigger":
        yield from _trigger(relation, part, properties)
    elif kind == "index":
        yield from (f"DROP INDEX {qualified}", str(properties["definition"]))
    elif kind == "constraint":
        yield f"ALTER TABLE {relation} DROP CONSTRAINT {part}"
        yield f"ALTER TABLE {relation} ADD CONSTRAINT {part} {properties['definition']}"
    elif kind == "column":
        yield from _column(f"ALTER TABLE {relation} ALTER COLUMN {part}", key, target_value)
    elif kind in {"table", "view"}:
        yield from _relation(f"ALTER {kind.upper()} {qualified}", kind, key, target_value, actual)
    elif " of " in qualified:
        yield from _of_relation(qualified.rpartition(" ")[2], key, target_value)


def _trigger(relation: str, part: str, properties: Mapping[str, Any]) -> Iterator[str]:
    yield f"DROP TRIGGER {part} ON {relation}"
    yield str(properties["definition"])


def _of_relation(qualified: str, key: str, target_value: Any) -> Iterator[str]:
    if key == "enabled":
        yield f"ALTER TABLE {qualified} ENABLE TRIGGER ALL"
    elif key == "cache":
        yield f"ALTER SEQUENCE {qualified} CACHE {target_value}"


_STORAGE = {"p": "PLAIN", "e": "EXTERNAL", "m": "MAIN", "x": "EXTENDED"}


def _column(alter: str, key: str, target_value: Any) -> Iterator[str]:
    if key == "statistics target":
        yield f"{alter} SET STATISTICS {target_value}"
    elif key == "not null":
        yield f"{alter} {'SET' if target_value else 'DROP'} NOT NULL"
    elif key == "default":
        yield f"{alter} SET DEFAULT {target_value}" if target_value is not None else f"{alter} DROP DEFAULT"
    elif key == "storage":
        yield f"{alter} SET STORAGE {_STORAGE[target_value]}"
    elif key == "identity" and target_value == "a":
        yield f"{alter} SET GENERATED ALWAYS"


def _relation(alter: str, kind: str, key: str, target_value: Any, actual: Any) -> Iterator[str]:
    if key == "persistence" and kind == "table":
        yield f"{alter} SET LOGGED"
    elif key == "row security" and not target_value:
        yield f"{alter} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY"
    elif key == "options" and kind == "view" and not target_value:
        yield f"{alter} RESET ({', '.join(option.partition('=')[0] for option in actual)})"


_NO_TEMPORARY = {"42501", "25006"}  # SQLSTATE: insufficient privilege; read-only transaction


def _view(connection: Connection, name: str, target_value: str, actual: str) -> Iterator[Difference]:
    """Compare a view with the expected one as this Postgres writes it, because versions write views differently."""
    qualified = name.partition(" ")[2]
    statement = f"CREATE OR REPLACE VIEW {qualified} AS {target_value}"
    nested = connection.begin_nested()
    try:
        connection.exec_driver_sql(f"CREATE TEMPORARY VIEW archiver_expected_view AS {target_value}")
        written = connection.scalar(text("SELECT pg_get_viewdef(to_regclass('pg_temp.archiver_expected_view'))"))
    except DBAPIError as error:
        nested.rollback()
        if getattr(error.orig, "sqlstate", None) in _NO_TEMPORARY:
            detail = "could not be compared, because this user may not create temporary views"
            advice = "As an administrator: GRANT TEMPORARY ON DATABASE … TO the_user; or compare as the owner."
            yield _difference(name, detail, verdict="warning", advice=advice)
        else:
            yield _difference(name, "uses an object that has changed", statement)
        return
    nested.rollback()
    if written != actual:
        advice = f"{_REPAIR} If its columns changed, first drop the views that use it."
        yield _difference(name, "has a different definition than this version expects", statement, advice=advice)


def repair(connection: Connection, variables: Sequence[Variable] = ()) -> list[Difference]:
    """Repair the differences that SQL statements can undo, and return them.

    Tables and columns are neither created nor dropped, foreign objects that may contain data are not dropped, and
    objects that Postgres refuses to change remain as they are. The transaction's search path changes.
    """
    result = [difference for difference in select_differences(connection, variables) if difference.repairs]
    qualify(connection)
    for difference in sorted(result, key=_place):
        if not difference.object.startswith("role ") and not _try(connection, difference.repairs):
            _try(connection, _replacing(difference.object))
    variable_columns.bring_up_to_date(connection, variables)  # a view that was replaced lacks them
    roles.bring_up_to_date(connection)
    remaining = select_differences(connection, variables)
    return [difference for difference in result if difference not in remaining]


# A trigger needs its function, a view may need a column.
_ORDER = ("function", "column", "view", "table", "constraint", "index", "trigger")


def _place(difference: Difference) -> int:
    kind = difference.object.partition(" ")[0]
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _replacing(name: str) -> tuple[str, ...]:
    """Return the SQL that drops and recreates a view, because CREATE OR REPLACE rejects changed columns.

    Empty for other objects.
    """
    kind, _, qualified = name.partition(" ")
    if kind != "view":
        return ()
    return (f"DROP VIEW {qualified}", *_creating(name, read_expected()[name]))


def _try(connection: Connection, statements: tuple[str, ...]) -> bool:
    try:
        with connection.begin_nested():
            for statement in statements:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
    except DBAPIError:
        return False  # the difference remains, and is reported
    return True
