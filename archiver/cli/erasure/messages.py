"""Messages and the report of an erasure."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from archiver.cli import complain, escaped
from archiver.cli.output import counted, print_json
from archiver.compliance.erasure import Counts, Target
from archiver.compliance.erasure.requests import Preview, Report
from archiver.inbound import spool

MAX_SHOWN = 20


def warn_of(preview: Preview) -> None:
    """Warn about content that the erasure would leave, and about targets that are probably misspelt."""
    _warn_of_unknown(preview.unknown, preview.unknown_variables)
    _warn_of_unclaimed_text(preview.unclaimed)
    _warn_of_held_quarantine(preview.quarantine_rows_held)
    _warn_of_unsearchable(preview.counts.unsearchable)
    _warn_of_repeated_content(preview.repeating)


def _warn_of_unknown(unknown: Sequence[Target], variables: Sequence[str]) -> None:
    """Warn about targets that are unknown and probably misspelt."""
    for name in variables:
        complain(f"no turn has a variable {escaped(name)}")
    for each in unknown[:MAX_SHOWN]:
        target = f"chat {each.chat_id}" if each.chat_id else f"session {each.session_id}"
        complain(f"{escaped(target)} is unknown; later deliveries for it will be refused")
    if len(unknown) > MAX_SHOWN:
        complain(f"and {len(unknown) - MAX_SHOWN:,} more are unknown")


def _warn_of_unclaimed_text(unclaimed: Sequence[str]) -> None:
    """Warn about sessions that may contain text of an erased turn in unclaimed history messages."""
    for session_id in unclaimed[:MAX_SHOWN]:
        complain(
            f"no webhook delivered the text of a selected turn, and session {escaped(session_id)} has history"
            " messages that belong to no known turn; they may be its text and are kept. To erase them too, erase the"
            " whole session"
        )
    if len(unclaimed) > MAX_SHOWN:
        complain(f"and {len(unclaimed) - MAX_SHOWN:,} more sessions")


def _warn_of_held_quarantine(count: int) -> None:
    """Report how many quarantine rows are kept because of a hold."""
    if count:
        stay = counted(count, "quarantined delivery is kept", "quarantined deliveries are kept")
        complain(f"{stay}: a legal hold may cover content in them; erase again after the hold is released")


def _warn_of_unsearchable(count: int) -> None:
    """Report how many quarantine rows could not be searched because they cannot be decoded."""
    if count:
        bodies = counted(count, "quarantined body", "quarantined bodies")
        complain(
            f"{bodies} cannot be decoded and were not searched; list them with `archiver quarantine list"
            " --unsearchable` and inspect each with `archiver quarantine show ID`"
        )


def _warn_of_repeated_content(repeating: Sequence[Target]) -> None:
    """List turns whose deliveries repeat erased content, with the command that erases them."""
    if not repeating:
        return
    repeat = counted(len(repeating), "other turn repeats", "other turns repeat")
    complain(
        f"{repeat} content of an erased turn, and their deliveries stay in the ledger as received. To erase them too:"
    )
    for each in repeating[:MAX_SHOWN]:
        options = (
            f"--chat {shlex.quote(each.chat_id)}" if each.chat_id else f"--session {shlex.quote(each.session_id)}"
        )
        click.echo(f"  archiver erase {escaped(options)}", err=True)
    if len(repeating) > MAX_SHOWN:
        complain(f"and {len(repeating) - MAX_SHOWN:,} more; --json lists all")


def warn_of_spool(folder: Path) -> None:
    """Warn about spooled deliveries and damaged spool files, which an erasure does not reach."""
    try:
        waiting = spool.select_depth(folder).events
    except spool.SpoolError as error:
        complain(f"cannot read the spool: {error}")
    else:
        if waiting:
            wait = counted(waiting, "delivery waits", "deliveries wait")
            complain(
                f"{wait} in the spool {folder}: erased content stays there until serve drains it, and is then refused"
            )
    for each in spool.set_aside_files(folder):
        complain(f"{each} is damaged and may contain erased content; inspect it, then delete it")


def describe_counts(counts: Counts) -> str:
    """Describe the counts in one line."""
    each = [counted(getattr(counts, f"{noun}s"), noun) for noun in ("session", "turn", "message", "event")]
    return ", ".join([*each, f"{counts.quarantined:,} quarantined"])


def print_report(report: Report, *, dry_run: bool, as_json: bool) -> None:
    """Print the counts of an erasure on stdout, and list the held targets on stderr."""
    if as_json:
        output: dict[str, Any] = {"dry_run": dry_run, "act": report.act_id, **msgspec.structs.asdict(report.counts)}
        output["held"] = [msgspec.structs.asdict(target) | {"holds": holds} for target, holds in report.held.items()]
        if report.repeating:
            turns = [msgspec.structs.asdict(each) for each in report.repeating]
            output["resent"] = {"count": len(turns), "turns": turns}
        print_json(output)
    else:
        click.echo(f"{'Would erase' if dry_run else 'Erased'} {describe_counts(report.counts)}.")
    if report.held:
        print_held(report.held)


def print_refusal(ordered: int, *, dry_run: bool) -> None:
    """Explain that holds stopped the erasure. `ordered`: number of targets ordered before the hold."""
    advice = "release the hold, or pass --skip-held to erase the rest"
    if ordered:
        complain(
            f"the erasure of {counted(ordered, 'session or turn', 'sessions and turns')} was ordered before the hold"
            " was placed. Unless the hold covers them, they are erased by the next `archiver erase` or by a worker"
            f" within the hour. Nothing else was erased; {advice}"
        )
    else:
        complain(f"nothing {'would be' if dry_run else 'was'} erased; {advice}")


def print_held(held: Mapping[Target, Sequence[int]]) -> None:
    """List the held targets with their holds."""
    for target, holds in list(held.items())[:MAX_SHOWN]:
        turn = f" chat {target.chat_id}" if target.chat_id else ""
        numbers = ", ".join(str(each) for each in holds)
        session = f"session {target.session_id}" if target.session_id else "without a session,"
        complain(f"{escaped(session + turn)} is under legal hold {numbers}; see `archiver hold list`")
    if len(held) > MAX_SHOWN:
        complain(f"and {len(held) - MAX_SHOWN:,} more")
