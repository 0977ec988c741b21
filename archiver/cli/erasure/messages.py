"""Messages and the report of an erasure."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from archiver.cli import complain
from archiver.cli.output import counted, print_json
from archiver.compliance.erasure import Counts, Target
from archiver.compliance.erasure.requests import Preview, Report
from archiver.inbound import spool

MAX_SHOWN = 20


def warn_of(preview: Preview) -> None:
    """Warn of what the erasure would leave, and of targets that are probably misspelt."""
    _warn_of_unknown(preview.unknown, preview.unknown_variables)
    _warn_of_unclaimed_words(preview.unclaimed)
    _warn_of_held_quarantine(preview.quarantine_rows_held)
    _warn_of_unsearchable(preview.counts.unsearchable)
    _warn_of_repeated_content(preview.repeating)


def _warn_of_unknown(unknown: Sequence[Target], variables: Sequence[str]) -> None:
    """Warn of targets that are unknown and probably misspelt."""
    for name in variables:
        complain(f"no turn has a variable {name}")
    for each in unknown[:MAX_SHOWN]:
        target = f"chat {each.chat_id}" if each.chat_id else f"session {each.session_id}"
        complain(f"nothing is known of {target}: what is delivered of it later is refused")
    if len(unknown) > MAX_SHOWN:
        complain(f"and of {len(unknown) - MAX_SHOWN:,} more")


def _warn_of_unclaimed_words(unclaimed: Sequence[str]) -> None:
    """Warn of sessions that may hold text of an erased turn in unclaimed history messages."""
    for session_id in unclaimed[:MAX_SHOWN]:
        complain(
            f"no webhook delivered the text of a selected turn; session {session_id} has history messages"
            " that no turn claims: they may be its words, and stay; erase the whole session to be sure"
        )
    if len(unclaimed) > MAX_SHOWN:
        complain(f"and {len(unclaimed) - MAX_SHOWN:,} more sessions")


def _warn_of_held_quarantine(count: int) -> None:
    """Report how many quarantine rows a hold keeps."""
    if count:
        stay = counted(count, "row of the quarantine stays", "rows of the quarantine stay")
        complain(f"{stay}, for what a legal hold covers may be in it: erase again once that is released")


def _warn_of_unsearchable(count: int) -> None:
    """Report how many quarantine rows could not be searched because they cannot be decoded."""
    if count:
        bodies = counted(count, "quarantined body", "quarantined bodies")
        complain(
            f"{bodies} could not be searched, because their bytes cannot be decoded: list them with"
            " archiver quarantine list --unsearchable, look at each with archiver quarantine show ID"
        )


def _warn_of_repeated_content(repeating: Sequence[Target]) -> None:
    """List turns whose deliveries repeat erased content, with the command that erases them."""
    if not repeating:
        return
    repeat = counted(len(repeating), "other turn repeats", "other turns repeat")
    complain(
        f"{repeat} what an erased turn said: their deliveries stay in the ledger as they were received."
        " To erase them as well:"
    )
    for each in repeating[:MAX_SHOWN]:
        options = (
            f"--chat {shlex.quote(each.chat_id)}" if each.chat_id else f"--session {shlex.quote(each.session_id)}"
        )
        click.echo(f"  archiver erase {options}", err=True)
    if len(repeating) > MAX_SHOWN:
        complain(f"and {len(repeating) - MAX_SHOWN:,} more; --json lists all")


def warn_of_spool(folder: Path) -> None:
    """Report spooled deliveries, which an erasure does not reach."""
    try:
        waiting = spool.select_depth(folder).events
    except spool.SpoolError as error:
        complain(f"what waits on the spool is not known: {error}")
    else:
        if waiting:
            wait = counted(waiting, "delivery waits", "deliveries wait")
            complain(
                f"{wait} on the spool in {folder}: what was erased stays there until serve has drained it,"
                " and is refused then"
            )
    for each in spool.set_aside_files(folder):
        complain(f"{each} is damaged and may hold what was erased: look at it, then remove it by hand")


def describe_counts(counts: Counts) -> str:
    """Return the counts as one line."""
    each = [counted(getattr(counts, f"{noun}s"), noun) for noun in ("session", "turn", "message", "event")]
    return ", ".join([*each, f"{counts.quarantined:,} quarantined"])


def print_report(report: Report, *, dry_run: bool, as_json: bool) -> None:
    """Print what was erased on stdout, and list the held targets."""
    if as_json:
        output: dict[str, Any] = {"dry_run": dry_run, "act": report.act_id, **msgspec.structs.asdict(report.counts)}
        output["held"] = [msgspec.structs.asdict(target) | {"holds": holds} for target, holds in report.held.items()]
        if report.repeating:
            turns = [msgspec.structs.asdict(each) for each in report.repeating]
            output["resent"] = {"count": len(turns), "turns": turns}
        print_json(output)
    else:
        click.echo(f"{'It would erase' if dry_run else 'Erased'} {describe_counts(report.counts)}.")
    if report.held:
        print_held(report.held)


def print_refusal(ordered: int, *, dry_run: bool) -> None:
    """Explain that holds stopped the erasure. `ordered`: targets ordered before the hold."""
    advice = "release the hold, or say --skip-held to erase the rest"
    if ordered:
        complain(
            f"{counted(ordered, 'session or turn', 'sessions and turns')} had been ordered to be erased"
            " when the hold was placed: they go, unless it covers them too, with the next archiver erase or by a"
            f" worker within the hour. Of the rest nothing was erased; {advice}"
        )
    else:
        complain(f"nothing {'would be' if dry_run else 'was'} erased; {advice}")


def print_held(held: Mapping[Target, Sequence[int]]) -> None:
    """List the held targets with their holds."""
    for target, holds in list(held.items())[:MAX_SHOWN]:
        turn = f" chat {target.chat_id}" if target.chat_id else ""
        numbers = ", ".join(str(each) for each in holds)
        session = f"session {target.session_id}" if target.session_id else "without a session,"
        complain(f"{session}{turn} is under legal hold {numbers}; see archiver hold list")
    if len(held) > MAX_SHOWN:
        complain(f"and {len(held) - MAX_SHOWN:,} more")
