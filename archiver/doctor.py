"""What could be wrong with an installation, checked one by one, each with what to do about it."""

import time
from collections.abc import Iterator
from typing import Literal

import msgspec
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, schema, signatures
from archiver.settings import Settings, SettingsError

Verdict = Literal["ok", "warning", "failure"]

OLDEST_POSTGRES = 14
SHORTEST_SECRET = 16  # characters
_CLOCK_WARNING_SECONDS = 5


class Finding(msgspec.Struct, frozen=True):
    """One thing that was checked. `advice` is empty where there is nothing to do."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""


def examine_settings(configuration: Settings) -> Iterator[Finding]:
    """What can be said without a database."""
    scheme = configuration.webhook_scheme
    try:
        signatures.verifier(configuration)
    except SettingsError as error:
        yield Finding("webhook secret", "failure", "Deliveries cannot be verified.", str(error))
        return
    if scheme == "none":
        yield Finding(
            "webhook secret",
            "warning",
            "Anyone who reaches the port can write to the archive.",
            "Set ARCHIVER_WEBHOOK_SCHEME and ARCHIVER_WEBHOOK_SECRETS.",
        )
    elif any(len(secret) < SHORTEST_SECRET for secret in configuration.secrets):
        yield Finding(
            "webhook secret",
            "warning",
            f"A secret is shorter than {SHORTEST_SECRET} characters, and could be guessed.",
            'Make a longer one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    else:
        yield Finding("webhook secret", "ok", f"Scheme {scheme}, {len(configuration.secrets)} secret(s).")


def examine_database(configuration: Settings, engine: Engine) -> Iterator[Finding]:
    """What the database says. Stops at the first thing without which the rest cannot be asked."""
    try:
        with database.transaction(engine, statement_seconds=10) as connection:
            yield Finding("database", "ok", f"Reached as {connection.scalar(text('SELECT current_user'))}.")
            for check in (_version, _durability, _schema, _privileges, _reader):
                finding = check(connection)
                yield finding
                if finding.verdict == "failure" and check is _schema:
                    break
            yield _clock(connection, configuration.timestamp_tolerance)
    except SQLAlchemyError as error:
        detail = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        yield Finding("database", "failure", detail, "Check DATABASE_URL, and that Postgres runs and is reachable.")


def _version(connection: Connection) -> Finding:
    version = int(connection.scalar(text("SELECT current_setting('server_version_num')::int")) or 0) // 10_000
    if version < OLDEST_POSTGRES:
        return Finding("version", "failure", f"PostgreSQL {version}.", f"Use PostgreSQL {OLDEST_POSTGRES} or newer.")
    return Finding("version", "ok", f"PostgreSQL {version}.")


def _durability(connection: Connection) -> Finding:
    for name, wanted, advice in (
        ("fsync", "on", "A crash loses acknowledged events: set fsync = on in postgresql.conf."),
        ("full_page_writes", "on", "A crash can corrupt the archive: set full_page_writes = on in postgresql.conf."),
        ("transaction_read_only", "off", "The database is read-only: let DATABASE_URL name the primary."),
    ):
        if connection.scalar(text("SELECT current_setting(:name)"), {"name": name}) != wanted:
            return Finding("durability", "failure", f"{name} is not {wanted}.", advice)
    return Finding("durability", "ok", "A commit survives a crash.")


def _schema(connection: Connection) -> Finding:
    try:
        schema.check(connection)
    except schema.SchemaError as error:
        return Finding("schema", "failure", str(error), "Run `archiver migrate` with this same version.")
    return Finding("schema", "ok", f"At {schema.head()}.")


NEEDED: tuple[tuple[str, str], ...] = (
    ("events", "SELECT, INSERT"),
    ("schema_version", "SELECT"),
    ("sessions", "SELECT, INSERT, UPDATE"),
    ("chats", "SELECT, INSERT, UPDATE, DELETE"),
    ("messages", "SELECT, INSERT, UPDATE, DELETE"),
    ("quarantine", "SELECT, INSERT, UPDATE, DELETE"),
)
# Of the ledger only these may change.
COUNTERS = ("delivery_count", "last_received_at", "occurred_at")


def _privileges(connection: Connection) -> Finding:
    if not connection.scalar(text("SELECT has_schema_privilege('archiver', 'USAGE')")):
        advice = "GRANT USAGE ON SCHEMA archiver TO <user>;"
        return Finding("privileges", "failure", "This database user may not enter the schema archiver.", advice)
    missing = [
        f"GRANT {privilege} ON archiver.{table} TO <user>;"
        for table, privileges in NEEDED
        for privilege in privileges.split(", ")
        if not connection.scalar(
            text("SELECT has_table_privilege(:table, :privilege)"),
            {"table": f"archiver.{table}", "privilege": privilege},
        )
    ]
    missing += [
        f"GRANT UPDATE ({column}) ON archiver.events TO <user>;"
        for column in COUNTERS
        if not connection.scalar(
            text("SELECT has_column_privilege('archiver.events', :column, 'UPDATE')"), {"column": column}
        )
    ]
    if missing:
        return Finding("privileges", "failure", "This database user may not write the archive.", " ".join(missing))
    return Finding("privileges", "ok", "This database user may write the archive.")


def _reader(connection: Connection) -> Finding:
    exists = connection.scalar(text("SELECT true FROM pg_roles WHERE rolname = :name"), {"name": schema.READER})
    if not exists:
        return Finding(
            "reader role",
            "warning",
            f"The role {schema.READER} does not exist, so dashboards have no role to read by.",
            f"As an administrator: CREATE ROLE {schema.READER} NOLOGIN; then run `archiver migrate` again.",
        )
    if not schema.reader_can_read(connection):
        return Finding(
            "reader role", "warning", f"{schema.READER} may not read the views.", "Run `archiver migrate` again."
        )
    return Finding("reader role", "ok", f"{schema.READER} reads the views: GRANT {schema.READER} TO your_dashboard;")


def _clock(connection: Connection, tolerance: int) -> Finding:
    before = time.time()
    theirs = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8")) or 0)
    skew = abs(theirs - (before + time.time()) / 2)
    detail = f"This machine's clock and the database's differ by {skew:.1f} s."
    if skew > _CLOCK_WARNING_SECONDS:
        verdict: Verdict = "failure" if skew > tolerance else "warning"
        return Finding("clock", verdict, detail, "Synchronise both (NTP): signed times are checked against this one.")
    return Finding("clock", "ok", detail)
