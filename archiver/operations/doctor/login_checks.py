"""Check other logins: whether they have limits, and old snapshots that hold back vacuum."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from archiver.database import roles
from archiver.operations.doctor.finding import MAX_NAMED, Finding, shortened

OLD_SECONDS = 600.0  # of a snapshot
OLD_TRANSACTIONS = 1_000_000  # since a snapshot for which Postgres shows this user no time

_TIMEOUTS = {"statement_timeout": "60s", "idle_in_transaction_session_timeout": "60s"}
_READER_LIMITS = {**_TIMEOUTS, "default_transaction_read_only": "on", "jit": "off"}
LIMITS: Mapping[str, Mapping[str, str]] = {
    roles.READER: _READER_LIMITS,
    roles.METRICS: _READER_LIMITS,
    roles.AUDITOR: _TIMEOUTS,  # an export adds an audit entry
}

# The settings with which a session of each login begins. Members of `archiver_writer` run the archiver, which sets
# its own limits.
_SELECT_LOGINS = text(
    """
    WITH RECURSIVE members (member, role) AS (
        SELECT m.member, g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
         WHERE g.rolname = ANY (CAST(:roles AS text[])) OR g.rolname = :writer
        UNION
        SELECT m.member, members.role FROM members JOIN pg_auth_members m ON m.roleid = members.member
    ), logins AS (
        SELECT r.oid, r.rolname, array_agg(m.role) AS roles FROM members m JOIN pg_roles r ON r.oid = m.member
         WHERE r.rolcanlogin AND NOT r.rolsuper GROUP BY r.oid, r.rolname
        HAVING NOT bool_or(m.role = :writer)
    ), given AS (
        SELECT s.setrole, s.setdatabase, split_part(each, '=', 1) AS name,
               substr(each, strpos(each, '=') + 1) AS value
          FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) AS each
         WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    ), server AS (
        SELECT name, reset_val AS value FROM pg_settings p
         WHERE name = ANY (CAST(:names AS text[]))
           AND NOT EXISTS (SELECT FROM given g JOIN pg_roles r ON r.oid = g.setrole
                            WHERE r.rolname = session_user AND g.name = p.name)
    )
    SELECT l.rolname, l.roles, n.name,
           coalesce((SELECT g.value FROM given g WHERE g.name = n.name AND g.setrole IN (0, l.oid)
                      ORDER BY g.setrole = 0, g.setdatabase = 0 LIMIT 1),
                    (SELECT s.value FROM server s WHERE s.name = n.name)) AS value
      FROM logins l CROSS JOIN unnest(CAST(:names AS text[])) AS n (name)
     ORDER BY l.rolname, n.name
    """
).bindparams(roles=list(LIMITS), writer=roles.WRITER, names=list(_READER_LIMITS))


def examine_logins(connection: Connection) -> Finding:
    """Check that logins that read the archive have limits. A login does not inherit the settings of its roles."""
    lacking: dict[str, list[str]] = {}
    for login, of_roles, name, value in connection.execute(_SELECT_LOGINS):
        needed = {key: limit for role in of_roles for key, limit in LIMITS[role].items()}
        if name in needed and not _is_limited(name, value):
            lacking.setdefault(login, []).append(name)
    if not lacking:
        return Finding("logins", "ok", "Each login that only reads the archive has limits.")
    named = [f"{login} lacks {', '.join(names)}" for login, names in lacking.items()]
    statements = [
        f"ALTER ROLE \"{login}\" SET {name} = '{_READER_LIMITS[name]}';"
        for login, names in list(lacking.items())[:MAX_NAMED]
        for name in names
    ]
    detail = f"Logins that read the archive have no limits: {shortened(named)}."
    return Finding("logins", "warning", detail, f"As an administrator: {' '.join(statements)}")


def _is_limited(name: str, value: str | None) -> bool:
    if name in _TIMEOUTS:
        return re.fullmatch(r"0*[a-z ]*", value or "0") is None  # 0, with or without a unit: unlimited
    return (
        value in {"on", "true", "yes", "1"} if _READER_LIMITS[name] == "on" else value in {"off", "false", "no", "0"}
    )


class Snapshot(NamedTuple):
    """A snapshot that holds back vacuum. `pid` 0: it belongs to a prepared transaction. `since`: when its transaction
    began; None if Postgres does not show that to this user, or if it is the snapshot of a replica. `transactions`:
    the number of transactions that began after it.
    """

    pid: int
    user: str | None
    application: str | None
    state: str | None
    since: datetime | None
    seconds: float | None
    transactions: int

    @property
    def is_old(self) -> bool:
        """Return whether the snapshot has held back vacuum for long."""
        return self.transactions >= OLD_TRANSACTIONS if self.seconds is None else self.seconds >= OLD_SECONDS

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.pid else "a prepared transaction"
        age = (
            f"since {self.since:%Y-%m-%d %H:%M:%S} UTC ({self.seconds:,.0f} s)"
            if self.since is not None
            else f"for {self.transactions:,} transactions"
        )
        user, application = self.user or "unknown", self.application or "unnamed"
        return f"{who} (user {user}, application {application}, {self.state or 'state hidden'}) {age}"


# Includes the snapshots of replicas, which belong to no database, but not those of other databases.
_SELECT_SNAPSHOTS = text(
    """
    SELECT pid, usename, application_name, state, xact_start,
           CAST(extract(epoch FROM clock_timestamp() - xact_start) AS float8), age(backend_xmin)
      FROM pg_stat_activity
     WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
       AND coalesce(datname, current_database()) = current_database()
       AND coalesce(backend_type, '') NOT IN ('autovacuum worker', 'parallel worker')
    UNION ALL
    SELECT 0, owner, gid, 'prepared', prepared,
           CAST(extract(epoch FROM clock_timestamp() - prepared) AS float8), age(transaction)
      FROM pg_prepared_xacts WHERE database = current_database()
     ORDER BY 7 DESC
    """
)


def examine_snapshots(connection: Connection) -> Finding:
    """Check for old snapshots, which keep Postgres from removing old row versions and so make the feed slow."""
    old = [each for row in connection.execute(_SELECT_SNAPSHOTS) if (each := Snapshot(*row)).is_old]
    if not old:
        return Finding("snapshots", "ok", "No old snapshot keeps Postgres from removing old row versions.")
    detail = f"Snapshots keep Postgres from removing old row versions: {shortened([*map(str, old)])}."
    return Finding("snapshots", "warning", detail, " ".join(_endings(old)))


def _endings(old: Sequence[Snapshot]) -> Iterator[str]:
    if pids := [each.pid for each in old[:MAX_NAMED] if each.pid]:
        end = " ".join(f"SELECT pg_terminate_backend({pid});" for pid in pids)
        yield f"End these transactions, or as an administrator: {end}"
    if any(not each.pid for each in old):
        yield "COMMIT PREPARED or ROLLBACK PREPARED ends a prepared transaction."
    yield "Set idle_in_transaction_session_timeout for their logins."
