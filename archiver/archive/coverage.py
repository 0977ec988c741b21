"""Compute how complete a session is, and when to read its history next. Pure.

`rows.upsert_sessions` applies the rule of `Timing.due_after` in SQL, because it does not read the session.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import Literal, Self, get_args

import msgspec

from archiver.archive.transcript import TranscriptLine
from archiver.archive.transcript.candidates import PROMPTS
from archiver.archive.transcript.shapes import USER
from archiver.archive.transcript.wording import normal_role
from archiver.archive.turns import Turn
from archiver.events import responses
from archiver.events.responses import SessionSnapshot
from archiver.settings import Settings

State = Literal["open", "complete", "repaired", "ambiguous", "unverified", "lost"]
STATES: tuple[State, ...] = get_args(State)


class Timing(msgspec.Struct, frozen=True, dict=True):
    """Times of readings. `quiet`: the wait after an event; `lifetime`: how long upstream retains a session."""

    quiet: timedelta = timedelta(seconds=300)
    lifetime: timedelta = timedelta(seconds=86_400)

    @classmethod
    def of(cls, configuration: Settings) -> Self:
        """Return the times defined by the settings."""
        return cls(
            quiet=timedelta(seconds=configuration.reconcile_after),
            lifetime=timedelta(seconds=configuration.session_lifetime),
        )

    @cached_property
    def margin(self) -> timedelta:
        """Return how long before its expiry a session is read for the last time."""
        return min(max(self.lifetime / 24, 2 * self.quiet), self.lifetime / 2)

    @cached_property
    def wait(self) -> timedelta:
        """Return the wait after an event: the quiet time, or less if sessions expire sooner."""
        return min(self.quiet, self.margin / 2)

    def read_by(self, opened_at: datetime) -> datetime:
        """Return the deadline for the last reading of a session."""
        return opened_at + self.lifetime - self.margin

    def due_after(self, last_event_at: datetime, read_by: datetime) -> datetime:
        """Return when to read a session after an event: after a quiet time, or just before it expires upstream."""
        return min(last_event_at + self.wait, max(read_by + self.margin - self.wait, last_event_at))


DEFAULT_TIMING = Timing()


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One distinct history response: kind, first and last time, and count."""

    kind: str
    first_at: datetime
    last_at: datetime
    count: int
    snapshot: SessionSnapshot
    # If set, it showed only this number of the first messages of the next reading that has messages. `snapshot` omits
    # them, so that all readings of a growing history together cost as much as the last one.
    shown: int | None = None


class Coverage(msgspec.Struct, frozen=True, gc=False):
    """A session's row in `analytics.coverage`."""

    state: State
    reason: str
    reconciled_at: datetime | None
    read_at: datetime | None
    repaired_messages: int


OPEN: State = "open"

# Why a session is in its state; docs/data-model.md explains each reason.
NEVER_READ = "awaiting_history"
EVENTS_AFTER_READING = "events_after_reading"
AGREED = "agreed"
REPAIRED = "history_supplied_messages"
AMBIGUOUS = "several_places_fit"
REWORDED = "worded_differently"
PARTIAL = "turns_not_in_history"
DIFFERS = "texts_not_in_history"
PAGE = "history_partial"
UNSEEN = "content_never_seen"
ERASED = "erased"
_UNREAD = {
    responses.GONE: "history_gone",
    responses.UNREADABLE: "history_unreadable",
    responses.UNAVAILABLE: "history_unavailable",
    responses.READ: "history_empty",
}
NOT_SHOWN = tuple(reason for kind, reason in _UNREAD.items() if kind != responses.READ)

_RETRIED_KINDS = {responses.GONE, responses.UNREADABLE}


def coverage_of(
    turns: Mapping[str, Turn],
    found: int,
    readings: Sequence[Reading],
    lines: Sequence[TranscriptLine],
    last_event_at: datetime,
    *,
    is_erased: bool = False,
) -> Coverage:
    """Return the coverage of a session from its turns, readings and transcript.

    `found`: the number of turns that are known only from history.
    """
    repaired = _repaired(lines)
    if is_erased:
        read_at = readings[-1].last_at if readings else None
        revision_times = max((each.last_at for each in readings if each.kind == responses.READ), default=None)
        return Coverage("unverified", ERASED, revision_times, read_at, repaired)
    if not readings:
        return Coverage("open", NEVER_READ, None, None, 0)
    newest = readings[-1]
    result = [reading.last_at for reading in readings if reading.kind == responses.READ]
    state, reason = _state(turns, readings, lines, last_event_at, repaired)
    # A turn without delivered content may be one of those known only from history.
    if reason != EVENTS_AFTER_READING and sum(not turn.has_content for turn in turns.values()) > found:
        state, reason = "lost", UNSEEN
    if state in {"complete", "repaired", "ambiguous"} and _is_partial(readings):
        state, reason = "unverified", PAGE
    return Coverage(state, reason, max(result, default=None), newest.last_at, repaired)


def _state(
    turns: Mapping[str, Turn],
    readings: Sequence[Reading],
    lines: Sequence[TranscriptLine],
    last_event_at: datetime,
    repaired: int,
) -> tuple[State, str]:
    newest = readings[-1]
    if last_event_at > newest.last_at:
        return "open", EVENTS_AFTER_READING
    snapshots = any(line.first_read_at is not None for line in lines)
    has_no_messages = newest.kind == responses.READ and not newest.snapshot.messages
    unconfirmed = _unconfirmed(turns, lines)
    if unconfirmed:
        is_partial = newest.kind == responses.READ and not has_no_messages
        return "unverified", unconfirmed if is_partial else _UNREAD[newest.kind]
    has_failed = newest.kind != responses.READ or (has_no_messages and not newest.shown)
    if has_failed and (not snapshots or _has_later_turn(turns, readings)):
        return "unverified", _UNREAD[newest.kind]
    if any(line.is_ambiguous for line in lines):
        return "ambiguous", AMBIGUOUS
    if any(line.is_reworded for line in lines):
        return "repaired" if repaired else "complete", REWORDED
    return ("repaired", REPAIRED) if repaired else ("complete", AGREED)


def _has_later_turn(turns: Mapping[str, Turn], readings: Sequence[Reading]) -> bool:
    """Return whether a turn began and arrived after the last history with messages, which thus cannot show it.

    Nevertheless it may seem confirmed, because its texts are blank or those of another turn in that history.
    """
    shown = [each for each in readings if each.kind == responses.READ and (each.snapshot.messages or each.shown)]
    return bool(shown) and any(
        min(turn.began_at, turn.first_received_at) > shown[-1].last_at
        for turn in turns.values()
        if turn.deleted_at is None or not turn.has_content
    )


def _is_partial(readings: Sequence[Reading]) -> bool:
    """Return whether the newest history says that it does not show all messages."""
    newest = next((each for each in reversed(readings) if each.kind == responses.READ), None)
    return newest is not None and newest.snapshot.is_partial


def _unconfirmed(turns: Mapping[str, Turn], lines: Sequence[TranscriptLine]) -> str | None:
    """Return why history does not confirm all delivered content; None if it does.

    Each text counts, because a turn may be in the history with other words. Deleted turns need no confirmation, nor
    do the prompts that an application sends to its assistant.
    """
    texts = [
        line
        for line in lines
        if line.chat_id is not None
        and line.content.strip()
        and normal_role(line.role) not in PROMPTS
        and turns[line.chat_id].deleted_at is None
    ]
    confirmed = {line.chat_id for line in texts if line.first_read_at is not None}
    unconfirmed = {line.chat_id for line in texts if line.first_read_at is None}
    if unconfirmed - confirmed:
        return PARTIAL
    return DIFFERS if unconfirmed else None


def _repaired(lines: Sequence[TranscriptLine]) -> int:
    """Return the number of messages that history supplied.

    Those before the first turn are not counted, because they have no webhook.
    """
    first = next(
        (n for n, line in enumerate(lines) if line.chat_id is not None or normal_role(line.role) == USER), len(lines)
    )
    return sum(line.source == "history" for line in lines[first:])


def next_reading(
    timing: Timing, opened_at: datetime, last_event_at: datetime, readings: Sequence[Reading]
) -> datetime | None:
    """Return the time of the next reading of the history; None if there will be none.

    The first reading after an event follows a quiet time. Each further wait is as long as the content has been
    unchanged, at least two quiet times. A final reading precedes the expiry upstream. If the session was not quiet
    then, another reading follows a quiet time; if the history was gone or unreadable, it is read again until the
    expiry.
    """
    read_by = timing.read_by(opened_at)
    if not readings or last_event_at > readings[-1].last_at:
        return timing.due_after(last_event_at, read_by)
    newest = readings[-1]
    if newest.kind == responses.UNAVAILABLE:
        return None
    if newest.last_at < read_by:
        return min(newest.last_at + max(2 * timing.quiet, _unchanged(readings)), read_by)
    quiet_at, again = timing.due_after(last_event_at, read_by), newest.last_at + timing.wait
    if newest.last_at < quiet_at:
        return quiet_at
    return again if newest.kind in _RETRIED_KINDS and again < read_by + timing.margin else None


def _unchanged(readings: Sequence[Reading]) -> timedelta:
    """Return how long the content has been unchanged; responses of one kind without messages count as equal."""
    newest = readings[-1]
    others = (each for each in reversed(readings[:-1]) if each.kind != newest.kind or newest.kind == responses.READ)
    other = next(others, None)
    alike = [each for each in readings if each.kind == newest.kind] if newest.kind != responses.READ else [newest]
    since = min(each.first_at for each in alike)
    return newest.last_at - (since if other is None else max(since, other.last_at))
