"""Check the Postgres server and this connection to it: version, durability, lock table, pooler and clock."""

import time
from collections.abc import Iterator

from sqlalchemy import Connection, text

from archiver import database
from archiver.operations.doctor.finding import Finding, Verdict
from archiver.settings import Settings

OLDEST_POSTGRES = 14
_CLOCK_WARNING_SECONDS = 5
_MAX_USAGE = 0.75  # of the lock table


def examine_version(connection: Connection) -> Finding:
    """Check that this version of Postgres is supported."""
    version = int(connection.scalar(text("SELECT current_setting('server_version_num')::int")) or 0) // 10_000
    if version < OLDEST_POSTGRES:
        return Finding("version", "failure", f"PostgreSQL {version}.", f"Use PostgreSQL {OLDEST_POSTGRES} or newer.")
    return Finding("version", "ok", f"PostgreSQL {version}.")


def examine_durability(connection: Connection) -> Finding:
    """Check that commits survive a crash, and that this server accepts writes."""
    for name, expected, advice in (
        ("fsync", "on", "A crash loses acknowledged events: set fsync = on in postgresql.conf."),
        ("full_page_writes", "on", "A crash can corrupt the archive: set full_page_writes = on in postgresql.conf."),
        ("transaction_read_only", "off", "The database is read-only: set DATABASE_URL to the primary."),
    ):
        if connection.scalar(text("SELECT current_setting(:name)"), {"name": name}) != expected:
            return Finding("durability", "failure", f"{name} is not {expected}.", advice)
    return Finding("durability", "ok", "A commit survives a crash.")


def examine_lock_table(connection: Connection) -> Finding:
    """Check that no session has filled most of the lock table."""
    used = database.locks.select_usage(connection)
    if used.usage > _MAX_USAGE:
        detail = (
            f"{used.usage:.0%} of the lock table is in use; process {used.pid} (user {used.user or 'unknown'},"
            f" application {used.application or 'unnamed'}) holds {used.locks:,} locks."
        )
        return Finding("room for locks", "warning", detail, database.NO_ROOM_FOR_LOCKS)
    return Finding("room for locks", "ok", f"{used.usage:.0%} of the lock table is in use.")


# Defaults that may end a session before the first statement of a transaction has set its own limits. They can be
# changed for the session only without a pooler.
_SHORT_LIMITS = text(
    "SELECT name, reset_val FROM pg_settings"
    " WHERE name = ANY (CAST(:names AS text[])) AND CAST(reset_val AS integer) BETWEEN 1 AND 999 ORDER BY name"
)


def examine_pooler(connection: Connection, configuration: Settings) -> Iterator[Finding]:
    """Check for a connection pooler, and for session defaults that it keeps transactions from changing."""
    if database.is_behind_pooler(connection):
        detail = "A connection pooler such as PgBouncer is in use, so statements are not prepared."
        advice = ""
        if configuration.prepared_statements:
            detail = "A connection pooler is in use, and ARCHIVER_PREPARED_STATEMENTS is true."
            advice = "Unset it, unless the pooler supports prepared statements, as PgBouncer does since 1.22."
        yield Finding("pooler", "warning" if advice else "ok", detail, advice)
        if limits := connection.execute(_SHORT_LIMITS, {"names": list(database.session.LIMITS)}).all():
            listed = ", ".join(f"{row.name} = {row.reset_val}ms" for row in limits)
            advice = f"As an administrator: ALTER ROLE … RESET {limits[0].name}; and the same for ALTER DATABASE."
            yield Finding("limits", "warning", f"Behind a pooler these limits end sessions: {listed}.", advice)


def examine_clock(connection: Connection, tolerance: int) -> Finding:
    """Check that the clocks of this machine and the database agree. `tolerance`: seconds of a signature."""
    before = time.time()
    server = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8")) or 0)
    skew = abs(server - (before + time.time()) / 2)
    detail = f"This machine's clock and the database's differ by {skew:.1f} s."
    if skew > _CLOCK_WARNING_SECONDS:
        verdict: Verdict = "failure" if skew > tolerance else "warning"
        return Finding(
            "clock",
            verdict,
            detail,
            "Synchronise both clocks (NTP): signature timestamps are checked against this machine's clock.",
        )
    return Finding("clock", "ok", detail)
