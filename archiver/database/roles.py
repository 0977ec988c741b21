"""Database roles with the privileges that each needs.

`deploy/roles.sql` creates the roles; the grants depend on the schema version, so migrations bring them up to date.
"""

from collections.abc import Iterator, Mapping

import msgspec
from sqlalchemy import Connection, text

from archiver.database import Lock

READER = "archiver_reader"  # dashboards
METRICS = "archiver_metrics"  # dashboards of numbers, without content or variables
WRITER = "archiver_writer"  # `serve` and `worker`
AUDITOR = "archiver_auditor"  # `verify`, `prove` and `export`


class Needs(msgspec.Struct, frozen=True):
    """The privileges of a role: by table, as `schema.name`, and on functions and sequences.

    `appends`: tables to which the role may add rows, whose ids only Postgres assigns. `columns`: columns of the
    ledger that the role may update. `shown`: by view, the columns that the role may read; those that do not exist in
    this database are left out.
    """

    tables: Mapping[str, str]
    appends: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    shown: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    functions: tuple[str, ...] = ()
    sequences: Mapping[str, str] = msgspec.field(default_factory=dict)  # by schema, the privilege on its sequences


_ALL = "SELECT, INSERT, UPDATE, DELETE"
_VIEWS = (
    *("conversations", "sessions", "chats", "messages", "lines", "daily", "rollups"),
    *("coverage", "changes", "epochs", "health", "variables", "variable_rollups"),
)
_FUNCTIONS = (
    "analytics.complete_through()",
    "analytics.transcript(text)",
    "analytics.changed_sessions(bigint, integer)",
    "analytics.search(text, timestamp with time zone, timestamp with time zone, text,"
    " timestamp with time zone, integer)",
    "analytics.hourly(text, timestamp with time zone, timestamp with time zone)",
    "analytics.daily(text, date, date)",
    "analytics.hourly_by(text, text, timestamp with time zone, timestamp with time zone)",
    "analytics.daily_by(text, text, date, date)",
)
# Ids, states, times and numbers. Names of sessions, external ids and variables may identify a customer.
_SHOWN = {
    "conversations": (
        *("session_id", "assistant_id", "status", "started_at", "last_message_at", "chats", "messages"),
        *("user_messages", "assistant_messages", "cost", "deleted_chats", "coverage", "repaired_messages"),
        *("reconciled_at", "erased_at"),
    ),
    "sessions": (
        *("session_id", "assistant_id", "started_at", "last_message_at", "turns", "messages", "user_messages"),
        *("assistant_messages", "cost", "deleted_chats", "repaired_messages", "coverage", "reason"),
        *("answer_seconds", "changed_cursor"),
    ),
    "chats": (
        *("session_id", "chat_id", "turn_id", "assistant_id", "status", "cost", "created_at", "updated_at"),
        *("source", "deleted_at", "first_received_at", "erased_at", "began_at", "began_is_told"),
    ),
    "messages": (
        *("session_id", "chat_id", "turn_id", "position", "ordinal", "role", "created_at", "source", "deleted_at"),
        *("in_history", "content_kind", "began_at", "began_is_told"),
    ),
    "lines": (
        *("session_id", "turn_id", "ordinal", "role", "content_kind", "began_at", "began_is_told", "source"),
        "deleted_at",
    ),
    "variable_rollups": (
        *("bucket", "assistant_id", "variable", "conversations_started", "chats", "messages", "cost"),
        *("deleted_chats", "repaired_messages", "latency"),
    ),
}
_METRICS_VIEWS = ("daily", "rollups", "coverage", "changes", "epochs", "health", "variables")
_CONTENT = ("analytics.transcript(", "analytics.search(", "analytics.hourly_by(", "analytics.daily_by(")
_METRICS_FUNCTIONS = tuple(each for each in _FUNCTIONS if not each.startswith(_CONTENT))
_JOBS = ("jobs", "events", "periodic_defers", "workers")

NEEDED: Mapping[str, Needs] = {
    READER: Needs({f"analytics.{view}": "SELECT" for view in _VIEWS}, functions=_FUNCTIONS),
    METRICS: Needs(
        {f"analytics.{view}": "SELECT" for view in _METRICS_VIEWS},
        shown={f"analytics.{view}": columns for view, columns in _SHOWN.items()},
        functions=_METRICS_FUNCTIONS,
    ),
    WRITER: Needs(
        {
            **{f"analytics.{view}": "SELECT" for view in _VIEWS},  # it also exports
            # A trigger allows the deletion of a row only with a row in `removals`.
            "archiver.events": "SELECT, DELETE",
            "archiver.schema_version": "SELECT",
            **{f"archiver.{name}": _ALL for name in ("sessions", "chats", "messages", "summaries")},
            **{f"archiver.{name}": _ALL for name in ("quarantine", "backfills")},
            "archiver.pauses": "SELECT, INSERT, UPDATE",
            "archiver.pieces": "SELECT, INSERT, DELETE",
            "archiver.holds": "SELECT",
            **{f"archiver.{name}": "SELECT" for name in ("recounts", "acts", "erasures", "removals")},
            "archiver.seals": "SELECT, INSERT",
            **{f"archiver.{name}": "SELECT, INSERT, DELETE" for name in ("outbox", "changes")},
            "analytics.changes": "SELECT",  # `followups tail`
            "analytics.conversations": "SELECT",  # content of follow-ups
            **{f"archiver.{name}": _ALL for name in ("subscriptions", "deliveries", "attempts")},
            **{f"archiver.{name}": _ALL for name in ("workers", "duties")},
            **{f"archiver.{name}": _ALL for name in ("contributions", "uncontributed")},
            **{f"archiver.{name}": _ALL for name in ("stale_buckets", "rollups", "days", "variable_rollups")},
            **{f"archiver.{name}": _ALL for name in ("promoted_variables", "variable_values", "session_values")},
            "archiver.contributed": "SELECT",
            "archiver.logins": _ALL,
            "archiver.users": "SELECT, INSERT, UPDATE",
            **{f"archiver.{name}": "SELECT, INSERT" for name in ("epochs", "epoch_faults")},
            "archiver.search": f"{_ALL}, TRUNCATE",
            **{f"archiver.{name}": "SELECT, UPDATE" for name in ("search_partitions", "search_state")},
            **{f"archiver_jobs.procrastinate_{name}": _ALL for name in _JOBS},
            **{f"archiver_jobs.{lock}": "UPDATE" for lock in Lock},
        },
        # Only Postgres assigns ids, because a row with a large id would make all lower ids count as sealed.
        appends=tuple(f"archiver.{name}" for name in ("events", "recounts", "acts", "erasures", "removals")),
        # The columns of a ledger row that may change: counters, and content that is erased or replaced by pieces.
        columns=(
            "delivery_count",
            "last_received_at",
            "earliest_at",
            "is_recounted",
            "dedupe_key",
            "body",
            "salt",
            "frame",
            "runs",
        ),
        functions=(
            "archiver.settle()",
            "archiver.add_search_month(timestamp with time zone)",
            "archiver.rebuild_search(text, integer, double precision)",
            *_FUNCTIONS,
        ),
        sequences={"archiver_jobs": "USAGE", "archiver": "SELECT"},  # sealing compares the latter with the ids in use
    ),
    AUDITOR: Needs(
        {
            **{f"analytics.{view}": "SELECT" for view in _VIEWS},
            **{
                f"archiver.{name}": "SELECT"
                for name in (
                    "schema_version",
                    "events",
                    "pieces",
                    "quarantine",
                    "recounts",
                    "erasures",
                    "removals",
                    "holds",
                    "seals",
                    "outbox",
                    "sessions",
                    "chats",
                    "messages",
                    "summaries",
                    "search",
                    "search_partitions",
                    "search_state",
                    "contributions",
                    "rollups",
                    "days",
                    "promoted_variables",
                    "variable_values",
                    "session_values",
                    "variable_rollups",
                    "workers",
                    "duties",
                    "epochs",
                    "epoch_faults",
                )
            },
            "archiver.acts": "SELECT",
        },
        appends=("archiver.acts",),  # an export is recorded in the audit log
        functions=_FUNCTIONS,
    ),
}

# By object id: a name cannot be resolved in a schema without the USAGE privilege.
_MISSING = text(
    """
    WITH r AS (SELECT CAST(:role AS name) AS role)
    SELECT format('GRANT USAGE ON SCHEMA %I TO %I', nspname, r.role)
      FROM pg_namespace, r
     WHERE nspname IN (SELECT split_part(name, '.', 1) FROM unnest(CAST(:tables AS text[])) AS name)
       AND NOT has_schema_privilege(r.role, oid, 'USAGE')
    UNION ALL
    SELECT format('GRANT %s ON %I.%I TO %I', string_agg(p, ', ' ORDER BY place), n.nspname, c.relname, r.role)
      FROM r CROSS JOIN unnest(CAST(:tables AS text[]), CAST(:privileges AS text[]))
           WITH ORDINALITY AS needed (name, wanted, row)
      JOIN pg_namespace n ON n.nspname = split_part(name, '.', 1)
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = split_part(name, '.', 2)
     CROSS JOIN unnest(string_to_array(wanted, ', ')) WITH ORDINALITY AS p (p, place)
     WHERE NOT has_table_privilege(r.role, c.oid, p)
     GROUP BY needed.row, n.nspname, c.relname, r.role
    UNION ALL
    SELECT format('GRANT INSERT (%s) ON %I.%I TO %I', string_agg(format('%I', a.attname), ', ' ORDER BY a.attnum),
                  n.nspname, c.relname, r.role)
      FROM r CROSS JOIN unnest(CAST(:appends AS text[])) AS name
      JOIN pg_namespace n ON n.nspname = split_part(name, '.', 1)
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = split_part(name, '.', 2)
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attidentity = ''
     WHERE NOT has_column_privilege(r.role, c.oid, a.attnum, 'INSERT')
     GROUP BY n.nspname, c.relname, r.role
    UNION ALL
    SELECT format('GRANT UPDATE (%s) ON archiver.events TO %I', string_agg(a.attname, ', '), r.role)
      FROM r CROSS JOIN pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'archiver' AND c.relname = 'events' AND a.attname = ANY (CAST(:columns AS text[]))
       AND NOT has_column_privilege(r.role, c.oid, a.attnum, 'UPDATE')
     GROUP BY r.role
    UNION ALL
    SELECT format('GRANT SELECT (%s) ON %I.%I TO %I', string_agg(format('%I', a.attname), ', ' ORDER BY a.attnum),
                  n.nspname, c.relname, r.role)
      FROM r CROSS JOIN unnest(CAST(:views AS text[]), CAST(:shown AS text[])) AS v (name, shown)
      JOIN pg_namespace n ON n.nspname = split_part(v.name, '.', 1)
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = split_part(v.name, '.', 2)
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = ANY (string_to_array(v.shown, ' '))
     WHERE NOT has_column_privilege(r.role, c.oid, a.attnum, 'SELECT')
     GROUP BY n.nspname, c.relname, r.role
    UNION ALL
    SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', name, r.role)
      FROM r CROSS JOIN unnest(CAST(:functions AS text[])) AS name
      JOIN pg_namespace n ON n.nspname = split_part(name, '.', 1)
      JOIN pg_proc f ON f.pronamespace = n.oid
       AND format('%s(%s)', f.proname, oidvectortypes(f.proargtypes)) = split_part(name, '.', 2)
     WHERE NOT has_function_privilege(r.role, f.oid, 'EXECUTE')
    UNION ALL
    SELECT format('GRANT %s ON ALL SEQUENCES IN SCHEMA %I TO %I', s.privilege, n.nspname, r.role)
      FROM r CROSS JOIN unnest(CAST(:sequences AS text[]), CAST(:uses AS text[])) AS s (name, privilege)
      JOIN pg_namespace n ON n.nspname = s.name JOIN pg_class c ON c.relnamespace = n.oid
     WHERE CASE WHEN c.relkind = 'S' THEN NOT has_sequence_privilege(r.role, c.oid, s.privilege) END
     GROUP BY s.privilege, n.nspname, r.role
    """
)


def missing(connection: Connection, role: str, grantee: str | None = None) -> list[str]:
    """Return the SQL that grants `grantee`, or the role itself, the missing privileges of that role."""
    needs = NEEDED[role]
    values = {
        "role": grantee or role,
        "tables": list(needs.tables),
        "privileges": list(needs.tables.values()),
        "appends": list(needs.appends),
        "columns": list(needs.columns),
        "views": list(needs.shown),
        "shown": [" ".join(columns) for columns in needs.shown.values()],
        "functions": list(needs.functions),
        "sequences": list(needs.sequences),
        "uses": list(needs.sequences.values()),
    }
    return list(connection.scalars(_MISSING, values))


# Only grants to the role itself; owners and superusers need no grants.
_SURPLUS = text(
    """
    WITH wanted (kind, name, priv) AS (
        SELECT * FROM unnest(CAST(:kinds AS text[]), CAST(:names AS text[]), CAST(:privileges AS text[]))
    ), given (kind, name, what, granted) AS (
        SELECT 'schema', n.nspname::text, format('SCHEMA %I', n.nspname), n.nspacl
          FROM pg_namespace n WHERE n.nspname = ANY (CAST(:schemas AS text[]))
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, n.nspname || '.' || c.relname,
               format('%s %I.%I', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, n.nspname, c.relname),
               c.relacl
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        UNION ALL
        SELECT 'function', format('%s.%s(%s)', n.nspname, f.proname, oidvectortypes(f.proargtypes)),
               format('ROUTINE %I.%I(%s)', n.nspname, f.proname, oidvectortypes(f.proargtypes)), f.proacl
          FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[]))
    ), columns (name, what, attribute, is_numbered, priv, grantable) AS (
        SELECT n.nspname || '.' || c.relname, format('%I.%I', n.nspname, c.relname), a.attname::text,
               a.attidentity <> '', x.privilege_type, x.is_grantable
          FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         CROSS JOIN aclexplode(a.attacl) x
         WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND a.attacl IS NOT NULL
           AND x.grantee = (SELECT oid FROM pg_roles WHERE rolname = :role)
    )
    SELECT format('REVOKE %s%s ON %s FROM %I', CASE WHEN is_kept THEN 'GRANT OPTION FOR ' ELSE '' END, priv, what,
                  CAST(:role AS text))
      FROM (
          SELECT x.privilege_type AS priv, g.what, x.is_grantable,
                 EXISTS (SELECT FROM wanted w
                          WHERE w.kind = g.kind AND w.priv = x.privilege_type
                            AND (w.name = g.name OR g.kind = 'sequence' AND w.name = split_part(g.name, '.', 1)))
                     AS is_kept
            FROM given g CROSS JOIN aclexplode(g.granted) x
           WHERE x.grantee = (SELECT oid FROM pg_roles WHERE rolname = :role)
      ) each
     WHERE NOT is_kept OR is_grantable
    UNION ALL
    SELECT format('REVOKE %s%s (%I) ON TABLE %s FROM %I', CASE WHEN is_kept THEN 'GRANT OPTION FOR ' ELSE '' END,
                  priv, attribute, what, CAST(:role AS text))
      FROM (
          SELECT c.*, EXISTS (
                     SELECT FROM wanted w
                      WHERE w.priv = c.priv
                        AND (w.kind = 'table' AND w.name = c.name
                             OR w.kind = 'column' AND w.name = c.name || '.' || c.attribute
                             OR w.kind = 'append' AND w.name = c.name AND NOT c.is_numbered)
                 ) AS is_kept
            FROM columns c
      ) each
     WHERE NOT is_kept OR grantable
     ORDER BY 1
    """
)
_SCHEMAS = ("archiver", "analytics", "archiver_jobs")


def surplus(connection: Connection, role: str) -> list[str]:
    """Return the SQL that revokes the unneeded privileges of a role in the archiver's schemas."""
    granted = list(expected_privileges(NEEDED[role]))
    values = {
        "role": role,
        "schemas": list(_SCHEMAS),
        "kinds": [kind for kind, _, _ in granted],
        "names": [name for _, name, _ in granted],
        "privileges": [privilege for _, _, privilege in granted],
    }
    return list(connection.scalars(_SURPLUS, values))


def expected_privileges(needs: Needs) -> Iterator[tuple[str, str, str]]:
    """Yield each privilege of a role: kind of object, name, privilege."""
    for schema in {name.partition(".")[0] for name in needs.tables}:
        yield "schema", schema, "USAGE"
    for name, privileges in needs.tables.items():
        for privilege in privileges.split(", "):
            yield "table", name, privilege
    for name in needs.appends:
        yield "append", name, "INSERT"
    for name in needs.columns:
        yield "column", f"archiver.events.{name}", "UPDATE"
    for view, columns in needs.shown.items():
        for name in columns:
            yield "column", f"{view}.{name}", "SELECT"
    for name in needs.functions:
        yield "function", name, "EXECUTE"
    for schema, privilege in needs.sequences.items():
        yield "sequence", schema, privilege


def existing(connection: Connection) -> list[str]:
    """Return the existing roles of the archiver."""
    query = text("SELECT rolname FROM pg_roles WHERE rolname = ANY (:names) ORDER BY 1")
    return list(connection.scalars(query, {"names": list(NEEDED)}))


def grant_missing(connection: Connection) -> None:
    """Grant each existing role the privileges that it lacks."""
    for role in existing(connection):
        for statement in missing(connection, role):
            connection.execute(text(statement))


def bring_up_to_date(connection: Connection) -> None:
    """Grant each existing role the privileges that it needs, and revoke all others, if anything differs."""
    if not are_granted(connection):
        grant_all(connection)


def grant_all(connection: Connection) -> None:
    """Revoke all privileges of each existing role, and grant those that it needs.

    A dump then shows them in the order of a fresh database.
    """
    of = {"roles": existing(connection), "schemas": list(_SCHEMAS)}
    for statement in connection.scalars(_REVOKE_ALL, of).all():
        connection.execute(text(statement))
    grant_missing(connection)


# Tables include views, and a privilege revoked on a table is revoked on its columns as well.
_REVOKE_ALL = text(
    """
    SELECT format('REVOKE ALL ON %s %s %I FROM %I', kind, CASE kind WHEN 'SCHEMA' THEN '' ELSE 'IN SCHEMA' END,
                  nspname, rolname)
      FROM pg_namespace, pg_roles,
           unnest(CAST('{SCHEMA,ALL TABLES,ALL SEQUENCES,ALL ROUTINES}' AS text[])) AS kind
     WHERE nspname = ANY (CAST(:schemas AS text[])) AND rolname = ANY (CAST(:roles AS text[]))
    """
)


def are_granted(connection: Connection) -> bool:
    """Return whether each existing role has exactly the privileges that it needs."""
    return not any(missing(connection, role) or surplus(connection, role) for role in existing(connection))
