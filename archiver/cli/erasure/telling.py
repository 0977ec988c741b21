"""What an erasure tells people beside its counts, on stderr."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from archiver import spool
from archiver.cli.output import counted
from archiver.erasure import Counts, Target

SHOWN = 20


def warn_of_unknown(unknown: Sequence[Target], variables: Sequence[str]) -> None:
    """Most likely these are misspelt."""
    for name in variables:
        click.echo(f"archiver: no turn has a variable {name}", err=True)
    for each in unknown[:SHOWN]:
        named = f"chat {each.chat_id}" if each.chat_id else f"session {each.session_id}"
        click.echo(f"archiver: nothing is known of {named}: what is delivered of it later is refused", err=True)
    if len(unknown) > SHOWN:
        click.echo(f"archiver: and of {len(unknown) - SHOWN:,} more", err=True)


def warn_of(unclaimed: Sequence[str]) -> None:
    """Of sessions in which words may stand that nobody can tell apart."""
    for session_id in unclaimed[:SHOWN]:
        click.echo(
            f"archiver: no webhook told what a turn named here said, and session {session_id} holds words of history"
            " that no turn claims: they may be its words, and stay; erase the whole session to be sure",
            err=True,
        )
    if len(unclaimed) > SHOWN:
        click.echo(f"archiver: and {len(unclaimed) - SHOWN:,} more sessions", err=True)


def warn_of_kept(kept: int) -> None:
    """How many rows of the quarantine stay."""
    if kept:
        stay = counted(kept, "row of the quarantine stays", "rows of the quarantine stay")
        click.echo(
            f"archiver: {stay}, for what a legal hold covers may be in it: erase again once that is released",
            err=True,
        )


def warn_of_unsearchable(count: int) -> None:
    """How many rows of the quarantine may be about it, or not: their bytes cannot be decoded."""
    if count:
        bodies = counted(count, "quarantined body", "quarantined bodies")
        click.echo(
            f"archiver: {bodies} could not be searched, because their bytes cannot be decoded: list them with"
            " archiver quarantine list --unsearchable, look at each with archiver quarantine show ID",
            err=True,
        )


def warn_of_resent(resent: Sequence[Target]) -> None:
    """Name the turns whose deliveries repeat what is erased, with the command that erases them."""
    if not resent:
        return
    repeat = counted(len(resent), "other turn repeats", "other turns repeat")
    click.echo(
        f"archiver: {repeat} what an erased turn said: their deliveries stay in the ledger as they were received."
        " To erase them as well:",
        err=True,
    )
    for each in resent[:SHOWN]:
        named = f"--chat {shlex.quote(each.chat_id)}" if each.chat_id else f"--session {shlex.quote(each.session_id)}"
        click.echo(f"  archiver erase {named}", err=True)
    if len(resent) > SHOWN:
        click.echo(f"archiver: and {len(resent) - SHOWN:,} more; --json lists all", err=True)


def warn_of_spool(folder: Path) -> None:
    """What an erasure does not reach."""
    try:
        waiting = spool.select_depth(folder).events
    except spool.SpoolError as error:
        click.echo(f"archiver: what waits on the spool is not known: {error}", err=True)
    else:
        if waiting:
            wait = counted(waiting, "delivery waits", "deliveries wait")
            click.echo(
                f"archiver: {wait} on the spool in {folder}: what was erased stays there until serve has drained it,"
                " and is refused then",
                err=True,
            )
    for each in spool.set_aside_files(folder):
        click.echo(
            f"archiver: {each} is damaged and may hold what was erased: look at it, then remove it by hand", err=True
        )


def told(counts: Counts) -> str:
    """In one line."""
    each = [counted(getattr(counts, f"{noun}s"), noun) for noun in ("session", "turn", "message", "event")]
    return ", ".join([*each, f"{counts.quarantined:,} quarantined"])


def tell_refusal(ordered: int, *, dry_run: bool) -> None:
    """`ordered`: how many were, before a hold stopped the rest."""
    advice = "release the hold, or say --skip-held to erase the rest"
    if ordered:
        click.echo(
            f"archiver: {counted(ordered, 'session or turn', 'sessions and turns')} had been ordered to be erased"
            " when the hold was placed: they go, unless it covers them too, with the next archiver erase or by a"
            f" worker within the hour. Of the rest nothing was erased; {advice}",
            err=True,
        )
    else:
        click.echo(f"archiver: nothing {'would be' if dry_run else 'was'} erased; {advice}", err=True)


def tell_held(held: Mapping[Target, Sequence[int]]) -> None:
    """By which holds."""
    for target, holds in list(held.items())[:SHOWN]:
        turn = f" chat {target.chat_id}" if target.chat_id else ""
        numbers = ", ".join(str(each) for each in holds)
        session = f"session {target.session_id}" if target.session_id else "without a session,"
        click.echo(f"archiver: {session}{turn} is under legal hold {numbers}; see archiver hold list", err=True)
    if len(held) > SHOWN:
        click.echo(f"archiver: and {len(held) - SHOWN:,} more", err=True)
