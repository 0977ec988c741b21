"""A history that writes its messages differently still shows the same turns (I6), and different ones never merge."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver.archive.transcript import TranscriptLine, transcript
from tests.support.transcripts import reading, texts, turn
from tests.support.wordings import ALIKE, CHANGES, DIFFERENT

changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def reworded(text: str, change: Callable[[str], str]) -> str:
    """A message such as `u hello`, written differently."""
    return text[:2] + change(text[2:])


def chats(lines: list[TranscriptLine]) -> list[str | None]:
    return [line.chat_id for line in lines]


TOLD = ['u Größe & "Farbe"\nnaïve', "a I can't - 5 \u20ac ...", "u ok", "a ok"]


@changes
@pytest.mark.parametrize("changed", [[0], [1], [0, 1], [2, 3], [0, 1, 2, 3]])
def test_i6_a_change_of_writing_leaves_each_turn_its_lines(change: Callable[[str], str], changed: list[int]) -> None:
    shown = [reworded(text, change) if place in changed else text for place, text in enumerate(TOLD)]
    turns = [turn("A", *TOLD[:2], at=1), turn("B", *TOLD[2:], at=20)]
    for item, seen in ((turns, shown), ([turn("A", *shown[:2], at=1), turn("B", *shown[2:], at=20)], TOLD)):
        lines = transcript(item, [reading(*seen)])
        assert chats(lines) == ["A", "A", "B", "B"]
        assert texts(lines) == [key for each in item for key in texts(each.messages)]
        assert [line.is_reworded for line in lines] == [a[2:] != b[2:] for a, b in zip(TOLD, shown, strict=True)]


@changes
def test_readings_that_write_the_same_differently_show_it_once(change: Callable[[str], str]) -> None:
    later = [reworded(text, change) for text in TOLD]
    lines = transcript([], [reading(*TOLD, at=1), reading(*later, at=2)])
    assert texts(lines) == [
        (role, content) for (role, _), content in zip(texts(lines), [t[2:] for t in later], strict=True)
    ]
    assert all(line.in_history for line in lines)


def test_what_is_written_alike_comes_first() -> None:
    turns = [turn("A", "u hello", "a world")]
    lines = transcript(turns, [reading("u hello ", "a world", "u hello", "a world")])
    assert chats(lines) == [None, None, "A", "A"]
    assert not any(line.is_ambiguous for line in lines)


@pytest.mark.parametrize(("one", "other"), ALIKE)
@pytest.mark.parametrize("has_neighbours", [False, True])
def test_i6_a_text_that_was_cut_masked_or_reformatted_stays_in_its_turn(
    one: str, other: str, has_neighbours: bool
) -> None:
    around = [[turn("B", "u before", "a B", at=1)], [turn("D", "u after", "a D", at=9)]]
    before, after = (["u before", "a B"], ["u after", "a D"]) if has_neighbours else ([], [])
    for item, shown in ((one, other), (other, one)):
        turns = [
            turn("C", f"u {item}", "a fine", at=5),
            *(each for some in around for each in some if has_neighbours),
        ]
        lines = transcript(turns, [reading(*before, f"u {shown}", "a fine", *after)])
        assert chats(lines) == [*"BB"[: len(before)], "C", "C", *"DD"[: len(after)]]
        assert ("user", item) in texts(lines)
        assert ("user", shown) not in texts(lines)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_i6_turns_that_a_person_would_call_different_never_merge(one: str, other: str) -> None:
    for item, shown in ((one, other), (other, one)):
        lines = transcript([turn("A", f"u {item}", "a fine", at=5)], [reading(f"u {shown}", "a fine")])
        assert {(line.chat_id, line.content) for line in lines if line.role == "user"} == {("A", item), (None, shown)}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_i6_different_turns_never_merge_between_two_that_match(one: str, other: str) -> None:
    for item, shown in ((one, other), (other, one)):
        assert "C" not in _shown_between(item, shown)


def _shown_between(told: str, shown: str, first: str = "u hi", answer: str = "a fine") -> list[str | None]:
    """The turns of what history shows, where it has one turn with another text between two that it has as told."""
    turns = [turn("B", first, "a B", at=1), turn("C", f"u {told}", "a fine", at=5), turn("D", "u bye", "a D", at=9)]
    lines = transcript(turns, [reading(first, "a B", f"u {shown}", answer, "u bye", "a D")])
    assert texts(line for line in lines if line.chat_id == "C") == [("user", told), ("assistant", "fine")]
    return [line.chat_id for line in lines if line.in_history]


def test_i6_a_text_cut_at_a_low_limit_stays_in_its_turn_where_nothing_contradicts_it() -> None:
    whole = "I would like a refund"
    for item, shown in ((whole, whole[:16]), (whole[:16], whole)):
        assert _shown_between(item, shown) == [*"BBCCDD"]
        # The answer is another one, or the limit cannot be so low.
        assert _shown_between(item, shown, answer="a other") == [*"BB", None, None, *"DD"]
        assert _shown_between(item, shown, first="u a longer text than that") == [*"BB", None, None, *"DD"]
        # A neighbour is missing.
        lines = transcript([turn("C", f"u {item}", "a fine")], [reading(f"u {shown}", "a fine")])
        assert [line.chat_id for line in lines if line.in_history] == [None, None]


def test_a_long_answer_that_was_cut_keeps_the_words_of_its_webhook() -> None:
    long = "This answer is so long that some system has cut it at a limit of its own"
    lines = transcript([turn("A", "u hi", f"a {long}")], [reading("u hi", f"a {long[:50]}")])
    assert texts(lines) == [("user", "hi"), ("assistant", long)]


def test_an_answer_that_went_on_after_its_webhook_is_shown_whole() -> None:
    long = "This answer was reported while the assistant was still writing it"
    lines = transcript([turn("A", "u hi", f"a {long[:50]}", told=5)], [reading("u hi", f"a {long}", at=9)])
    assert texts(lines) == [("user", "hi"), ("assistant", long)]


def test_similarity_decides_nothing_between_several_turns() -> None:
    long = "Please call me back on the number that I have given you yesterday: 555-0100"
    masked = "Please call me back on the number that I have given you yesterday: ***-****"
    turns = [turn("A", f"u {long}", "a 1", at=5), turn("B", f"u {long[:-1]}1", "a 2", at=9)]
    lines = transcript(turns, [reading(f"u {masked}", "a fine")])
    assert chats(lines) == [None, None, "A", "A", "B", "B"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["yes", "no", "order 12", "order 13", "ok"]), min_size=1, max_size=6), st.data())
def test_i6_short_texts_written_differently_stay_apart(said: list[str], data: st.DataObject) -> None:
    names = sorted(CHANGES)
    turns = [turn(f"C{n}", f"u {text}", f"a re {n}", at=10 * n) for n, text in enumerate(said)]
    shown = [
        CHANGES[data.draw(st.sampled_from(names))](message.content) for each in turns for message in each.messages
    ]
    history = [f"{'ua'[n % 2]} {text}" for n, text in enumerate(shown)]
    lines = transcript(turns, [reading(*history, at=500)])
    assert chats(lines) == [each.chat_id for each in turns for _ in range(2)]
