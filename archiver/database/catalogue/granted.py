"""Privileges, role attributes and owners, compared with what this version grants."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from archiver.database import roles
from archiver.database.catalogue.difference import Difference
from archiver.database.catalogue.reading import SCHEMAS

_MIGRATE = "Run `archiver migrate`, which runs"


def examine_grants(connection: Connection) -> Iterator[Difference]:
    """Yield each difference in privileges, role attributes and owners from what this version grants."""
    yield from _granted(connection)
    yield from _others(connection)
    yield from _powers(connection)
    yield from _owners(connection)


def _granted(connection: Connection) -> Iterator[Difference]:
    for role in roles.existing(connection):
        for statement in roles.missing(connection, role):
            privilege = statement.removeprefix("GRANT ").removesuffix(f" TO {role}")
            detail = f"The role {role} lacks {privilege}."
            yield Difference(f"role {role}", "failure", detail, f"{_MIGRATE}: {statement};", (statement,))
        for statement in roles.surplus(connection, role):
            privilege = statement.removeprefix("REVOKE ").removesuffix(f" FROM {role}")
            detail = f"The role {role} has {privilege}, which this version does not grant."
            yield Difference(f"role {role}", "failure", detail, f"{_MIGRATE}: {statement};", (statement,))


# Privileges of users other than the owners and the archiver's roles. Functions are left out: the catalogue compares
# whether PUBLIC may execute them.
_OTHERS = text(
    """
    WITH given (kind, what, owner, acl) AS (
        SELECT 'SCHEMA', format('%I', n.nspname), n.nspowner, n.nspacl
          FROM pg_namespace n WHERE n.nspname = ANY (CAST(:schemas AS text[]))
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, format('%I.%I', n.nspname, c.relname),
               c.relowner, c.relacl
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        UNION ALL
        SELECT 'TABLE', format('%I.%I', n.nspname, c.relname), c.relowner, a.attacl
          FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND a.attacl IS NOT NULL
    )
    SELECT DISTINCT g.kind, g.what, x.privilege_type, coalesce(r.rolname, 'PUBLIC')
      FROM given g CROSS JOIN aclexplode(g.acl) x LEFT JOIN pg_roles r ON r.oid = x.grantee
     WHERE x.grantee <> g.owner AND (r.rolname IS NULL OR r.rolname <> ALL (CAST(:roles AS text[])))
     ORDER BY 4, 2, 3
    """
)


def _others(connection: Connection) -> Iterator[Difference]:
    allowed = {
        (name, privilege)
        for needs in roles.NEEDED.values()
        for _, name, privilege in roles.expected_privileges(needs)
    }
    values = {"schemas": list(SCHEMAS), "roles": list(roles.NEEDED)}
    for kind, what, privilege, grantee in connection.execute(_OTHERS, values):
        schema_name = what.partition(".")[0]
        is_expected_owner = any(
            (name, privilege) in allowed for name in (what, schema_name if kind != "TABLE" else what)
        )
        is_update_of_columns = (what, privilege) == ("archiver.events", "UPDATE")
        if grantee != "PUBLIC" and (is_expected_owner or is_update_of_columns):
            continue  # granted to a user directly if the archiver's roles do not exist
        quoted = grantee if grantee == "PUBLIC" else f'"{grantee}"'
        statement = f"REVOKE {privilege} ON {kind} {what} FROM {quoted}"
        yield Difference(
            f"privileges of {grantee}",
            "failure" if grantee == "PUBLIC" else "warning",
            f"{grantee} has {privilege} on {kind.lower()} {what}, which this version does not grant.",
            f"Unless it is intended, as the owner: {statement};",
            (statement,) if grantee == "PUBLIC" else (),
        )


_POWERS = text(
    """
    SELECT rolname, power FROM pg_roles,
           unnest(ARRAY['SUPERUSER', 'CREATEROLE', 'CREATEDB', 'REPLICATION', 'BYPASSRLS'],
                  ARRAY[rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls]) AS each (power, has)
     WHERE has AND rolname = ANY (CAST(:roles AS text[])) ORDER BY 1, 2
    """
)
_MEMBERSHIPS = text(
    """
    SELECT m.rolname, g.rolname FROM pg_auth_members a JOIN pg_roles m ON m.oid = a.member
      JOIN pg_roles g ON g.oid = a.roleid
     WHERE m.rolname = ANY (CAST(:roles AS text[])) ORDER BY 1, 2
    """
)


def _powers(connection: Connection) -> Iterator[Difference]:
    values = {"roles": list(roles.NEEDED)}
    for role, power in connection.execute(_POWERS, values):
        advice = f"As an administrator: ALTER ROLE {role} NO{power};"
        yield Difference(f"role {role}", "failure", f"The role {role} has the attribute {power}.", advice)
    for role, group in connection.execute(_MEMBERSHIPS, values):
        advice = f'As an administrator: REVOKE "{group}" FROM {role};'
        yield Difference(f"role {role}", "failure", f"The role {role} is a member of {group}.", advice)


_OWNERS = text(
    """
    WITH owned (kind, what, owner) AS (
        SELECT 'SCHEMA', format('%I', nspname), nspowner FROM pg_namespace
         WHERE nspname = ANY (CAST(:schemas AS text[]))
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
               format('%I.%I', n.nspname, c.relname), c.relowner
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'S')
        UNION ALL
        SELECT 'ROUTINE', format('%I.%I(%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)), p.proowner
          FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname = ANY (CAST(:schemas AS text[]))
    ), first (owner) AS (SELECT nspowner FROM pg_namespace WHERE nspname = 'archiver')
    SELECT o.kind, o.what, pg_get_userbyid(o.owner), pg_get_userbyid(f.owner),
           pg_get_userbyid(o.owner) = ANY (CAST(:roles AS text[]))
      FROM owned o, first f
     WHERE o.owner <> f.owner OR pg_get_userbyid(o.owner) = ANY (CAST(:roles AS text[])) ORDER BY 2
    """
)


def _owners(connection: Connection) -> Iterator[Difference]:
    values = {"schemas": list(SCHEMAS), "roles": list(roles.NEEDED)}
    for kind, what, owner, expected, is_expected_owner in connection.execute(_OWNERS, values):
        if is_expected_owner:
            detail = f"{owner} owns the {kind.lower()} {what}, and so may change and drop it."
            advice = f'As an administrator: ALTER {kind} {what} OWNER TO "the owner of the database";'
        else:
            detail = f"{owner} owns the {kind.lower()} {what}, while {expected} owns the schema archiver."
            advice = f'As an administrator: ALTER {kind} {what} OWNER TO "{expected}";'
        yield Difference(f"owner of {what}", "failure" if is_expected_owner else "warning", detail, advice)
