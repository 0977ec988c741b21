"""When a history is read next, and what a session's coverage is: pure, from readings and times alone."""

from datetime import UTC, datetime, timedelta

import pytest

from archiver import events
from archiver.archive.coverage import Reading, Timing, next_reading
from archiver.archive.sessions import SessionFacts, derive
from archiver.archive.turns import Fact, Turn, fold
from archiver.events import Message, responses
from archiver.events.responses import EMPTY_SNAPSHOT, SessionSnapshot
from archiver.history import MAX_RETRY, MIN_RETRY, retry_pause
from tests.support.payloads import created, deleted

OPENED = datetime(2026, 1, 5, tzinfo=UTC)
TIMING = Timing(quiet=timedelta(minutes=5), lifetime=timedelta(hours=24))  # so the last hour is the margin


def at(minutes: float) -> datetime:
    return OPENED + timedelta(minutes=minutes)


def reading(first: float, last: float | None = None, kind: str = responses.READ, count: int = 1) -> Reading:
    return Reading(kind, at(first), at(first if last is None else last), count, EMPTY_SNAPSHOT)


def due(last_event: float, *readings: Reading, timing: Timing = TIMING) -> float | None:
    """In minutes after the opening."""
    moment = next_reading(timing, OPENED, at(last_event), readings)
    return None if moment is None else (moment - OPENED) / timedelta(minutes=1)


LAST = 23 * 60
END = 24 * 60


@pytest.mark.parametrize(
    ("last_event", "then"),
    [
        (0, 5),
        (100, 105),
        (LAST - 1, LAST + 4),
        (LAST + 30, LAST + 35),
        (END - 6, END - 5),  # no later than a quiet time before the end
        (END - 2, END - 2),
        (END + 60, END + 60),
    ],
)
def test_after_an_event_a_quiet_time_goes_by_unless_upstream_is_about_to_forget(
    last_event: float, then: float
) -> None:
    assert due(last_event) == then
    assert due(last_event, reading(-10)) == then


def test_it_backs_off_for_as_long_again_as_nothing_changes() -> None:
    times, last = [], 5.0
    for _ in range(9):
        then = due(0, reading(5, last))
        assert then is not None
        times.append(then - last)
        last = then
    assert times == [10, 10, 20, 40, 80, 160, 320, 640, LAST - 1285]
    assert last == LAST
    assert due(0, reading(5, last)) is None


def test_new_events_and_changes_restart_the_schedule() -> None:
    assert due(200, reading(5, 165)) == 205
    # What was told once before is told again: unchanged since the other answer.
    assert due(0, reading(60, 60), reading(5, 100)) == 140
    assert due(0, reading(5, 95), reading(100)) == 110


def test_responses_without_messages_are_equal_regardless_of_their_bytes() -> None:
    garbage = [reading(5, 5, responses.UNREADABLE), reading(15, 15, responses.UNREADABLE)]
    assert due(0, *garbage) == 25
    assert due(0, *garbage, reading(85, 85, responses.UNREADABLE)) == 165


@pytest.mark.parametrize(
    ("kind", "then"), [(responses.READ, None), (responses.GONE, LAST + 7), (responses.UNREADABLE, LAST + 7)]
)
def test_the_last_reading_ends_the_schedule_unless_it_had_no_messages(kind: str, then: float | None) -> None:
    assert due(0, reading(LAST + 2, kind=kind)) == then
    assert due(0, reading(END - 1, kind=kind)) is None


def test_a_last_reading_in_the_midst_of_a_talk_is_not_the_last() -> None:
    assert due(LAST + 10, reading(LAST + 12)) == LAST + 15
    assert due(LAST + 10, reading(LAST + 15)) is None


def test_what_was_never_answered_is_never_asked_for_again() -> None:
    assert due(0, reading(10, kind=responses.UNAVAILABLE)) is None


def test_sessions_that_live_shortly_are_read_before_they_are_forgotten() -> None:
    short = Timing(quiet=timedelta(minutes=5), lifetime=timedelta(minutes=8))
    for minute in range(8):
        then = due(minute, timing=short)
        assert then is not None
        assert minute <= then < 8


@pytest.mark.parametrize(("failing", "pause"), [(0, 5), (5, 5), (10, 10), (40, 40), (90, 60), (900, 60)])
def test_failures_are_retried_ever_later(failing: float, pause: float) -> None:
    now = at(10)
    given = retry_pause(TIMING, at(LAST), now - timedelta(minutes=failing), now)
    assert given == timedelta(minutes=pause) <= MAX_RETRY


def test_failures_are_retried_several_times_before_upstream_forgets() -> None:
    now, tries = at(LAST), 0
    while now < at(END):
        now += retry_pause(TIMING, at(LAST), at(0), now)
        tries += 1
    assert tries >= 10
    assert retry_pause(TIMING, at(LAST), at(0), at(END) - timedelta(seconds=10)) == MIN_RETRY
    assert retry_pause(TIMING, None, at(0), at(END + 60)) == MAX_RETRY


# Coverage


def reading_of(*said: tuple[str, str]) -> Reading:
    messages = tuple(Message(role, content) for role, content in said)
    return Reading(responses.READ, at(60), at(60), 1, SessionSnapshot(messages))


def turn(body: bytes) -> Turn:
    event = events.parse(body)
    assert isinstance(event, events.Event)
    return fold([Fact(event, events.WEBHOOK, at(0), at(0))])


QUESTION, ANSWER = ("user", "question of c1"), ("assistant", "answer to c1")


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ([QUESTION, ANSWER], "lost"),
        ([("assistant", "How can I help?"), QUESTION, ANSWER], "lost"),
        ([QUESTION, ("tool", "looked up"), ANSWER], "lost"),
        ([QUESTION, ANSWER, ("user", "another"), ("assistant", "one")], "repaired"),
    ],
)
def test_a_turn_without_content_is_lost_unless_history_shows_one_more(
    shown: list[tuple[str, str]], state: str
) -> None:
    turns = {"c1": turn(created("c1", "s1")), "c2": turn(deleted("c2", "s1"))}
    story = SessionFacts("s1", turns, [reading_of(*shown)], [], [at(0)], [])
    assert derive(story, TIMING).session["coverage"] == state


@pytest.mark.parametrize("created_at", [datetime(1970, 1, 1, tzinfo=UTC), OPENED - timedelta(days=2)])
def test_an_implausible_creation_does_not_end_readings(created_at: datetime) -> None:
    registered = SessionSnapshot(created_at=created_at)
    story = SessionFacts("s1", {}, [], [(at(0), registered)], [at(0)], [])
    session = derive(story, TIMING).session
    assert (session["created_at"], session["reconcile_at"]) == (created_at, at(5))
    early = SessionFacts("s1", {}, [], [(at(0), SessionSnapshot(created_at=at(-60)))], [at(0)], [])
    assert derive(early, TIMING).session["read_by"] == at(LAST - 60)
