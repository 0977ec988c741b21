"""Readings that are parts of later ones: dated in one pass, given in full or as the beginning of the next. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver.archive.transcript import HistoryMessages, TurnMessages, compose
from archiver.archive.transcript.contained import date_lines, maximal_readings
from archiver.events import Message

START = datetime(2026, 1, 5, tzinfo=UTC)

_messages = st.sampled_from(["ok", "yes", "no", "done"]).flatmap(
    lambda text: st.sampled_from(["user", "assistant"]).map(lambda role: Message(role, text))
)
_histories = st.lists(_messages, min_size=1, max_size=8)


@st.composite
def readings(draw: st.DrawFn) -> list[HistoryMessages]:
    """Readings of a history that grows, is cut at either end, or is another one."""
    result: list[HistoryMessages] = []
    shown: list[Message] = []
    for number in range(draw(st.integers(1, 7))):
        shown = draw(
            st.just(shown)
            | _histories.map(lambda more, known=shown: known + more)  # type: ignore[misc]
            | st.integers(0, 4).map(lambda first, known=shown: known[first:])  # type: ignore[misc]
            | st.integers(0, 4).map(lambda last, known=shown: known[: len(known) - last])  # type: ignore[misc]
            | _histories
        )
        at = START + timedelta(minutes=10 * number)
        first = at - timedelta(minutes=draw(st.sampled_from([0, 0, 5, 25])))
        result.append(HistoryMessages(tuple(shown), at, first))
    return result


def as_beginnings(given_readings: Sequence[HistoryMessages]) -> list[HistoryMessages]:
    """The same readings, each without its messages that is the beginning of the next."""
    result = [given_readings[-1]]
    for reading, following in zip(given_readings[-2::-1], given_readings[:0:-1], strict=True):
        length = len(reading.messages)
        is_beginning = length > 0 and following.messages[:length] == reading.messages
        result.append(msgspec.structs.replace(reading, messages=(), shown=length) if is_beginning else reading)
    return result[::-1]


@settings(max_examples=500, deadline=None)
@given(readings(), st.lists(_histories, max_size=3))
def test_a_reading_stored_as_a_prefix_of_the_next_gives_the_same_result(
    known: list[HistoryMessages], said: list[list[Message]]
) -> None:
    turns = [
        TurnMessages(f"c{number}", tuple(each), 1, START + timedelta(minutes=7 * number), START, arrived_at=START)
        for number, each in enumerate(said)
    ]
    assert compose(turns, as_beginnings(known)) == compose(turns, known)
    assert maximal_readings(as_beginnings(known)) == maximal_readings(known)


@settings(max_examples=500, deadline=None)
@given(readings())
def test_a_line_is_dated_by_the_earliest_part_that_shows_it(known: list[HistoryMessages]) -> None:
    last = maximal_readings(known)[-1]
    reading, first_read_at = last.reading, last.first_read_at
    assert reading == known[-1]
    parts = [each for each in known[:-1] if each.first_read_at is not None]
    for index, at in enumerate(first_read_at):
        times = {each.first_read_at for each in parts if reading.messages[index] in each.messages}
        assert at is None or at in times
    prefixes = []
    for each in known[-2::-1]:
        if each.messages != reading.messages[: len(each.messages)]:
            break
        prefixes.append(each)
    for index, at in enumerate(first_read_at):
        times = {each.first_read_at for each in prefixes if index < len(each.messages)}
        assert not times or (at is not None and at <= min(time for time in times if time is not None))
    assert date_lines([], []) == []
