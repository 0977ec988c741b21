"""The catalogue: each object of the archiver's schemas in a database, with the properties that are compared."""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, text

SCHEMAS = ("archiver", "analytics", "archiver_jobs")

Catalogue = Mapping[str, Mapping[str, Any]]
"""Properties by object; an object is named by its kind and its qualified name, such as `table archiver.events`."""

_NAMED = "format('%I.%I', n.nspname, c.relname)"
_OF_OUR_SCHEMAS = "n.nspname = ANY (CAST(:schemas AS text[]))"
_KIND = (
    "CASE c.relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence' ELSE 'table' END"
)

# Each query returns the kind of the object, its name and its properties. Names and expressions are read with only
# pg_catalog in the search path, so that everything else is qualified, regardless of the role's default.
_QUERIES = (
    f"""
    SELECT 'schema', format('%I', n.nspname), '{{}}'::json FROM pg_namespace n WHERE {_OF_OUR_SCHEMAS}
    """,
    # Composite types, TOAST tables and indexes are left out; other queries below return types and indexes.
    f"""
    SELECT {_KIND}, {_NAMED}, json_build_object(
               'relkind', c.relkind, 'persistence', c.relpersistence,
               'options', CASE WHEN c.relkind = 'v'
                               THEN (SELECT array_agg(o ORDER BY o) FROM unnest(c.reloptions) o) END,
               'row security', c.relrowsecurity OR c.relforcerowsecurity,
               'children', (SELECT array_agg(i.inhrelid::regclass::text ORDER BY 1) FROM pg_inherits i
                             WHERE i.inhparent = c.oid AND c.relkind <> 'p'),
               'parents', (SELECT array_agg(i.inhparent::regclass::text ORDER BY 1) FROM pg_inherits i
                            WHERE i.inhrelid = c.oid),
               'definition', CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END)
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    """,
    f"""
    SELECT 'sequence options of', {_NAMED}, json_build_object(
               'type', format_type(s.seqtypid, NULL), 'increment', s.seqincrement, 'minimum', s.seqmin,
               'maximum', s.seqmax, 'cycles', s.seqcycle, 'cache', s.seqcache)
      FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS}
    """,
    f"""
    SELECT 'column', {_NAMED} || format('.%I', a.attname), json_build_object(
               'type', format_type(a.atttypid, a.atttypmod), 'not null', a.attnotnull,
               'default', pg_get_expr(d.adbin, d.adrelid), 'identity', a.attidentity, 'generated', a.attgenerated,
               'collation', (SELECT l.collname FROM pg_collation l JOIN pg_type t ON t.oid = a.atttypid
                              WHERE l.oid = a.attcollation AND a.attcollation <> t.typcollation),
               'statistics target', coalesce(a.attstattarget, -1),
               'storage', CASE WHEN c.relkind IN ('r', 'p') THEN a.attstorage END)
      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     WHERE {_OF_OUR_SCHEMAS} AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0 AND NOT a.attisdropped
    """,
    # From Postgres 18 on, NOT NULL has rows here as well: it is a property of the column above.
    f"""
    SELECT 'constraint', {_NAMED} || format('.%I', k.conname), json_build_object(
               'definition', pg_get_constraintdef(k.oid), 'validated', k.convalidated)
      FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND k.contype NOT IN ('n', 't')
    """,
    f"""
    SELECT 'index', {_NAMED}, json_build_object(
               'definition', pg_get_indexdef(c.oid), 'valid', i.indisvalid AND i.indisready AND i.indislive,
               'table', format('%I.%I', n.nspname, r.relname), 'unique', i.indisunique,
               'of constraint', EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid))
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class r ON r.oid = i.indrelid
      JOIN pg_namespace n ON n.oid = r.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND r.relkind IN ('r', 'p', 'm')
    """,
    """
    SELECT 'function', format('%I.%I(%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)), json_build_object(
               'body', coalesce(p.prosrc, ''), 'sql body', pg_get_function_sqlbody(p.oid),
               'arguments', pg_get_function_arguments(p.oid),
               'result', pg_get_function_result(p.oid), 'language', l.lanname, 'kind', p.prokind,
               'volatility', p.provolatile, 'security definer', p.prosecdef, 'strict', p.proisstrict,
               'public may execute', p.proacl IS NULL OR EXISTS (SELECT FROM aclexplode(p.proacl) x
                                                                  WHERE x.grantee = 0),
               'parallel', p.proparallel, 'leakproof', p.proleakproof, 'settings', p.proconfig,
               'definition', CASE WHEN p.prokind IN ('f', 'p') THEN pg_get_functiondef(p.oid) END)
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
     WHERE n.nspname = ANY (CAST(:schemas AS text[]))
    """,
    f"""
    SELECT 'trigger', {_NAMED} || format('.%I', t.tgname), json_build_object(
               'definition', pg_get_triggerdef(t.oid),
               'enabled', CASE t.tgenabled WHEN 'O' THEN 'origin' WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica'
                                           ELSE 'always' END)
      FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND NOT t.tgisinternal
    """,
    # The triggers that enforce a foreign key, which a superuser may disable.
    f"""
    SELECT 'foreign key triggers of', {_NAMED}, json_build_object('enabled', bool_and(t.tgenabled = 'O'))
      FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND t.tgisinternal GROUP BY n.nspname, c.relname
    """,
    f"""
    SELECT 'rule', {_NAMED} || format('.%I', r.rulename), json_build_object('definition', pg_get_ruledef(r.oid))
      FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS} AND r.rulename <> '_RETURN'
    """,
    f"""
    SELECT 'policy', {_NAMED} || format('.%I', p.polname), json_build_object('command', p.polcmd)
      FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS}
    """,
    f"""
    SELECT 'extended statistics', {_NAMED} || format('.%I', s.stxname), '{{}}'::json
      FROM pg_statistic_ext s JOIN pg_class c ON c.oid = s.stxrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE {_OF_OUR_SCHEMAS}
    """,
    """
    SELECT 'type', format('%I.%I', n.nspname, t.typname), json_build_object(
               'kind', t.typtype,
               'labels', (SELECT array_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e
                           WHERE e.enumtypid = t.oid),
               'attributes', (SELECT array_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
                                               ORDER BY a.attnum)
                                FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0
                                 AND NOT a.attisdropped))
      FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class c ON c.oid = t.typrelid
     WHERE n.nspname = ANY (CAST(:schemas AS text[]))
       AND (t.typtype IN ('e', 'd', 'r', 'm') AND t.typelem = 0 OR t.typtype = 'c' AND c.relkind = 'c')
    """,
)


def qualify(connection: Connection) -> None:
    """Make Postgres write the archiver's names with their schema for the rest of the transaction."""
    connection.execute(text("SELECT set_config('search_path', 'pg_catalog', true)"))


def read(connection: Connection) -> Catalogue:
    """Return the objects of the archiver's schemas. Changes the transaction's search path."""
    qualify(connection)
    values: dict[str, Mapping[str, Any]] = {}
    for query in _QUERIES:
        for kind, name, properties in connection.execute(text(query), {"schemas": list(SCHEMAS)}):
            values[f"{kind} {name}"] = {key: value for key, value in properties.items() if value is not None}
    return values


def encode(catalogue: Catalogue) -> bytes:
    """Return the catalogue as sorted lines, one object each, for the file next to the migrations."""
    lines = (
        msgspec.json.encode(name) + b": " + msgspec.json.encode(properties, order="sorted")
        for name, properties in sorted(catalogue.items())
    )
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def decode(content: bytes) -> Catalogue:
    """Return the catalogue that `encode` stored."""
    return msgspec.json.decode(content, type=dict[str, dict[str, Any]])
