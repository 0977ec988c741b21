"""One transcript from turns and readings: I3, I5, I6, I7. Pure.

Lines are written `CHAT:wX u text`: chat or `-`, `w`ebhook or `h`istory, then `+` shown by the latest reading, `!` not
shown, `?` could not be shown, then the first letter of the role.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations, groupby, pairwise, permutations, product
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from archiver.archive.transcript import (
    HistoryMessages,
    TranscriptLine,
    TurnMessages,
    may_claim,
    merge_history,
    merge_turns,
    transcript,
)
from archiver.archive.transcript.candidates import Match
from archiver.archive.transcript.matching import heaviest_chain
from archiver.archive.transcript.subsequence import align, common_subsequence
from archiver.events import Message
from tests.support.transcripts import START, minute, reading, said, texts, turn

MARKS = {True: "+", False: "!", None: "?"}

T = TypeVar("T")

_many = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_some = settings(_many, max_examples=100)


def written(lines: Iterable[TranscriptLine]) -> list[str]:
    return [
        f"{line.chat_id or '-'}:{line.source[0]}{MARKS[line.in_history]} {line.role[0]} {line.content}"
        for line in lines
    ]


def merged_history_of(*readings: HistoryMessages) -> list[TranscriptLine]:
    lines: list[TranscriptLine] = []
    for each in readings:
        lines = merge_history(lines, each)
    return lines


# What two tellings have in common


def _longest(old: Sequence[object], new: Sequence[object]) -> int:
    """The textbook's table."""
    row = [0] * (len(new) + 1)
    for item in old:
        above = row[:]
        for index, other in enumerate(new):
            row[index + 1] = above[index] + 1 if item == other else max(above[index + 1], row[index])
    return row[-1]


def _is_alignment(pairs: Sequence[tuple[int, int]], old: Sequence[object], new: Sequence[object]) -> bool:
    ascending = all(one[0] < two[0] and one[1] < two[1] for one, two in pairwise(pairs))
    return ascending and all(old[in_old] == new[in_new] for in_old, in_new in pairs)


_words = st.text("abc", max_size=24)


@_many
@given(_words, _words, st.sampled_from([1, 7, 40, 1 << 20]))
def test_the_common_subsequence_is_a_longest_one_however_little_memory_it_may_use(
    old: str, new: str, cells: int
) -> None:
    pairs = common_subsequence(old, new, cells)
    assert _is_alignment(pairs, old, new)
    assert len(pairs) == _longest(old, new)


def test_of_several_alignments_one_that_leaves_the_end_of_the_new_over_is_taken() -> None:
    assert common_subsequence("xa", "yaa") == [(1, 1)]
    assert common_subsequence("bc", "cb") == [(1, 0)]


@_many
@given(_words, _words)
def test_an_alignment_keeps_what_both_have_once(old: str, new: str) -> None:
    assert _is_alignment(align(old, new), old, new)
    one, other = f"<{old}{old}X{new}{new}Y{old}", f">{new}{new}X{old}{old}Y{new}"
    pairs = align(one, other)
    assert _is_alignment(pairs, one, other)
    assert {(one.index(letter), other.index(letter)) for letter in "XY"} <= {*pairs}


@_many
@given(_words, _words)
def test_what_stands_several_times_is_aligned_as_well_as_can_be(old: str, new: str) -> None:
    for one, other in ((f"<{old}{old}", f">{new}"), (f"<{old}", f">{new}{new}")):
        pairs = align(one, other)
        assert _is_alignment(pairs, one, other)
        assert len(pairs) == _longest(one, other)


# Readings


def test_i7_absence_is_not_deletion() -> None:
    merged = merged_history_of(reading("u a", "a b", "u c", "a d", at=1), reading("u a", "a b", at=2))
    assert written(merged) == ["-:h+ u a", "-:h+ a b", "-:h! u c", "-:h! a d"]


def test_an_empty_reading_shows_nothing_and_loses_nothing() -> None:
    assert written(merged_history_of(reading("u a", "a b", at=1), reading(at=2))) == ["-:h! u a", "-:h! a b"]


def test_what_vanished_comes_before_what_is_new_at_the_same_place() -> None:
    merged = merged_history_of(reading("u a", "a draft", "u c", at=1), reading("u a", "a final", "u c", at=2))
    assert written(merged) == ["-:h+ u a", "-:h! a draft", "-:h+ a final", "-:h+ u c"]


def test_a_line_holds_the_times_of_the_first_and_the_last_reading_that_showed_it() -> None:
    merged = merged_history_of(reading("u a", at=1), reading("u a", "u b", at=2), reading("u b", "u c", at=3))
    times = [(line.content, line.first_read_at, line.last_read_at) for line in merged]
    assert times == [("a", minute(1), minute(2)), ("b", minute(2), minute(3)), ("c", minute(3), minute(3))]


def test_a_reading_cut_at_its_head_continues_the_merged_history() -> None:
    whole = ["u hi", "a hello", "u ok", "a ok", "u bye", "a bye"]
    merged = merged_history_of(reading(*whole[:4], at=1), reading(*whole[1:], at=2))
    assert [text for _, text in texts(merged)] == [text[2:] for text in whole]
    assert written(merged)[0] == "-:h! u hi"


def test_a_turn_that_vanished_between_equal_texts_vanishes_whole() -> None:
    merged = merged_history_of(reading("u ok", "a A", "u ok", "a B", at=1), reading("u ok", "a B", at=2))
    assert written(merged) == ["-:h! u ok", "-:h! a A", "-:h+ u ok", "-:h+ a B"]


def test_a_whole_turn_of_several_lines_vanishes_between_equal_texts() -> None:
    before = ["u ok", "t look", "a A", "u ok", "t look", "a B"]
    merged = merged_history_of(reading(*before, at=1), reading("u ok", "t look", "a B", at=2))
    assert [line.in_history for line in merged] == [False] * 3 + [True] * 3


def test_the_same_answer_again_changes_nothing_though_it_could_be_aligned_otherwise() -> None:
    cut = reading("t z", "a y", at=2)
    merged = merged_history_of(reading("u x", "t z", "t z", at=1), cut)
    assert merge_history(merged, cut) == merged


def test_many_repeated_texts_do_not_outweigh_what_is_unmistakable() -> None:
    """A window that moved on: the longest common subsequence alone would tear it apart."""
    rng = random.Random(1)
    whole = []
    for number in range(300):
        whole += [
            f"u {rng.choice(['ok', 'yes', f'ask {number}'])}",
            f"a {rng.choice(['ok', 'well', f'do {number}'])}",
        ]
    merged = merged_history_of(reading(*whole[:450], at=1), reading(*whole[300:], at=2))
    assert texts(merged) == texts(said(*whole))


def test_an_equal_answer_to_something_else_is_another_message() -> None:
    merged = merged_history_of(reading("u a", "a ok", "a ", at=1), reading("u b", "a ok", "a ", at=2))
    assert written(merged) == ["-:h! u a", "-:h! a ok", "-:h! a ", "-:h+ u b", "-:h+ a ok", "-:h+ a "]


def test_readings_cut_at_opposite_ends_join_in_the_middle_of_a_turn() -> None:
    whole = ["u a", "t look", "a ok", "a ok", "u b", "a ok"]
    for cut in range(1, len(whole)):
        head, tail = whole[: cut + 1], whole[cut:]
        for readings in ([head, tail], [tail, whole], [head, whole], [tail, whole[-1:]], [whole, head, tail]):
            merged = merged_history_of(*(reading(*each, at=number) for number, each in enumerate(readings)))
            assert _is_subsequence(texts(merged), texts(said(*whole))), (readings, written(merged))


def test_a_cut_answer_between_two_windows_is_found_again() -> None:
    whole = [f"{role} {number}" for number in range(6) for role in "ua"]
    merged = merged_history_of(reading(*whole[:4], at=1), reading(*whole[7:], at=2), reading(*whole, at=3))
    assert texts(merged) == texts(said(*whole))


_loose_readings = st.lists(
    st.lists(st.sampled_from(["u ok", "a ok", "a A", "u B", "t ok", "a "]), max_size=9), max_size=4
).map(lambda all_said: [reading(*each, at=number) for number, each in enumerate(all_said)])


@_many
@given(_loose_readings)
def test_the_shown_lines_are_the_latest_reading_and_the_others_are_kept(readings: list[HistoryMessages]) -> None:
    merged: list[TranscriptLine] = []
    for each in readings:
        before, merged = merged, merge_history(merged, each)
        assert texts(line for line in merged if line.in_history) == texts(each.messages)
        assert not Counter(texts(before)) - Counter(texts(merged))
        assert _is_subsequence(texts(before), texts(merged))
        assert all(line.last_read_at == each.read_at for line in merged if line.in_history)
        assert len(merged) <= len(before) + len(each.messages)


@_many
@given(_loose_readings)
def test_the_same_reading_again_changes_nothing(readings: list[HistoryMessages]) -> None:
    merged = merged_history_of(*readings)
    if readings:
        assert merge_history(merged, readings[-1]) == merged
        later = HistoryMessages(readings[-1].messages, minute(50))
        assert [_timeless(line) for line in merge_history(merged, later)] == [_timeless(line) for line in merged]


def _timeless(line: TranscriptLine) -> TranscriptLine:
    return msgspec.structs.replace(line, first_read_at=None, last_read_at=None)


def _is_subsequence(part: Sequence[T], whole: Sequence[T]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


# Turns among the lines of history


def test_a_turn_without_readings_stands_alone() -> None:
    lines = transcript([turn("A", "u hi", "a hello"), turn("E", at=-1)], [])
    assert written(lines) == ["A:w? u hi", "A:w? a hello"]


def test_a_greeting_that_no_turn_claims_has_no_chat() -> None:
    lines = transcript([turn("A", "u hi", "a hello")], [reading("a Welcome!", "u hi", "a hello", "u lost", "a l")])
    assert written(lines) == ["-:h+ a Welcome!", "A:w+ u hi", "A:w+ a hello", "-:h+ u lost", "-:h+ a l"]


def test_lines_that_only_history_has_belong_to_the_surrounding_turn() -> None:
    lines = transcript(
        [turn("A", "u hi", "a hello"), turn("B", "u go", "a went", at=1)],
        [reading("s rules", "u hi", "t look", "a hello", "a more", "s note", "u go", "a went")],
    )
    assert written(lines) == [
        "-:h+ s rules",
        "A:w+ u hi",
        "A:h+ t look",
        "A:w+ a hello",
        "A:h+ a more",
        "A:h+ s note",
        "B:w+ u go",
        "B:w+ a went",
    ]


def test_an_output_that_only_history_has_stays_when_the_turn_arrives_later() -> None:
    lines = transcript([turn("A", "u hi", "a hello", told=200)], [reading("u hi", "a hello", "a more", at=100)])
    assert written(lines) == ["A:w+ u hi", "A:w+ a hello", "A:h+ a more"]


def test_a_turn_may_begin_with_a_system_message() -> None:
    turns = [turn("A", "u hi", "a hello"), turn("B", "s urgent", "u go", "a went", at=1, inputs=2)]
    lines = transcript(turns, [reading("u hi", "a hello", "s urgent", "u go", "a went")])
    assert [line.chat_id for line in lines] == ["A", "A", "B", "B", "B"]


def test_blank_messages_match_whether_upstream_keeps_them_or_not() -> None:
    result = turn("A", "u hi", "a ", "a hello", "a \n")
    assert written(transcript([result], [reading("u hi", "a hello")])) == ["A:w+ u hi", "A:w+ a hello"]
    remaining = transcript([result], [reading("u hi", "a ", "a hello", "a \n")])
    assert written(remaining) == ["A:w+ u hi", "A:w+ a ", "A:w+ a hello", "A:w+ a \n"]


@pytest.mark.parametrize("shown", [["u ", "a Welcome"], ["a Welcome"]])
def test_a_blank_input_opens_a_turn_with_or_without_its_line(shown: list[str]) -> None:
    lines = transcript([turn("A", "u ", "a Welcome"), turn("B", "u x", "a y", at=1)], [reading(*shown, "u x", "a y")])
    assert [line.chat_id for line in lines] == ["A"] * len(shown) + ["B"] * 2


@pytest.mark.parametrize("blank", [["u ", "a "], ["a "]])
def test_a_turn_of_blank_messages_alone_finds_them(blank: list[str]) -> None:
    lines = transcript([turn("A", *blank, at=1), turn("X", "u x", "a y")], [reading("u x", "a y", *blank)])
    assert written(lines) == ["X:w+ u x", "X:w+ a y", *[f"A:w+ {text}" for text in blank]]


def test_a_turn_with_only_a_blank_input_gets_its_output_from_history() -> None:
    lines = transcript([turn("A", "u ", "a ")], [reading("u x", "a y", "u ", "a hello")])
    assert written(lines) == ["-:h+ u x", "-:h+ a y", "A:w+ u ", "A:h+ a hello"]


def test_several_inputs_in_one_turn_stay_together() -> None:
    turns = [turn("A", "u ok", "u two", "a both"), turn("B", "u two", "u ok", "a 2", at=1)]
    lines = transcript(turns, [reading("u ok", "u two", "a both", "u two", "u ok", "a 2")])
    assert written(lines)[:3] == ["A:w+ u ok", "A:w+ u two", "A:w+ a both"]
    assert [line.chat_id for line in lines] == ["A"] * 3 + ["B"] * 3


def test_several_inputs_are_found_by_a_rarer_output() -> None:
    lines = transcript(
        [turn("A", "u ok", "u two", "a both", at=200)], [reading("u ok", "u two", "a both", "u two", "u ok", "a 2")]
    )
    assert [line.chat_id for line in lines] == ["A"] * 3 + [None] * 3


def test_the_turn_and_not_the_role_decides_what_is_input() -> None:
    """As output the same messages claim their lines at any time; as input only where a reading could show them."""
    turns = [turn("A", "u x", "a y", at=1), turn("B", "u x", "a y", at=200, inputs=2)]
    lines = transcript(turns, [reading("u x", "a y", "u x", "a y")])
    assert written(lines)[2:] == ["-:h+ u x", "-:h+ a y", "B:w? u x", "B:w? a y"]


def test_two_turns_never_share_a_line() -> None:
    for one, other in ((1, 2), (2, 1)):
        turns = [turn("A", "u ok", "a A", at=one), turn("B", "u ok", "a B", at=other)]
        history = ["u ok", "a A", "a B", "t look", "u ok", "a C"]
        lines = transcript(turns, [reading(*history)])
        assert texts(line for line in lines if line.in_history) == texts(said(*history))
        assert {line.chat_id for line in lines} >= {"A", "B"}


def test_order_distinguishes_turns_with_equal_texts() -> None:
    turns = [turn("A", "u ok", "a ok"), turn("B", "u go", "a went", at=1), turn("C", "u ok", "a ok", at=2)]
    lines = transcript(turns, [reading("u ok", "a ok", "u go", "a went", "u ok", "a ok")])
    assert [line.chat_id for line in lines] == ["A", "A", "B", "B", "C", "C"]


def test_of_equal_texts_those_read_after_the_turn_began_are_its_own() -> None:
    first, second = reading("u ok", "a ok", at=5), reading("u ok", "a ok", "u ok", "a ok", at=15)
    lines = transcript([turn("B", "u ok", "a ok", at=10)], [first, second])
    assert [line.chat_id for line in lines] == [None, None, "B", "B"]


def test_a_partial_match_distinguishes_equal_texts() -> None:
    turns = [turn("A", "u who", "a dra", at=1), turn("B", "u ok", "a ok", at=2)]
    lines = transcript(turns, [reading("u ok", "a ok", "u who", "a draft", "u ok", "a ok")])
    assert [line.chat_id for line in lines] == [None, None, "A", "A", "B", "B"]


def test_a_full_match_is_preferred_to_partial_ones() -> None:
    turns = [turn("A", "u ok", "a other", at=1), turn("B", "u ok", "a done", at=2)]
    lines = transcript(turns, [reading("u ok", "a done")])
    assert written(lines) == ["A:w! u ok", "A:w! a other", "B:w+ u ok", "B:w+ a done"]


def test_a_longer_match_is_preferred_to_a_shorter() -> None:
    turns = [turn("A", "u ok", at=1), turn("B", "u ok", "a done", at=2)]
    lines = transcript(turns, [reading("u ok", "a done")])
    assert written(lines) == ["A:w! u ok", "B:w+ u ok", "B:w+ a done"]


def test_a_partial_match_with_more_of_its_outputs_is_preferred() -> None:
    lines = transcript([turn("A", "u ok", "a 1", "a 2")], [reading("u ok", "a other", "u ok", "a 1", "a 3")])
    assert written(lines) == ["-:h+ u ok", "-:h+ a other", "A:w+ u ok", "A:w+ a 1", "A:h+ a 3"]


def test_an_output_found_outweighs_a_turn_without_any() -> None:
    turns = [turn("A", "u ok", at=1), turn("B", "u ok", "a 1", "a 2", at=2)]
    lines = transcript(turns, [reading("u ok", "a 1", "a 3")])
    assert written(lines) == ["A:w! u ok", "B:w+ u ok", "B:w+ a 1", "B:h+ a 3"]


def test_a_turn_without_output_is_preferred_to_one_with_another() -> None:
    turns = [turn("A", "u ok", "a other", at=1), turn("B", "u ok", at=2)]
    lines = transcript(turns, [reading("u ok", "a 1")])
    assert written(lines) == ["A:w! u ok", "A:w! a other", "B:w+ u ok", "B:h+ a 1"]


def test_a_partial_match_that_is_longer_does_not_put_a_full_one_out_of_order() -> None:
    turns = [
        turn("A", "u ok", "a 1", "a 2", "a x", at=1),
        turn("M", "u missing", at=2),
        turn("B", "u ok", "a 1", at=3),
    ]
    lines = transcript(turns, [reading("u ok", "a 1", "a 2")])
    assert "".join(line.chat_id or "-" for line in lines) == "AAAAMBBB"


def test_a_partial_match_out_of_order_is_none() -> None:
    turns = [turn("B", "u b", "a draft", at=1), turn("A", "u a", "a A", at=3)]
    lines = transcript(turns, [reading("u a", "a A", "u b", "a final")])
    assert "".join(line.chat_id or "-" for line in lines) == "BBAA--"


def test_a_partial_match_is_found_out_of_an_order_that_is_not_certain() -> None:
    turns = [turn("B", "u b", "a draft", at=1), turn("A", "u a", "a A", at=2)]
    lines = transcript(turns, [reading("u a", "a A", "u b", "a final")])
    assert "".join(line.chat_id or "-" for line in lines) == "AABB"


def test_of_equal_places_the_earliest_is_taken() -> None:
    lines = transcript([turn("A", "u ok", "a ok")], [reading("u ok", "a ok", "u ok", "a ok", "u ok", "a ok")])
    assert [line.chat_id for line in lines] == ["A", "A", None, None, None, None]


def test_of_equal_places_the_one_that_nothing_else_follows_is_taken() -> None:
    lines = transcript([turn("A", "u ok", "a ok")], [reading("u ok", "a ok", "a more", "u ok", "a ok")])
    assert [line.chat_id for line in lines] == [None, None, None, "A", "A"]


def test_inputs_alone_never_take_the_place_of_outputs() -> None:
    """By its time A would be the first, but the first is what B tells to the letter."""
    turns = [turn("A", "u ok", at=1), turn("X", "u x", "a x", at=2), turn("B", "u ok", "a B", at=3)]
    lines = transcript(turns, [reading("u ok", "a B", "u x", "a x", "u ok", "a A")])
    assert [line.chat_id for line in lines] == ["B", "B", "X", "X", "A", "A"]


def test_turns_with_wrong_times_still_find_their_lines() -> None:
    turns = [turn("A", "u a", "a A", at=3), turn("B", "u b", "a B", at=2), turn("C", "u c", "a C", at=1)]
    lines = transcript(turns, [reading("u a", "a A", "u b", "a B", "u c", "a C")])
    assert [line.chat_id for line in lines] == ["A", "A", "B", "B", "C", "C"]
    assert all(line.source == "webhook" for line in lines)


def test_i5_a_turn_that_arrives_after_the_reading_that_shows_it_claims_its_lines() -> None:
    late = turn("A", "u a", "a A", at=200)
    assert written(transcript([late], [reading("u a", "a A", at=100)])) == ["A:w+ u a", "A:w+ a A"]


@pytest.mark.parametrize("output", [[], ["a mine"]])
def test_a_turn_younger_than_the_reading_does_not_claim_by_its_input_alone(output: list[str]) -> None:
    lines = transcript([turn("A", "u ok", *output, at=200)], [reading("u ok", "a theirs", at=100)])
    assert written(lines) == ["-:h+ u ok", "-:h+ a theirs", "A:w? u ok", *[f"A:w? {text}" for text in output]]


# Turns that history does not show


def test_missing_turns_stand_whole_and_in_order_of_their_beginning() -> None:
    turns = [
        turn("A", "u a", "a ", at=3),
        turn("B", "u b", "a B", at=2, told=6),
        turn("D", "u d", "a D", at=2, told=5),
        turn("C", "u c", "a C", at=2, told=5),
    ]
    lines = transcript(turns, [])
    assert "".join(line.chat_id or "-" for line in lines) == "CCDDBBAA"
    assert written(lines)[-1] == "A:w? a "


def test_missing_turns_stand_before_the_next_turn_found() -> None:
    turns = [turn(name, f"u {name}", "a ok", at=at) for at, name in enumerate("ABCDE")]
    lines = transcript(turns, [reading("u lost", "a ok", "u B", "a ok", "u E", "a ok", "u last", "a ok")])
    assert "".join(line.chat_id or "-" for line in lines) == "--AABBCCDDEE--"
    assert written(lines)[2] == "A:w! u A"


def test_a_missing_turn_is_not_drawn_to_a_turn_whose_time_is_wrong() -> None:
    turns = [turn(name, f"u {name}", f"a {name}", at=at) for at, name in enumerate("ABMZ")]
    lines = transcript(turns, [reading("u Z", "a Z", "u A", "a A", "u B", "a B")])
    assert "".join(line.chat_id or "-" for line in lines) == "ZZAABBMM"


def test_a_turn_deleted_upstream_keeps_its_lines() -> None:
    turns = [turn(name, f"u {name}", "a ok", at=at) for at, name in enumerate("ABC")]
    whole, shrunk = ["u A", "a ok", "u B", "a ok", "u C", "a ok"], ["u A", "a ok", "u C", "a ok"]
    for readings in ([reading(*shrunk)], [reading(*whole, at=50), reading(*shrunk)]):
        lines = transcript(turns, readings)
        assert written(lines)[2:4] == ["B:w! u B", "B:w! a ok"]
        assert "".join(line.chat_id or "-" for line in lines) == "AABBCC"


def test_what_is_like_a_part_of_a_deleted_turn_is_another_s() -> None:
    deleted = msgspec.structs.replace(turn("A", "u ok", "a A"), is_deleted=True)
    lines = transcript([deleted], [reading("u ok", "a A", at=1), reading("u ok", "a B", at=2)])
    assert written(lines) == ["A:w! u ok", "A:w! a A", "-:h+ u ok", "-:h+ a B"]
    lines = transcript([deleted], [reading("u x", "a x", "u ok", "a B")])
    assert written(lines)[2:] == ["-:h+ u ok", "-:h+ a B", "A:w! u ok", "A:w! a A"]
    before = ["u ok", "a x"]
    lines = transcript([deleted], [reading(*before, "u ok", "a A", at=1), reading(*before, "u ok", "a B", at=2)])
    assert written(lines)[2:] == ["A:w! u ok", "A:w! a A", "-:h+ u ok", "-:h+ a B"]


def test_a_deleted_turn_read_before_its_answer_is_the_same_turn() -> None:
    deleted = msgspec.structs.replace(turn("A", "u ok", "a A"), is_deleted=True)
    lines = transcript([deleted], [reading("u x", "u ok", at=1), reading("u x", "u ok", "a A", at=2)])
    assert written(lines) == ["-:h+ u x", "A:w+ u ok", "A:w+ a A"]


def test_i5_deleted_turns_that_overlap_count_in_an_order_that_is_not_chance() -> None:
    patterns = set()
    for word in "abcdefghij":
        short, long = [f"u {word}", f"a {word}"], [f"u {word}", f"a {word}", "a x"]
        deleted = [
            msgspec.structs.replace(turn(chat_id, *item), is_deleted=True)
            for chat_id, item in (("A", short), ("B", long))
        ]
        readings = [
            reading(f"a {word}", f"a {word}", f"u {word}", f"u {word}", f"u {word}", at=1),
            reading(f"u {word}", f"a {word}", f"a {word}", f"u {word}", f"a {word}", "a x", at=2),
        ]
        patterns.add(tuple((line.role, line.in_history) for line in transcript(deleted, readings)))
    assert len(patterns) == 1


def test_blank_turns_known_to_be_deleted_are_no_obstacle() -> None:
    deleted = msgspec.structs.replace(turn("A", "u ", "a "), is_deleted=True)
    lines = transcript([deleted], [reading("u x", "a y", at=1), reading("u x", "a y", "u z", at=2)])
    assert written(lines)[:3] == ["-:h+ u x", "-:h+ a y", "-:h+ u z"]


def test_a_history_cut_in_the_middle_of_a_turn() -> None:
    turns = [turn("A", "u a", "a A1", "a A2", at=1), turn("B", "u b", "a B", at=2)]
    lines = transcript(turns, [reading("t look", "a A2", "u b", "a B")])
    assert written(lines) == [
        "A:w! u a",
        "A:w! a A1",
        "A:h+ t look",
        "A:w+ a A2",
        "B:w+ u b",
        "B:w+ a B",
    ]


def test_the_cut_turn_is_the_last_before_those_that_are_shown() -> None:
    turns = [turn("A", "u a", "a ok", at=1), turn("B", "u b", "a ok", at=2), turn("C", "u c", "a C", at=3)]
    lines = transcript(turns, [reading("a ok", "u c", "a C")])
    assert written(lines)[2:4] == ["B:w! u b", "B:w+ a ok"]
    assert "".join(line.chat_id or "-" for line in lines) == "AABBCC"


def test_a_greeting_is_no_tail_of_a_turn_that_began_after_it_was_read() -> None:
    lines = transcript([turn("A", "u hi", "a hello", at=200)], [reading("a hello", at=100)])
    assert written(lines) == ["-:h+ a hello", "A:w? u hi", "A:w? a hello"]


def test_only_a_turn_before_all_others_can_be_cut_at_the_head() -> None:
    turns = [turn("A", "u a", "a A", at=1), turn("B", "u b", "a ok", at=2)]
    lines = transcript(turns, [reading("a ok", "u a", "a A")])
    assert written(lines)[0] == "-:h+ a ok"
    assert "".join(line.chat_id or "-" for line in lines) == "-AABB"


def test_a_blank_line_is_no_tail() -> None:
    turns = [turn("A", "u a", "a A", "a ", at=1), turn("B", "u b", "a B", at=2)]
    assert written(transcript(turns, [reading("a ", "u b", "a B")]))[0] == "-:h+ a "


def test_a_cut_inside_a_turn_of_several_inputs() -> None:
    lines = transcript([turn("A", "u a", "u b", "a A")], [reading("u b", "a A")])
    assert written(lines) == ["A:w! u a", "A:w+ u b", "A:w+ a A"]


# Two tellings of one turn


def test_i3_a_lost_revision_comes_from_history() -> None:
    lines = transcript([turn("A", "u hi", "a hel", told=5)], [reading("u hi", "t look", "a hello", "a there", at=9)])
    assert written(lines) == ["A:w+ u hi", "A:h+ t look", "A:h+ a hello", "A:h+ a there"]


def test_i3_a_revision_newer_than_the_reading_wins() -> None:
    lines = transcript([turn("A", "u hi", "a hello", told=10)], [reading("u hi", "t look", "a hel", at=9)])
    assert written(lines) == ["A:w+ u hi", "A:h+ t look", "A:w? a hello"]


def test_a_history_cut_before_the_output_keeps_the_turn_s_own() -> None:
    lines = transcript([turn("A", "u hi", "a 1", "a 2")], [reading("u hi", at=9)])
    assert written(lines) == ["A:w+ u hi", "A:w! a 1", "A:w! a 2"]


def test_a_history_cut_between_outputs_keeps_the_rest() -> None:
    lines = transcript([turn("A", "u hi", "a 1", "a 2")], [reading("u hi", "a 1", "t look", at=9)])
    assert written(lines) == ["A:w+ u hi", "A:w+ a 1", "A:h+ t look", "A:w! a 2"]


def test_a_message_that_history_leaves_out_keeps_its_place() -> None:
    lines = transcript([turn("A", "u hi", "t look", "a hello")], [reading("u hi", "a hello", "u x")])
    assert written(lines) == ["A:w+ u hi", "A:w! t look", "A:w+ a hello", "-:h+ u x"]


def test_an_output_equal_in_webhook_and_history_stays_beside_one_that_differs() -> None:
    lines = transcript([turn("A", "u hi", "a 1", "a 2")], [reading("u hi", "a 1", "a 3")])
    assert written(lines) == ["A:w+ u hi", "A:w+ a 1", "A:h+ a 3"]


def test_a_draft_read_before_the_final_revision_is_dropped_regardless_of_later_readings() -> None:
    final = turn("A", "u hi", "a final", told=10)
    draft = reading("u hi", "a draft", at=9)
    assert written(transcript([final], [draft])) == ["A:w+ u hi", "A:w? a final"]
    after = transcript([final], [draft, reading("u hi", "a final", at=20)])
    assert written(after) == ["A:w+ u hi", "A:w+ a final"]
    assert written(transcript([final], [draft, reading(at=20)])) == ["A:w! u hi", "A:w! a final"]
    assert written(transcript([final], [draft, reading("u hi", at=20)])) == ["A:w+ u hi", "A:w! a final"]


@pytest.mark.parametrize("told", [["u hi"], ["u hi", "a draft"], ["u hi", "a other draft"]])
def test_a_draft_is_gone_where_a_later_reading_has_another_output_in_its_place(told: list[str]) -> None:
    readings = [reading("u hi", "a draft", at=9), reading("u hi", "a final", at=20)]
    assert written(transcript([turn("A", *told, told=8)], readings)) == ["A:w+ u hi", "A:h+ a final"]


def test_an_output_that_only_a_longer_reading_showed_is_kept() -> None:
    readings = [reading("u hi", "a 1", "a 2", at=9), reading("u hi", "a 1", at=20)]
    assert written(transcript([turn("A", "u hi", "a 1")], readings)) == ["A:w+ u hi", "A:w+ a 1", "A:h! a 2"]


def test_i3_a_newer_revision_without_output_replaces_no_output() -> None:
    readings = [reading("u hi", "a hello", at=9), reading("u hi", at=20)]
    assert written(transcript([turn("A", "u hi", told=10)], readings)) == ["A:w+ u hi", "A:h! a hello"]


def test_a_cut_head_is_no_newer_version() -> None:
    readings = [reading("u hi", "a 1", "a 2", at=9), reading("a 2", "u x", at=20)]
    lines = transcript([turn("A", "u hi", "a 1", told=5)], readings)
    assert written(lines) == ["A:w! u hi", "A:w! a 1", "A:h+ a 2", "-:h+ u x"]


# Any conversation


class World(msgspec.Struct):
    """What was said, what webhooks told of it and what readings showed."""

    truth: dict[str, list[Message]]  # by chat, as history shows it at the end; "" is the greeting
    turns: list[TurnMessages]  # those known, in the order in which they came
    readings: list[HistoryMessages]
    deleted: set[str]

    def everything(self) -> list[Message]:
        return [message for messages in self.truth.values() for message in messages]


STEP = 10  # minutes from one turn to the next
DRAFTED, SETTLED = 2, 4  # minutes into a turn
_SMALL_TALK = ["ok", "ok", "thanks", "yes"]
_MOMENTS = (1, 3, 5)  # minutes into a turn: only its input, its draft, all of it


class _Spoken(msgspec.Struct):
    """One turn upstream: what history shows of it and what a webhook tells, at its beginning, midway and at last."""

    shown: tuple[tuple[Message, ...], ...]
    told: tuple[tuple[Message, ...], ...]
    inputs: int
    began: float

    def at(self, moment: float) -> tuple[Message, ...]:
        since = moment - self.began
        return () if since < 0 else self.shown[(since >= DRAFTED) + (since >= SETTLED)]


@st.composite
def _spoken(draw: st.DrawFn, number: int, *, is_distinct: bool, has_drafts: bool) -> _Spoken:
    counter = iter(range(100))

    def text(role: str) -> Message:
        word = draw(st.sampled_from(_SMALL_TALK))
        return Message(role, f"{word} {number}.{next(counter)}" if is_distinct else word)

    inputs = tuple(text("user") for _ in range(draw(st.sampled_from([1, 1, 1, 2]))))
    outputs = tuple(text("assistant") for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))))
    item, shown = [], []
    for output in outputs:
        if draw(st.integers(0, 5)) == 0:
            item.append(Message("assistant", ""))
            shown += item[-1:] * draw(st.integers(0, 1))
        if draw(st.integers(0, 3)) == 0:
            shown.append(text(draw(st.sampled_from(["tool", "system"]))))
        item.append(output)
        shown.append(output)
    draft: tuple[Message, ...] = ()
    if has_drafts and outputs and draw(st.booleans()):
        draft = (Message("assistant", f"{outputs[0].content} …"),)
    return _Spoken(
        shown=(inputs, inputs + draft, inputs + tuple(shown)),
        told=(inputs, inputs + draft, inputs + tuple(item)),
        inputs=len(inputs),
        began=number * STEP,
    )


@st.composite
def worlds(
    draw: st.DrawFn,
    *,
    is_distinct: bool = False,
    has_drafts: bool = False,
    has_deletions: bool = False,
    tells_deletions: bool = False,
    cuts: str = "none",
    ends_whole: bool = True,
) -> World:
    """`cuts`: `none`, `overlapping` (every reading continues what is known) or `any`."""
    spoken = [
        draw(_spoken(number, is_distinct=is_distinct, has_drafts=has_drafts))
        for number in range(draw(st.integers(0, 6)))
    ]
    greeting = said("s rules", "a Welcome")[: draw(st.integers(0, 2))]
    end = (len(spoken) + 1) * STEP
    deletions = {number: draw(st.integers(0, 6)) * STEP + 8 for number in range(len(spoken))} if has_deletions else {}
    deletions = {number: moment for number, moment in deletions.items() if draw(st.integers(0, 2)) == 0}

    def history(moment: float) -> tuple[Message, ...]:
        remaining = [
            message
            for number, each in enumerate(spoken)
            if deletions.get(number, moment + 1) > moment
            for message in each.at(moment)
        ]
        return (*greeting, *remaining)

    readings, known = [], 0
    moments = st.tuples(st.integers(0, max(0, len(spoken) - 1)), st.sampled_from(_MOMENTS))
    for number, inside in sorted(draw(st.lists(moments, max_size=4, unique=True))):
        moment = number * STEP + inside
        messages = history(moment)
        first, last = 0, len(messages)
        if cuts != "none":
            first = draw(st.integers(0, len(messages) if cuts == "any" else min(known, len(messages))))
            last = draw(st.integers(first, len(messages)))
            # An overlapping one shows at least one line that is known already.
            first = max(0, min(first, known - 1)) if cuts == "overlapping" else first
            known = max(known, last)
        readings.append(HistoryMessages(messages[first:last], minute(moment)))
    if ends_whole:
        readings.append(HistoryMessages(history(end), minute(end)))

    turns = []
    for number, each in enumerate(spoken):
        newest = draw(st.sampled_from([None, 0, 2, 2, 2] + [1, 1] * has_drafts))
        if newest is not None:
            told_at = each.began + (0, DRAFTED, SETTLED)[newest]
            is_deleted = tells_deletions and number in deletions and draw(st.booleans())
            turns.append(
                TurnMessages(
                    f"C{number}", each.told[newest], each.inputs, minute(each.began), minute(told_at), is_deleted
                )
            )
    truth = {"": [*greeting]} | {f"C{number}": [*each.at(end)] for number, each in enumerate(spoken)}
    return World(truth, draw(st.permutations(turns)), readings, {f"C{number}" for number in deletions})


_any_world = st.one_of(
    worlds(has_drafts=True, has_deletions=True, cuts="any", ends_whole=False),
    worlds(has_drafts=True, has_deletions=True, tells_deletions=True, cuts="any"),
    worlds(has_drafts=True),
    worlds(has_drafts=True, has_deletions=True, cuts="any", ends_whole=False, is_distinct=True),
)


@_many
@given(_any_world, st.randoms(use_true_random=False))
def test_i5_the_order_in_which_things_came_is_irrelevant(world: World, rng: random.Random) -> None:
    turns, readings = [*world.turns], [*world.readings]
    rng.shuffle(turns)
    rng.shuffle(readings)
    assert transcript(turns, readings) == transcript(world.turns, world.readings)


def _draft_with_a_mark() -> World:
    """The reading shows a draft that ends with the mark of a cut; the turn says at last what stands before it."""
    asked, answer = Message("user", "ok"), Message("assistant", "thanks 0.2")
    drafted = Message("assistant", "thanks 0.2 …")
    turns = [TurnMessages("C0", (asked, answer), 1, minute(0), minute(4))]
    return World({}, turns, [HistoryMessages((), minute(1)), HistoryMessages((asked, drafted), minute(3))], set())


@_many
@given(_any_world)
@example(_draft_with_a_mark())
def test_what_the_latest_reading_shows_stands_once_and_in_order(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    shown = texts(_unclaimed(line) for line in lines if line.in_history)  # in the words of history
    latest = world.readings[-1] if world.readings else HistoryMessages((), minute(-1))
    if any(each.revised_at > latest.read_at for each in world.turns):
        assert _is_subsequence(shown, texts(latest.messages))
        assert _without_answers(shown) == _without_answers(texts(latest.messages))
    else:
        assert shown == texts(latest.messages)


def _without_answers(said_lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(role, content) for role, content in said_lines if role != "assistant"]


def _deleted_first_turn() -> World:
    """History shows the question of a lost turn where the first turn was: equal to one half of that one's input."""

    def turn(chat_id: str, began: int, inputs: int, *said: Message) -> TurnMessages:
        return TurnMessages(chat_id, said, inputs, minute(began), minute(began + 4))

    ok, thanks, answer = Message("user", "ok"), Message("user", "thanks"), Message("assistant", "ok")
    turns = [turn("C0", 0, 2, ok, ok, answer), turn("C2", 20, 1, thanks), turn("C3", 30, 1, ok, answer)]
    return World({}, turns, [HistoryMessages((ok, thanks, ok, answer), minute(70))], set())


def _question_that_stands_before_as_an_answer() -> World:
    """The first of two questions of a deleted turn stands in the history before, as an answer."""
    turns = [
        turn("C2", "u ok", "u yes", "a ok", at=20, told=24, inputs=2),
        turn("C4", "u ok", at=40),
    ]
    shown = reading("u thanks", "a ok", "u yes", "t ok", "a ok", "u ok", at=60)
    return World({}, turns, [shown], {"C2"})


def _read_midway() -> World:
    """The reading shows one of two equal answers, after a turn that was answered the same."""
    ok, answer, item = Message("user", "ok"), Message("assistant", "ok"), Message("tool", "ok")
    turns = [TurnMessages("C4", (ok, answer, answer), 1, minute(40), minute(44))]
    return World({}, turns, [HistoryMessages((answer, item, answer, ok, answer), minute(41))], set())


@_many
@given(_any_world)
@example(_deleted_first_turn())
@example(_read_midway())
@example(_question_that_stands_before_as_an_answer())
def test_i3_no_turn_is_lost_doubled_or_torn(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    runs = [chat_id for chat_id, _ in groupby(line.chat_id for line in lines) if chat_id]
    assert sorted(runs) == sorted(each.chat_id for each in world.turns if each.messages)
    for each in world.turns:
        own = [line for line in lines if line.chat_id == each.chat_id]
        result = [message for message in each.messages if message.content.strip()]
        by_webhook = [line for line in own if line.source == "webhook"]
        assert _is_subsequence(texts(line for line in by_webhook if line.content.strip()), texts(result))
        missing = Counter(texts(result)) - Counter(texts(by_webhook))
        # Words of the user go alone where the history shows them before, or as no turn's (`alignment.context`).
        # It may show them as an answer: a message that a client sent without a role counts as the user's.
        repeated = missing - Counter(texts(each.messages[each.inputs :]))
        before = lines[: lines.index(own[0])] if own else []
        after = [line for line in lines[len(before) :] if line.chat_id is None]
        shown = Counter(texts([*before, *after]))
        shown += Counter({("user", text): number for (role, text), number in shown.items() if role == "assistant"})
        assert not repeated - shown
        missing -= repeated
        if missing:
            # A draft that history shows, or answers to earlier turns that it shows before (`alignment.context`).
            is_draft = any(line.source == "history" and line.role == "assistant" for line in own)
            assert is_draft or not missing - Counter(texts(before))
            assert each.revised_at <= world.readings[-1].read_at


@_many
@given(_any_world)
@example(_draft_with_a_mark())
def test_i7_no_line_is_lost_except_replaced_outputs_of_a_revised_turn(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    known = [line for line in lines if line.first_read_at]
    for each in world.readings:
        assert _is_subsequence(_without_answers(texts(each.messages)), _without_answers(texts(known)))
    if not any(each.is_deleted for each in world.turns):
        merged = transcript([], world.readings)
        deleted = Counter(texts(merged)) - Counter(texts(lines))
        assert {role for role, _ in deleted} <= {"assistant"}
        assert _is_subsequence([_unclaimed(line) for line in known], merged)
        assert world.turns or lines == merged


def _unclaimed(line: TranscriptLine) -> TranscriptLine:
    """The line as history alone has it."""
    shown = line.content if line.history_content is None else line.history_content
    result = msgspec.structs.replace(line, content=shown, chat_id=None, source="history", is_ambiguous=False)
    return msgspec.structs.replace(result, is_reworded=False, history_content=None)


@_many
@given(_any_world)
def test_marks_say_what_the_latest_reading_could_show(world: World) -> None:
    latest = max((each.read_at for each in world.readings), default=None)
    turns = {each.chat_id: each for each in world.turns}
    for line in transcript(world.turns, world.readings):
        assert (line.in_history is True) == (line.last_read_at is not None and line.last_read_at == latest)
        assert (line.first_read_at is None) == (line.last_read_at is None)
        assert line.chat_id is not None or line.source == "history"
        if line.in_history is None:
            assert line.chat_id is not None
            assert latest is None or turns[line.chat_id].revised_at > latest
        elif line.first_read_at is None:
            assert line.chat_id is not None
            assert latest is not None
            assert turns[line.chat_id].began_at <= latest


@_many
@given(_any_world)
def test_reading_the_same_again_changes_no_line(world: World) -> None:
    again = [*world.readings, *world.readings[-1:]]
    assert transcript(world.turns, again) == transcript(world.turns, world.readings)


@_many
@given(worlds())
def test_i6_repeated_texts_converge_to_the_history(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    assert texts(lines) == texts(world.everything())
    assert all(line.in_history for line in lines)


@_many
@given(worlds(is_distinct=True, has_drafts=True, cuts="overlapping"))
def test_i6_distinct_texts_converge_and_each_turn_has_exactly_its_own(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    known = {each.chat_id for each in world.turns}
    # Of a turn that no webhook told nobody can say that a draft of it was replaced.
    settled = [line for line in lines if line.in_history or line.chat_id]
    assert texts(settled) == texts(world.everything())
    for chat_id, messages in world.truth.items():
        if chat_id in known:
            assert texts(line for line in lines if line.chat_id == chat_id) == texts(messages)


@_many
@given(worlds(is_distinct=True, cuts="overlapping"), st.randoms(use_true_random=False))
def test_distinct_texts_match_regardless_of_times(world: World, rng: random.Random) -> None:
    turns = [
        msgspec.structs.replace(each, began_at=minute(rng.randint(-50, 0)))
        for each in world.turns
        if len(each.messages) > each.inputs
    ]
    lines = transcript(turns, world.readings)
    assert texts(lines) == texts(world.everything())
    for each in turns:
        claimed = [line for line in lines if line.chat_id == each.chat_id]
        assert texts(claimed) == texts(world.truth[each.chat_id])


@_many
@given(worlds(is_distinct=True, has_deletions=True, has_drafts=True))
def test_i6_i7_deletions_upstream_leave_the_rest_in_order(world: World) -> None:
    lines = transcript(world.turns, world.readings)
    known = {each.chat_id for each in world.turns}
    latest = texts(world.readings[-1].messages)
    for chat_id, messages in world.truth.items():
        claimed = [line for line in lines if line.chat_id == chat_id]
        if chat_id in known and texts(messages)[0] in latest:
            assert texts(claimed) == texts(messages)
        elif chat_id in known:
            assert not any(line.in_history for line in claimed)
    order = [chat_id for chat_id, _ in groupby(line.chat_id for line in lines) if chat_id]
    assert order == sorted(order)


# Choices


def _brute(found: Sequence[tuple[int, Sequence[Match]]], weight: Callable[[int, Match], int]) -> int:
    best = 0
    for count in range(len(found) + 1):
        for chosen in combinations(found, count):
            for matches in product(*(matches for _, matches in chosen)):
                if all(one.end <= two.start for one, two in pairwise(matches)):
                    total = sum(weight(number, match) for (number, _), match in zip(chosen, matches, strict=True))
                    best = max(best, total)
    return best


_matches = st.builds(
    lambda start, length, is_full: Match(start, start + length, ((0, start),), is_full),
    st.integers(0, 8),
    st.integers(1, 3),
    st.booleans(),
)


@_some
@given(st.lists(st.lists(_matches, max_size=4), max_size=5))
def test_the_heaviest_chain_is_the_best_of_all(candidates: list[list[Match]]) -> None:
    result = [*enumerate(candidates)]

    def weight(number: int, match: Match) -> int:
        return (match.end - match.start) * (4 if match.is_full else 1) + number

    chain = heaviest_chain(result, weight)
    assert [number for number, _ in chain] == sorted({number for number, _ in chain})
    assert all(one.end <= two.start for (_, one), (_, two) in pairwise(chain))
    assert sum(weight(number, match) for number, match in chain) == _brute(result, weight)


@pytest.mark.parametrize("places", [[(0, 2), (2, 4)], [(2, 4), (0, 2)], [(0, 4), (0, 2)], [(0, 2), (0, 4)]])
def test_of_chains_of_equal_weight_the_one_that_ends_first_is_taken(places: list[tuple[int, int]]) -> None:
    matches = [Match(start, end, ((0, start), (1, end - 1)), is_full=True) for start, end in places]
    ((_, match),) = heaviest_chain([(0, matches)], lambda turn, match: 1)
    assert (match.start, match.end) == (0, 2)


def test_of_deleted_turns_that_begin_alike_each_keeps_its_lines() -> None:
    turns = [
        turn("A", "u a", "a x", at=0, is_deleted=True),
        turn("B", "u a", "a x", "a y", at=1, is_deleted=True),
        turn("C", "u a", "a x", at=2),
    ]
    whole = [message for each in turns for message in each.messages]
    readings = [HistoryMessages(tuple(whole), minute(50)), reading("u a", "a x")]
    for order in permutations(turns):
        assert texts(transcript(order, readings)) == texts(whole)


# Long sessions


def _long(kind: str, messages: int, loss: float) -> tuple[list[TurnMessages], list[HistoryMessages]]:
    """Half of `messages` turns, read whole at the end after a reading of three quarters."""
    rng = random.Random(7)
    pools: dict[str, Callable[[str, int], str]] = {
        "distinct": lambda role, number: f"{role} {number}",
        "equal": lambda role, number: "ok",
        "two": lambda role, number: rng.choice(["yes", "no"]),
        "equal inputs": lambda role, number: "ok" if role == "u" else f"{role} {number}",
        "mixed": lambda role, number: rng.choice(["ok", "thanks", f"{role} {number}"]),
    }
    text = pools[kind]
    turns = [
        turn(f"C{number:05}", f"u {text('u', number)}", f"a {text('a', number)}", at=number)
        for number in range(messages // 2)
    ]
    whole = tuple(message for each in turns for message in each.messages)
    early = messages * 3 // 4
    readings = [HistoryMessages(whole[:early], minute(early / 2)), HistoryMessages(whole, minute(messages))]
    return [each for each in turns if rng.random() >= loss], readings


_KINDS = ["distinct", "equal", "two", "equal inputs", "mixed"]


@pytest.mark.parametrize("loss", [0, 0.2])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_long_session_converges_though_its_texts_repeat(kind: str, loss: float) -> None:
    turns, readings = _long(kind, 640, loss)
    lines = transcript(turns, readings)
    assert texts(lines) == texts(readings[-1].messages)
    assert [line.chat_id for line in lines if line.source == "webhook"] == [
        chat_id for each in turns for chat_id in [each.chat_id] * 2
    ]


@contextmanager
def _counted_calls() -> Iterator[list[int]]:
    """Counts the calls of functions, written in Python or not: work that does not depend on the machine."""
    count = [0]

    def profile(frame: Any, event: str, argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("shown", ["whole", "whole, half of it deleted", "second half", "nothing"])
@pytest.mark.parametrize("kind", _KINDS)
def test_the_work_grows_with_the_session_not_with_its_square(kind: str, shown: str) -> None:
    counts = []
    for messages in (250, 2000):
        turns, readings = _long(kind, messages, 0.2)
        whole = readings[-1]
        if "deleted" in shown:
            turns = [msgspec.structs.replace(each, is_deleted=each.revised_at.minute % 2 == 0) for each in turns]
        elif shown != "whole":
            half = whole.messages[messages // 2 :] if shown == "second half" else ()
            readings = [HistoryMessages(half, whole.read_at)]
        with _counted_calls() as count:
            transcript(turns, readings)
        counts += count
    assert counts[1] < counts[0] * 8 * 1.5


def test_merge_turns_alone_takes_what_merge_history_made() -> None:
    read = reading("u hi", "a hello")
    turns = [turn("A", "u hi", "a hello")]
    merged = merge_turns(merge_history([], read), turns, read.read_at)
    assert merged == [replace(line, number=None) for line in transcript(turns, [read])]


@_many
@given(st.data())
def test_i6_readings_cut_at_either_end_leave_no_trace_once_a_whole_one_is_known(data: st.DataObject) -> None:
    text = st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from(["ok", "thanks", "a"]))
    whole = [Message(*each) for each in data.draw(st.lists(text, min_size=1, max_size=12))]
    readings = []
    for number in range(data.draw(st.integers(0, 3))):
        end = data.draw(st.integers(0, len(whole)))
        start = data.draw(st.integers(0, end))
        readings.append(HistoryMessages(tuple(whole[start:end]), START + timedelta(minutes=number)))
    readings.append(HistoryMessages(tuple(whole), START + timedelta(hours=1)))
    lines = transcript([], readings)
    assert texts(lines) == texts(whole)
    # Each line was shown at the latest by the last, and by a part of it as soon as one held such a line.
    for line in lines:
        earlier = [each.read_at for each in readings if (line.role, line.content) in texts(each.messages)]
        assert line.first_read_at in earlier


def test_a_line_is_dated_by_the_first_reading_that_showed_it() -> None:
    whole = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    cuts = [(2, 4), (0, 2), (0, 4)]
    readings = [HistoryMessages(tuple(whole[a:b]), START + timedelta(minutes=n)) for n, (a, b) in enumerate(cuts)]
    times = [line.first_read_at for line in transcript([], readings)]
    assert times == [START + timedelta(minutes=1)] * 2 + [START] * 2


# Turns that are newer than the reading


@pytest.mark.parametrize(
    ("late", "said_by_turn", "expected"),
    [
        (0.5, ("u ok", "a sure"), True),
        (0.5, ("u ok",), True),
        (1, ("u ok", "a sure"), False),
        (1, ("u ok",), False),
        (1, ("u ok", "a looking it up"), True),
        (1, ("u ok", "t 5 rows", "a looking it up"), True),
        (1, ("u ok", "a looking it up\nfound"), True),
        (1, ("u ok", "a looking it up", "a found"), False),
    ],
)
def test_i6_a_turn_later_than_the_reading_claims_lines_only_as_a_whole(
    late: float, said_by_turn: tuple[str, ...], expected: bool
) -> None:
    newer = turn("a", *said_by_turn, at=100 + late)
    assert may_claim(newer, {"ok", "looking it up"}, minute(100)) is expected
