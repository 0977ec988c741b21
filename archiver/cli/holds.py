"""`archiver hold` and `archiver audit`: legal holds and the audit log."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archiver import database, settings
from archiver.cli import complain, connection, escaped, options
from archiver.cli.output import Table, Whole, counted, print_json, print_table
from archiver.compliance import erasure, export
from archiver.compliance.erasure import Criteria
from archiver.compliance.export import Selection
from archiver.database.lock_waits import INSUFFICIENT_PRIVILEGE
from archiver.ledger import audit_log as trail

PAGE = 500
COUNT_SECONDS = 120  # to count the content that a hold covers


@click.group()
def hold() -> None:
    """Manage legal holds: covered sessions are neither erased nor expired."""


@hold.command()
@click.option("--session", "session_id", metavar="ID", help="This session only.")
@click.option("--assistant", "assistant_id", metavar="ID", help="Sessions of this assistant.")
@click.option("--variable", metavar="NAME=VALUE", help="Sessions with this variable value.")
@options.since_option
@options.until_option
@options.reason_option
@options.actor_option
@options.json_option
def add(
    *,
    session_id: str | None,
    assistant_id: str | None,
    variable: str | None,
    since: str | None,
    until: str | None,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """Place a hold on the sessions that match all criteria."""
    options.check_ids([session_id] if session_id is not None else [], "session")
    options.check_ids([assistant_id] if assistant_id is not None else [], "assistant")
    _check_reason(reason)
    name, value = options.name_and_value(variable, "--variable") if variable is not None else (None, None)
    criteria = Criteria(session_id, assistant_id, name, value, *options.period(since, until))
    if criteria.is_empty:
        raise click.UsageError("specify what to hold: --session, --assistant, --variable, --since or --until")
    with connection.ready(settings.read()) as engine:
        with _changing(engine) as opened:
            hold_id = erasure.insert_hold(opened, criteria, actor or trail.actor(), reason)
        covered = _covered(engine, criteria)
    if as_json:
        output = {"hold": hold_id, "sessions": None, "turns_without_session": None}
        if covered is not None:
            output |= {"sessions": covered[0], "turns_without_session": covered[1]}
        click.echo(msgspec.json.encode(output).decode())
    else:
        click.echo(f"Hold {hold_id} is in force.{_covered_text(covered)}")
    if covered is not None and not any(covered):
        complain(
            f"hold {hold_id} covers nothing yet, only future sessions; to undo it, run"
            f" `archiver hold release {hold_id}`"
        )


def _covered(engine: Engine, criteria: Criteria) -> tuple[int, int] | None:
    """Return the number of covered sessions and unassigned turns; None if counting takes too long or is forbidden.

    Counting has its own transaction, because the one that places the hold blocks all writers.
    """
    try:
        with database.transaction(engine, statement_seconds=COUNT_SECONDS) as opened:
            return export.count(opened, Selection(criteria=[criteria]))
    except DBAPIError:
        return None


def _covered_text(covered: tuple[int, int] | None) -> str:
    if covered is None:
        return ""
    sessions, turns = covered
    apart = f" and {counted(turns, 'turn')} without a session" if turns else ""
    return f" It covers {counted(sessions, 'session')}{apart} now."


@hold.command()
@click.argument("hold_id", metavar="ID", type=click.IntRange(1, 2**63 - 1))
@options.reason_option
@options.actor_option
def release(*, hold_id: int, reason: str, actor: str | None) -> None:
    """Release a hold. Content that only this hold protected may be erased and expire from now on."""
    _check_reason(reason)
    with connection.ready(settings.read()) as engine, _changing(engine) as opened:
        erasure.release_hold(opened, hold_id, actor or trail.actor(), reason)
    click.echo(f"Hold {hold_id} is released.")


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise click.UsageError("--reason TEXT is required for the audit log")


@contextmanager
def _changing(engine: Engine) -> Iterator[Connection]:
    try:
        with database.transaction(engine) as opened:
            yield opened
    except DBAPIError as error:
        if database.sqlstate(error) != INSUFFICIENT_PRIVILEGE:
            raise
        raise settings.SettingsError(
            "this database user has no privilege to place or release holds (archiver_writer never has it).\n"
            "As the owner: GRANT archiver_auditor TO the_user;"
            " GRANT INSERT, UPDATE (released_at, released_by) ON archiver.holds TO the_user;"
            " GRANT USAGE ON SCHEMA archiver_jobs TO the_user;"
            " GRANT UPDATE ON archiver_jobs.lock_placement TO the_user;"
        ) from None


@hold.command("list")
@click.option("--all", "every", is_flag=True, help="Include released holds.")
@options.json_option
def list_(*, every: bool, as_json: bool) -> None:
    """List legal holds."""
    with connection.opened(settings.read()) as opened:
        result = [dict(row) for row in erasure.select_holds(opened, released=every)]
    if as_json:
        print_json(result)
        return
    if not result:
        click.echo("There are no holds." if every else "No hold is in force.")
        return
    table = Table("id", "placed", "author", "holds", "reason", "released")
    for row in result:
        released = f"{row['released_at']:%Y-%m-%d %H:%M} by {row['released_by']}" if row["released_at"] else ""
        placed = f"{row['placed_at']:%Y-%m-%d %H:%M}"
        table.add_row(str(row["id"]), placed, row["author"], _covers(row), row["reason"], released)
    print_table(table)


def _covers(row: dict[str, Any]) -> str:
    parts = {name: row[f"{name}_id"] for name in ("session", "assistant")}
    if row["variable"] is not None:
        lost = "(deleted with the release)" if row["has_row"] else "(any: its row is missing)"
        parts[row["variable"]] = lost if row["value"] is None else row["value"]
    parts |= {name: f"{row[name]:%Y-%m-%dT%H:%M:%SZ}" for name in ("since", "until") if row[name]}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


@click.command("acts")
@click.option("--kind", help="Only entries of this kind, such as erase.")
@click.option(
    "--since", metavar="TIME", help="Only entries at or after this time: 2024-01-15 or 2024-01-15T09:30:00Z."
)
@click.option("--limit", type=Whole(1), help="Only the newest N entries.")
@options.json_option
def acts(*, kind: str | None, since: str | None, limit: int | None, as_json: bool) -> None:
    """List the audit log, oldest first: what was done to the archive, by whom and why.

    The actor is self-reported; Postgres recorded the database user. With --json, print one JSON object per line.
    """
    first = options.moment(since, "--since")
    with connection.opened(settings.read()) as opened:
        _check_kind(opened, kind)
        result = _all_entries(opened, kind, first, limit)
        if as_json:
            for row in result:
                click.echo(msgspec.json.encode(row).decode())
            return
        table = Table()
        for name in ("id", "at", "actor", "database user", "kind", "reason", "detail"):
            table.add_column(name, overflow="fold", min_width=10 if name == "at" else None)  # a date on one line
        for row in result:
            detail = msgspec.json.encode(row["detail"]).decode()
            cells = (row["actor"], row["database_user"] or "", row["kind"], row["reason"] or "", detail)
            table.add_row(str(row["id"]), f"{row['at']:%Y-%m-%d %H:%M:%S}", *cells)
    if table.rows:
        print_table(table)
    else:
        click.echo("The audit log has no such entry." if kind or since else "The audit log is empty.")


def _check_kind(opened: Connection, kind: str | None) -> None:
    """Fail with a usage error if this version does not write the kind and no entry has it; accept None."""
    if kind is None or kind in trail.KINDS:
        return
    known = {*trail.KINDS, *trail.select_kinds(opened)}
    if kind not in known:
        names = escaped(", ".join(sorted(known)))
        raise click.BadParameter(f"unknown kind; known kinds: {names}", param_hint="--kind")


def _all_entries(
    opened: Connection, kind: str | None, since: datetime | None, limit: int | None
) -> Iterator[dict[str, Any]]:
    after = 0 if limit is None else trail.select_oldest_of_newest(opened, limit, kind=kind, since=since) - 1
    while page := trail.select_entries(opened, after=after, limit=PAGE, kind=kind, since=since):
        yield from map(dict, page)
        after = page[-1]["id"]
