"""Run the checks of a database in order. This module has those of its schema, the privileges and the duties."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from archiver import database
from archiver.archive import rollups, search
from archiver.database import catalogue, identity, lock_waits, roles, schema
from archiver.database.clock import MAX_WAIT
from archiver.errors import sentence
from archiver.operations import heartbeats, overview
from archiver.operations.doctor.finding import Finding, Verdict
from archiver.operations.doctor.login_checks import examine_logins, examine_snapshots
from archiver.operations.doctor.server_checks import (
    examine_clock,
    examine_durability,
    examine_lock_table,
    examine_pooler,
    examine_version,
)
from archiver.operations.doctor.table_checks import examine_tables
from archiver.outbound import feed
from archiver.outbound.followups.review import (
    FollowupStats,
    may_select_stats,
    name_failing,
    select_failing,
    select_stats,
)
from archiver.settings import Settings

OUT_OF_MEMORY = "53200"  # SQLSTATE
_LOCK_SECONDS = 3.0  # enough to find the holder of a lock
_MAX_HOLDERS = 3  # named in a finding
_RUN_AGAIN = "Run `archiver doctor` again."


def examine_database(configuration: Settings, engine: Engine, embedded: str = "") -> Iterator[Finding]:
    """Yield the findings of the database checks, up to the first failure that prevents the rest.

    `embedded` describes the embedded database, if this is one.
    """
    is_reached = False
    try:
        with (
            lock_waits.watching(engine),
            database.transaction(engine, statement_seconds=10, lock_seconds=_LOCK_SECONDS) as connection,
        ):
            is_reached = True
            yield Finding("database", "ok", f"Reached {embedded or schema.where(connection)}.")
            yield from examine_pooler(connection, configuration)
            yield from _main_checks(configuration, connection)
            yield from _workers(connection)
            yield from _search(connection, configuration)
            yield from _set_aside(connection)
            yield from _identity(configuration, connection, engine)
            yield examine_clock(connection, configuration.timestamp_tolerance)
        yield _held(engine) or Finding("locks", "ok", "No session is waiting for a lock on the archiver's tables.")
    except lock_waits.LockTimeoutError as error:
        detail, _, advice = str(error).partition("\n")
        yield Finding("locks", "failure", sentence(detail), advice or _RUN_AGAIN)
    except database.EncodingError as error:
        yield Finding("encoding", "failure", "The database is not UTF-8.", sentence(error))
    except SQLAlchemyError as error:
        yield _failed(error, engine, is_reached=is_reached)


def _main_checks(configuration: Settings, connection: Connection) -> Iterator[Finding]:
    """Run the checks that depend on each other: without access to the schema, or with another one, the rest fail."""
    for check in (
        examine_version,
        examine_durability,
        examine_lock_table,
        _schema_access,
        _schema,
        _privileges,
        _roles,
        examine_logins,
        examine_snapshots,
        _outbox,
        _followups,
    ):
        finding = check(connection)
        if finding is not None:
            yield finding
            if finding.verdict == "failure" and check in {_schema_access, _schema}:
                return
        if check is _schema:
            yield from _catalogue(connection, configuration)
            yield from examine_tables(connection)
        if check is _privileges and finding is not None and finding.verdict == "ok":
            yield _sealing(connection, configuration.seal_every, has_key=bool(configuration.seal_key))
            yield _times_ahead(connection, configuration.session_lifetime)
            yield _webhooks(connection)


def _failed(error: SQLAlchemyError, engine: Engine, *, is_reached: bool) -> Finding:
    """Return the finding for a database error, which ends the checks."""
    message = str(getattr(error, "orig", None) or error).strip()
    detail = message.splitlines()[0]
    if is_reached:
        is_full = database.sqlstate(error) == OUT_OF_MEMORY
        advice = database.NO_ROOM_FOR_LOCKS if is_full else "The database rejected a query: see its log."
        return Finding("questions", "failure", detail, advice)
    advice = database.CERTIFICATE_ADVICE if database.is_untrusted(error) else _advice_on(message, engine)
    return Finding("database", "failure", detail, advice)


# Messages of libpq and Postgres in English; for other languages the general advice is given.
_ADVICE = (
    ("password authentication failed", "Correct the user or the password in DATABASE_URL, percent-encoded."),
    ("no password supplied", "DATABASE_URL lacks the password: postgresql://USER:PASSWORD@HOST:5432/DATABASE."),
    (
        "database .* does not exist",
        "Correct the database in DATABASE_URL, or as an administrator: CREATE DATABASE …;",
    ),
    ("role .* does not exist", "Correct the user in DATABASE_URL, or as an administrator: CREATE ROLE … LOGIN;"),
    ("pg_hba.conf", "Allow the user of DATABASE_URL to connect from this machine: pg_hba.conf on the server."),
    ("does not support SSL", "Set ssl = on in Postgres, or remove sslmode from DATABASE_URL."),
    ("resolve host|translate host name", "Correct the host in DATABASE_URL: the name cannot be resolved."),
    ("refused|No such file", "Correct host and port in DATABASE_URL, or start Postgres: no server listens there."),
    ("out of shared memory", database.NO_ROOM_FOR_LOCKS),
    ("timeout|timed out", "Check the host in DATABASE_URL and firewalls: the server does not respond."),
)


def _advice_on(message: str, engine: Engine) -> str:
    """Return the remedy for a connection error."""
    general = "Check DATABASE_URL, and that Postgres is running and reachable."
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, message)), general)
    variables = database.libpq_variables(engine.url)
    return f"{advice} These environment variables also apply: {', '.join(variables)}." if variables else advice


def _held(engine: Engine) -> Finding | None:
    """Return a finding about sessions that block the archiver's tables; None if there are none."""
    holders = lock_waits.find_holders(engine)
    if not holders:
        return None
    detail = f"Sessions are waiting for locks: {'; '.join(map(str, holders[:_MAX_HOLDERS]))}."
    return Finding("locks", "failure", detail, holders[0].advice)


def _schema_access(connection: Connection) -> Finding | None:
    """Return a finding about why this user cannot even read the schema; None if it can."""
    create = schema.grant_missing(connection)
    if connection.scalar(text("SELECT to_regnamespace('archiver') IS NULL")):
        if create is None:
            return None
        detail = "There is no archiver schema, and this user may not create it."
        return Finding("schema", "failure", detail, f"As an administrator: {create} Then run `archiver migrate`.")
    if not connection.scalar(_IS_SHUT_OUT):
        return None
    return _lacking(connection, "This user may not read the schema archiver.")


_IS_SHUT_OUT = text(
    "SELECT NOT has_schema_privilege(n.oid, 'USAGE') OR NOT coalesce(has_table_privilege(c.oid, 'SELECT'), true)"
    " FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'schema_version'"
    " WHERE n.nspname = 'archiver'"
)


def _schema(connection: Connection) -> Finding:
    try:
        schema.check(connection)
    except schema.SchemaError as error:
        create = schema.grant_missing(connection)
        first = f"As an administrator: {create} Then run" if create and schema.current(connection) else "Run"
        return Finding("schema", "failure", sentence(error), f"{first} `archiver migrate` of this version.")
    return Finding("schema", "ok", f"At {schema.head()}.")


def _catalogue(connection: Connection, configuration: Settings) -> Iterator[Finding]:
    """Report each difference between the schema and the one that this version expects."""
    differences = catalogue.select_differences(connection, configuration.promoted_variables)
    if not differences:
        yield Finding("catalogue", "ok", "Tables, views, functions, triggers and grants are as this version expects.")
    for each in differences:
        yield Finding("catalogue", each.verdict, each.detail, each.advice)


_OLDEST_UNSEALED = text(
    "SELECT extract(epoch FROM clock_timestamp() - received_at)::float8 FROM archiver.events"
    " WHERE id > (SELECT coalesce(max(events_through), 0) FROM archiver.seals) ORDER BY id LIMIT 1"
)
LATE_SEALS = 10  # times the usual interval
MIN_LATE_SECONDS = 600.0


# Whether the newest seal is signed, and the id of the newest signed seal.
_SIGNED = text(
    "SELECT (SELECT signature IS NOT NULL FROM archiver.seals ORDER BY id DESC LIMIT 1),"
    " (SELECT id FROM archiver.seals WHERE signature IS NOT NULL ORDER BY id DESC LIMIT 1)"
)


def _sealing(connection: Connection, every: int, *, has_key: bool) -> Finding:
    """Check that events are sealed in time, and that seals are signed if earlier seals are."""
    age = connection.scalar(_OLDEST_UNSEALED)
    if age is None or age < max(LATE_SEALS * every, MIN_LATE_SECONDS):
        is_signed, latest_signed = connection.execute(_SIGNED).one()
        if latest_signed is None and not has_key:
            hint = "No seal is signed; to sign them, set ARCHIVER_SEAL_KEY (see docs/seals.md)."
            return Finding("seals", "ok", f"Every event is sealed in time. {hint}")
        if is_signed or latest_signed is None:
            return Finding("seals", "ok", "Every event is sealed in time.")
        return Finding(
            "seals",
            "warning",
            f"Seals after {latest_signed} are unsigned, although earlier ones are signed.",
            "Set ARCHIVER_SEAL_KEY for every `serve` and `worker`; if signing was stopped on purpose, see"
            " docs/seals.md.",
        )
    return Finding(
        "seals",
        "warning",
        f"An event that arrived {age / 60:,.0f} minutes ago is not sealed.",
        "Start a worker (`archiver serve` without --no-worker, or `archiver worker`) and see its log, or run"
        " `archiver seal`. Sealing waits for the end of transactions that write.",
    )


def _privileges(connection: Connection) -> Finding:
    user = _user(connection)
    if roles.missing(connection, roles.WRITER, user):
        if not roles.missing(connection, roles.AUDITOR, user):
            detail = "This database user may verify, prove and export, but not write the archive."
            return Finding("privileges", "warning", detail, "Use another user for `serve` and `worker`.")
        return _lacking(connection, "This database user may not write the archive.")
    return Finding("privileges", "ok", "This database user may write the archive.")


def _lacking(connection: Connection, detail: str) -> Finding:
    user = _user(connection)
    if roles.WRITER in roles.existing(connection):
        advice = f'As an administrator: GRANT {roles.WRITER} TO "{user}";'
        if roles.AUDITOR in roles.existing(connection):
            advice += f" For commands that only read, such as status, verify and export: {roles.AUDITOR}."
        return Finding("privileges", "failure", detail, advice)
    missing = roles.missing(connection, roles.WRITER, user)
    return Finding("privileges", "failure", detail, f"As its owner: {'; '.join(missing)};")


def _user(connection: Connection) -> str:
    return str(connection.scalar(text("SELECT current_user")))


def _roles(connection: Connection) -> Finding:
    result = roles.existing(connection)
    if absent := [name for name in roles.NEEDED if name not in result]:
        return Finding(
            "roles",
            "warning",
            f"The roles {', '.join(absent)} do not exist, so users cannot be granted minimal privileges.",
            "As an administrator, run deploy/roles.sql; then run `archiver migrate` again.",
        )
    return Finding("roles", "ok", f"Dashboards: GRANT {roles.READER} TO your_dashboard;")


def _outbox(connection: Connection) -> Finding | None:
    """Check that changes are published; None if this user cannot see the outbox."""
    if not connection.scalar(text("SELECT has_table_privilege('archiver.outbox', 'SELECT')")):
        return None
    waiting = feed.select_backlog(connection)
    if not waiting.is_overdue(datetime.now(UTC)):
        return Finding("changes", "ok", "Changes are published when they are committed.")
    detail = (
        f"Changes of {waiting.transactions:,} transactions have been waiting since"
        f" {waiting.since:%Y-%m-%d %H:%M:%S} UTC."
    )
    return Finding("changes", "warning", detail, sentence(feed.ADVICE))


def _workers(connection: Connection) -> Iterator[Finding]:
    """Check that a worker is running, and report each failing or hanging duty."""
    if not heartbeats.may_select(connection):
        return  # the missing privilege is reported above
    workers = heartbeats.select_workers(connection)
    running = [each for each in workers if each.is_fresh]
    for each in running:
        for name, report in each.faulty.items():
            place, reason = f"on {each.host} (process {each.pid})", report.reason.rstrip(".")
            detail = f"{report.state} {place} since {report.since:%Y-%m-%d %H:%M:%S} UTC: {reason}."
            detail += f" It was restarted {report.restarts:,} times." if report.restarts else ""
            yield Finding(
                f"duty {name}", "failure", detail, "Fix the cause that the reason names; see the worker's log."
            )
    ended = [each for each in workers if not each.is_fresh]
    if not running:
        detail = f"No worker has reported in the last {heartbeats.FRESH_SECONDS:.0f} seconds."
        if ended:
            last = max(ended, key=lambda each: each.beat_at)
            detail += f" The last was process {last.pid} on {last.host}, at {last.beat_at:%Y-%m-%d %H:%M:%S} UTC."
        yield Finding(
            "worker", "warning", detail, "Start `archiver worker`, or `archiver serve` without --no-worker."
        )
    elif not any(each.faulty for each in running):
        yield Finding("worker", "ok", f"{len(running):,} running; all duties work.")


_SEARCH_LATE_SECONDS = 600


def _search(connection: Connection, configuration: Settings) -> Iterator[Finding]:
    """Check the settings and the delay of the search index, and that erased words leave it."""
    if heartbeats.may_select(connection):
        others = heartbeats.select_indexing(connection, is_on=configuration.search == "off")
        if others:
            yield Finding(
                "search", "warning", *search.other_setting(configuration.search, [each.name for each in others])
            )
    if configuration.search == "off" or not search.may_select(connection):
        return
    language = search.select_language(connection, configuration.search_language)
    if language is None:
        yield Finding("search", "failure", *search.unknown_language(configuration.search_language))
        return
    if (late := search.select_late_rebuild(connection)) is not None:
        yield _late_rebuild(late)
    lag = search.select_lag(connection)
    if lag.language not in {None, language}:
        yield Finding("search", "warning", *search.other_language(configuration.search_language, str(lag.language)))
    if lag.since is not None and (datetime.now(UTC) - lag.since).total_seconds() > _SEARCH_LATE_SECONDS:
        detail = f"analytics.search lacks changes since {lag.since:%Y-%m-%d %H:%M:%S} UTC."
        yield Finding("search", "warning", detail, "Start `archiver worker`; if one is running, see its log.")
    else:
        yield Finding(
            "search",
            "ok",
            "The search index follows the archive."
            if lag.language
            else "No worker has started the search index yet.",
        )


def _late_rebuild(late: search.LateRebuild) -> Finding:
    detail = (
        f"The partition archiver_search.{late.name} of the search index still contains words of messages erased since"
        f" {late.since:%Y-%m-%d %H:%M:%S} UTC."
    )
    if late.pid is None:
        return Finding("search", "warning", detail, "Start `archiver worker`; if one is running, see its log.")
    since = f" since {late.used_since:%Y-%m-%d %H:%M:%S} UTC" if late.used_since else ""
    detail += (
        f" Process {late.pid} (user {late.user or 'unknown'}, application {late.application or 'unnamed'}) uses the"
        f" index in a transaction{since}."
    )
    advice = f"End that transaction; as an administrator: SELECT pg_terminate_backend({late.pid});"
    return Finding("search", "warning", detail, advice)


def _set_aside(connection: Connection) -> Iterator[Finding]:
    """Check that the derived rows of all sessions can be stored."""
    if not rollups.may_select_failing(connection):
        return
    failing = rollups.select_failing(connection)
    if failing is not None:
        others = "" if failing.count == 1 else f" and {failing.count - 1:,} more"
        yield Finding(
            "sessions",
            "warning",
            f"analytics.sessions lacks the session {failing.session_id!r}{others}, since"
            f" {failing.since:%Y-%m-%d %H:%M:%S} UTC, because its row cannot be stored: {failing.reason}."
            " analytics.daily remains exact: each query computes the figures of these sessions.",
            "See the log of Postgres for the rejected statement. SQLSTATE 57014: the session is too long, or the"
            " database too slow. A worker tries again at least once an hour.",
        )


def _identity(configuration: Settings, connection: Connection, engine: Engine) -> Iterator[Finding]:
    """Check that this database was served before or is new."""
    if not identity.may_select(connection):
        return
    guard = identity.Guard(configuration.home.resolve(), engine.url)
    if reason := guard.examine(connection):
        detail = f"{sentence(reason)} Nothing is sealed, published or sent; events are still received."
        yield Finding("identity", "failure", detail, identity.ADVICE)
    elif guard.unreadable:
        yield Finding(
            "identity", "warning", f"The identity of this database could be checked only in part: {guard.unreadable}."
        )
    else:
        yield Finding("identity", "ok", "This database was served before or is new.")


_LATE_SECONDS = 3_600


def _followups(connection: Connection) -> Finding | None:
    """Check that subscriptions get their deliveries; None without subscriptions."""
    if not may_select_stats(connection):
        return None  # missing privileges are reported above
    stats = select_stats(connection)
    if not stats.subscriptions:
        return None
    summary = f"{stats.subscriptions:,} subscriptions, {stats.pending:,} deliveries pending"
    wrong = list(_followup_problems(stats, select_failing(connection)))
    if not wrong:
        return Finding("follow-ups", "ok", f"{summary}.")
    detail = "; ".join([summary, *(each for each, _ in wrong)])
    return Finding("follow-ups", "warning", f"{detail}.", " ".join(advice for _, advice in wrong))


def _followup_problems(stats: FollowupStats, failing: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield each problem of the follow-ups with its remedy."""
    if stats.paused:
        advice = (
            "`archiver followups list` shows why they are paused; after fixing the cause:"
            " `archiver followups resume ID`."
        )
        yield f"{stats.paused:,} subscriptions are paused", advice
    if failing:
        advice = (
            "`archiver followups show ID` shows since when it has been failing; to test its receiver:"
            " `archiver followups test ID`."
        )
        yield f"{len(failing):,} subscriptions are failing: {name_failing(failing)}", advice
    if stats.dead:
        advice = (
            "To list dead deliveries: `archiver followups deliveries --dead`; to retry them:"
            " `archiver followups retry`."
        )
        yield f"dead deliveries: {stats.dead:,}", advice
    if stats.oldest_seconds > _LATE_SECONDS:
        advice = (
            "Look for failing receivers: `archiver followups list`."
            " If there are none, start `archiver serve` or `archiver worker`."
        )
        yield f"a change from {stats.oldest_seconds / 3_600:,.1f} hours ago is not delivered", advice


def _webhooks(connection: Connection) -> Finding:
    """Check that webhooks still arrive, as far as histories can show."""
    silence = overview.select_silence(connection)
    shown = f"histories have shown {silence.turns:,} turns of {silence.sessions:,} sessions since"
    if not silence.has_webhooks:
        detail = "No webhook has been stored yet"
        if silence.turns:
            detail += f", although {shown} {silence.read_since:%Y-%m-%d %H:%M:%S} UTC"
        verdict: Verdict = "failure" if silence.is_certain else "warning"
        return Finding("webhooks", verdict, f"{detail}.", overview.ADVICE)
    if silence.is_certain:
        detail = f"No webhook of a turn has arrived since {silence.since:%Y-%m-%d %H:%M:%S} UTC, although {shown}."
        return Finding("webhooks", "failure", detail, overview.ADVICE)
    return Finding("webhooks", "ok", "Webhooks arrive: histories show no undelivered turns since the latest webhook.")


# Each time with its largest plausible distance: a lease lasts at most a minute; for the others as a worker corrects
# them (`worker.clock_recovery`).
_AHEAD = text(
    """
    SELECT what, moment FROM (
        SELECT 'the newest event', (SELECT received_at FROM archiver.events ORDER BY id DESC LIMIT 1), interval '0'
        UNION ALL SELECT 'the newest seal', (SELECT sealed_at FROM archiver.seals ORDER BY id DESC LIMIT 1), '0'
        UNION ALL SELECT 'the lease of a session', max(leased_until), interval '1 minute' FROM archiver.sessions
        UNION ALL SELECT 'the lease of a subscription', max(leased_until), interval '1 minute'
                    FROM archiver.subscriptions
        UNION ALL SELECT 'the next reading of a session', max(reconcile_at),
                         make_interval(secs => :wait + :lifetime) FROM archiver.sessions
        UNION ALL SELECT 'the next attempt at a follow-up', max(due_at), make_interval(secs => :wait)
                    FROM archiver.deliveries WHERE state = 'pending'
    ) AS times (what, moment, ahead)
     WHERE moment > clock_timestamp() + ahead + interval '1 minute'
    """
)


def _times_ahead(connection: Connection, lifetime: float) -> Finding:
    """Check for due times recorded while a clock was ahead."""
    rows = connection.execute(_AHEAD, {"lifetime": lifetime, "wait": MAX_WAIT.total_seconds()}).all()
    if not rows:
        return Finding("times", "ok", "No due time in the database is implausibly far ahead.")
    listed = "; ".join(f"{row.what}: {row.moment:%Y-%m-%d %H:%M:%S} UTC" for row in rows)
    advice = (
        "The clock of a machine or of the database was ahead: synchronise the clocks (NTP). Within minutes a worker"
        " ends such leases and makes such readings and attempts due."
    )
    return Finding("times", "warning", f"These due times are implausibly far ahead: {listed}.", advice)
