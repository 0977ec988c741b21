"""`archiver status` and `archiver doctor`."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, settings
from archiver.archive import search
from archiver.cli import complain, connection, escaped, options
from archiver.cli.output import Table, console, print_json
from archiver.database import lock_waits, schema
from archiver.embedded import EmbeddedError
from archiver.errors import sentence
from archiver.inbound import spool
from archiver.operations import heartbeats, overview
from archiver.operations.doctor import (
    Finding,
    examine_database,
    examine_platform,
    examine_settings,
    examine_spool,
)
from archiver.operations.heartbeats import Worker
from archiver.outbound import feed
from archiver.outbound.followups.review import (
    FollowupStats,
    may_select_stats,
    name_failing,
    select_failing,
    select_stats,
)


@click.command()
@options.json_option
def status(as_json: bool) -> None:
    """Show on one screen what the archive contains and what needs attention."""
    configuration = settings.read()
    spooled = spool.select_depth(configuration.home / spool.SPOOL_FOLDER)
    lost = spool.select_lost(configuration.home / spool.SPOOL_FOLDER)
    try:
        with connection.engine(configuration, create=False) as engine:
            with database.transaction(engine, statement_seconds=300) as opened:
                schema.check(opened)
                where = connection.where(configuration, opened)
                figures = overview.select_overview(opened)
                silence = overview.select_silence(opened)
                extent, waiting = feed.select_extent(opened), feed.select_backlog(opened)
                lag = search.select_lag(opened) if search.may_select(opened) else None
                workers = heartbeats.select_workers(opened) if heartbeats.may_select(opened) else None
                may_see = may_select_stats(opened)
                stats, failing = (select_stats(opened), select_failing(opened)) if may_see else (None, [])
            holders = lock_waits.find_holders(engine)
    except SQLAlchemyError:
        if spooled.events:
            size = f"{spooled.bytes / 1_000_000:,.1f} MB"
            complain(f"{spooled.events:,} events ({size}) are waiting in the spool")
        raise
    if as_json:
        output = {"database": where} | msgspec.structs.asdict(figures) | {"spool": spooled}
        output |= {"spool_lost": lost, "webhooks": silence}
        output |= {"feed": {"newest": extent.newest, "waiting": waiting}, "followups": _followups(stats, failing)}
        output |= {
            "search": lag,
            "locks": holders,
            "workers": None if workers is None else [_worker(each) for each in workers],
        }
        print_json(output)
        return
    click.echo(f"{'database':12}{escaped(where)}")  # apart from the table, whose columns it would widen
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("sessions", f"{figures.sessions:,}", _counts(figures.coverage))
    table.add_row("chats", f"{figures.chats:,}", f"{figures.deleted_chats:,} deleted")
    table.add_row("messages", f"{figures.messages:,}")
    table.add_row("events", f"{figures.events:,}", f"{figures.deliveries:,} deliveries")
    table.add_row("last event", _moment(figures.last_event_at), _silence(silence))
    table.add_row("quarantine", f"{figures.quarantine:,}", _counts(figures.quarantine_reasons))
    table.add_row("spool", f"{spooled.events:,}", _spooled(spooled, lost, configuration.home / spool.SPOOL_FOLDER))
    sealed = f"latest {_moment(figures.sealed_at)}, " if figures.seals else ""
    table.add_row("seals", f"{figures.seals:,}", f"{sealed}{figures.unsealed:,} events not yet sealed")
    unpublished = f"since {_moment(waiting.since)} {waiting.transactions:,} transactions not yet published"
    table.add_row("changes", f"{extent.newest:,}", unpublished if waiting.transactions else "")
    _add_search(table, lag)
    _add_followups(table, stats, failing)
    _add_workers(table, workers)
    table.add_row("on disk", f"{sum(figures.sizes.values()) / 1_000_000:,.1f} MB")
    console().print(table)
    _print_advice(holders, waiting, is_quarantined=figures.quarantine > 0)


def _print_advice(holders: Sequence[object], waiting: feed.Backlog, *, is_quarantined: bool) -> None:
    for each in holders:
        click.echo(f"Lock wait: {escaped(each)}.")
    if is_quarantined:
        click.echo("Inspect quarantined deliveries: archiver quarantine list")
    if waiting.is_overdue(datetime.now(UTC)):
        click.echo(f"No worker publishes changes: {feed.ADVICE}")


def _worker(worker: Worker) -> dict[str, Any]:
    return msgspec.structs.asdict(worker) | {"is_running": worker.is_fresh}


def _add_workers(table: Table, workers: Sequence[Worker] | None) -> None:
    if workers is None:
        table.add_row("workers", "", "not visible to this database user")
        return
    running = [each for each in workers if each.is_fresh]
    faulty = [(each, name, report) for each in running for name, report in each.faulty.items()]
    table.add_row("workers", f"{len(running):,}", "all duties work" if running and not faulty else "")
    for each, name, report in faulty:
        text = f"{name} {report.state} on {each.host} since {_moment(report.since)}: {report.reason}"
        table.add_row("", "", text)


def _silence(silence: overview.Silence) -> str:
    if not silence.has_webhooks:
        since = f", but {silence.turns:,} turns since {_moment(silence.read_since)}" if silence.turns else ""
        return f"no webhook stored yet{since}: see `archiver doctor`"
    if not silence.is_certain:
        return ""
    return f"no webhook of a turn since {_moment(silence.since)}, but {silence.turns:,} turns: see `archiver doctor`"


def _spooled(spooled: spool.Depth, lost: spool.Lost, folder: Path) -> str:
    parts = [f"since {_moment(spooled.oldest_at)}"] if spooled.events else []
    if lost.events:
        parts.append(f"{lost.events:,} lost since {_moment(lost.since)}: see `archiver doctor`")
    if foreign := spool.select_foreign(folder):
        parts.append(f"{len(foreign):,} files of another user, or without access: see `archiver doctor`")
    return "; ".join(parts)


def _add_search(table: Table, lag: search.Lag | None) -> None:
    if lag is None:
        table.add_row("search", "", "not visible to this database user")
    elif lag.language is None:
        table.add_row("search", "off")
    else:
        parts = [f"changes since {_moment(lag.since)} not yet indexed"] if lag.since else []
        parts += ["earlier turns not yet indexed"] if lag.has_backlog else []
        table.add_row("search", "on", "; ".join(parts))


def _add_followups(table: Table, stats: FollowupStats | None, failing: Sequence[Mapping[str, Any]]) -> None:
    if stats is None:
        table.add_row("follow-ups", "", "not visible to this database user")
    else:
        table.add_row("follow-ups", f"{stats.pending:,}", _followup_stats(stats))
    if failing:
        table.add_row("", "", f"failing: {name_failing(failing)}")


def _followup_stats(stats: FollowupStats) -> str:
    text = f"pending, {stats.dead:,} dead; {stats.subscriptions:,} subscriptions"
    text += f", {stats.paused:,} paused" if stats.paused else ""
    text += f", {stats.failing:,} failing" if stats.failing else ""
    return text + (f", {stats.behind:,} changes behind" if stats.behind else "")


def _followups(stats: FollowupStats | None, failing: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if stats is None:
        return None
    names = ("id", "failures", "failing_since", "open_until", "closed_until", "last_status", "last_fault")
    output = [{name: row[name] for name in names} for row in failing]
    return msgspec.structs.asdict(stats) | {"failing_subscriptions": output}


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _moment(moment: datetime | None) -> str:
    if moment is None:
        return "never"
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


@click.command()
@options.json_option
def doctor(as_json: bool) -> None:
    """Check settings, spool, database, roles, schema and clock, and print remedies. Exit 1 if action is required."""
    from archiver.console.openid.checks import examine_provider  # noqa: PLC0415  # the console imports all else

    try:
        configuration = settings.read()
    except settings.SettingsError as error:
        findings = [Finding("settings", "failure", "A setting is invalid.", sentence(error))]
    else:
        findings = [
            *examine_settings(configuration),
            *examine_spool(configuration),
            examine_platform(configuration),
            *examine_provider(configuration),
            *_examine_database(configuration),
        ]
    if as_json:
        print_json(findings)
    else:
        _print(findings)
    failures = [finding.check for finding in findings if finding.verdict == "failure"]
    if failures:
        complain(f"action required: {', '.join(failures)}")
    if not as_json:
        _print_psql(findings)
    if failures:
        sys.exit(1)


def _examine_database(configuration: settings.Settings) -> list[Finding]:
    try:
        if configuration.database_url is not None:
            with connection.engine(configuration) as engine:
                return list(examine_database(configuration, engine))
        with (
            connection.running(configuration) as postgres,
            connection.engine_at(configuration, postgres.url) as engine,
        ):
            place = f"the one embedded in {configuration.home.resolve()}"
            psql = Finding("psql", "ok", postgres.psql_command())
            return [*examine_database(configuration, engine, place), psql]
    except (settings.SettingsError, EmbeddedError) as error:
        return [Finding("database", "failure", "No database is configured or running.", sentence(error))]


def _print(findings: list[Finding]) -> None:
    styles = {"ok": "green", "warning": "yellow", "failure": "red"}
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        if finding.check == "psql":
            continue
        detail = Text(escaped(finding.detail, keep="\n"))
        table.add_row(Text(finding.verdict, styles[finding.verdict]), finding.check, detail)
        if finding.advice:
            advice = escaped(finding.advice, keep="\n")
            table.add_row("", "", Text(f"-> {advice}", "bold"))
    console().print(table)


def _print_psql(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.check == "psql":  # on one line, for pasting
            click.echo(f"\nTo query the embedded database while `archiver serve` runs:\n{finding.detail}")
