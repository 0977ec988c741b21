"""A history that joins several messages in one line, or splits one into several, leaves each turn as it is. Pure.

`CHAT u text` is a line of the transcript; `text|shown` where the history writes it differently.
"""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from archiver.archive.transcript import TranscriptLine, TurnMessages, transcript
from tests.support.transcripts import reading, said, texts, turn

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres

JOINTS = ["\n", "\n\n", " ", "", "\r\n", "\u00a0"]


def lines_of(turns: Sequence[TurnMessages], *shown: str) -> list[str]:
    return [_written(line) for line in transcript(turns, [reading(*shown)])]


def _written(line: TranscriptLine) -> str:
    shown = "" if line.history_content is None else f"|{line.history_content}"
    mark = "" if line.in_history else "!"
    return f"{line.chat_id or '-'}{mark} {line.role[0]} {line.content}{shown}"


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("answers", [["a a1", "a a2"], ["a a1{}a2"]])
def test_i6_two_turns_whose_messages_history_joins_stay_two_turns(joint: str, answers: list[str]) -> None:
    turns = [turn("A", "u q1", "a a1", at=1), turn("B", "u q2", "a a2", at=2)]
    shown = [f"u q1{joint}q2", *(answer.format(joint) for answer in answers)]
    assert lines_of(turns, *shown) == ["A u q1", "A a a1", "B u q2", "B a a2"]
    around = [turn("X", "u before", "a that", at=0), *turns, turn("Y", "u after", "a this", at=3)]
    lines = lines_of(around, "u before", "a that", *shown, "u after", "a this")
    assert lines[2:-2] == ["A u q1", "A a a1", "B u q2", "B a a2"]


@pytest.mark.parametrize("joint", JOINTS)
def test_i6_inputs_of_one_turn_that_history_joins_stay_its_own(joint: str) -> None:
    turns = [turn("A", "u hi", "u are you there?", "a yes", at=1)]
    assert lines_of(turns, f"u hi{joint}are you there?", "a yes") == ["A u hi", "A u are you there?", "A a yes"]


@pytest.mark.parametrize("joint", JOINTS)
def test_i6_an_input_that_history_splits_stays_one(joint: str) -> None:
    content = f"hi{joint}are you there?"
    shown = reading("u hi", "u are you there?", "a yes")
    first, second = transcript([turn("A", f"u {content}", "a yes", at=1)], [shown])
    assert (first.chat_id, first.content, first.in_history, first.is_reworded) == ("A", content, True, True)
    assert first.history_content in (None, "hi\nare you there?")
    assert (second.chat_id, second.content, second.in_history) == ("A", "yes", True)


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("told", [1, 200])
def test_i6_outputs_in_other_pieces_stand_once(joint: str, told: float) -> None:
    joined, pieces = f"a First.{joint}Second part.", ["a First.", "a Second part."]
    one, two = turn("A", "u q", joined, at=1, told=told), turn("A", "u q", *pieces, at=1, told=told)
    assert texts(transcript([one], [reading("u q", *pieces)])) == texts(said("u q", joined))
    assert lines_of([two], "u q", joined) == ["A u q", "A a First.", "A a Second part."]


@pytest.mark.parametrize(
    "shown",
    [
        ["u q1\nq2\nq3", "a a1", "a a2", "a a3"],
        ["u q1\r\n\r\nq2", "u q3", "a a1\n\na2\na3"],
        ["u q1", "u q2", "u q3", "a a1\na2\na3"],
    ],
)
@pytest.mark.parametrize("known", ["A", "B", "C", "AB", "AC", "BC"])
def test_i6_joined_turns_of_which_webhooks_were_lost_stand_once(shown: list[str], known: str) -> None:
    whole = {name: turn(name, f"u q{at}", f"a a{at}", at=at) for at, name in enumerate("ABC", 1)}
    turns = [whole[name] for name in known]
    lines = transcript(turns, [reading(*shown)])
    for each in turns:
        assert texts(line for line in lines if line.chat_id == each.chat_id) == texts(each.messages)
    assert all(line.in_history for line in lines)
    for role in ("user", "assistant"):
        words = [text for line in lines if line.role == role for text in line.content.split()]
        assert words == [f"{role[0].replace('u', 'q')}{number}" for number in (1, 2, 3)]
    around = [turn("X", "u before", "a that", at=0), *turns, turn("Y", "u after", "a this", at=4)]
    longer = transcript(around, [reading("u before", "a that", *shown, "u after", "a this")])[2:-2]
    assert [replace(line, number=line.number and line.number - 2) for line in longer] == lines


def test_i6_a_lost_turn_stands_before_or_after_the_one_with_which_history_joins_it() -> None:
    first, second = turn("A", "u q1", "a a1", at=1), turn("B", "u q2", "a a2", at=2)
    for shown in (["u q1\nq2", "a a1", "a a2"], ["u q1\n\nq2", "a a1\n\na2"], ["u q1", "u q2", "a a1\na2"]):
        assert lines_of([first], *shown) == ["A u q1", "A a a1", "- u q2", "- a a2"]
        assert lines_of([second], *shown) == ["- u q1", "- a a1", "B u q2", "B a a2"]


@pytest.mark.parametrize(
    "shown",
    [
        ["u q1 q2", "a a1", "a a2"],  # no line end
        ["u q1\nq2", "a a1", "a a2", "a a2"],  # which of the answers?
        ["u q1\nq2", "a a1", "a a2", "u q2", "a other"],  # which of the questions?
        ["u q1\nq2", "a a1", "a other"],
    ],
)
def test_a_line_that_may_be_no_part_of_the_turn_is_not_divided(shown: list[str]) -> None:
    lines = transcript([turn("B", "u q2", "a a2", at=2)], [reading(*shown)])
    assert {line.content for line in lines} >= {shown[0][2:], "q2"}


def test_the_lines_that_webhooks_do_not_report_keep_their_place() -> None:
    turns = [turn("A", "u q1", "a a1", at=1), turn("B", "u q2", "a a2", at=2)]
    lines = lines_of(turns, "s rules", "u q1\nq2", "t look", "a a1", "s note", "a a2", "t end")
    assert lines == ["- s rules", "A u q1", "A t look", "A a a1", "B u q2", "B s note", "B a a2", "B t end"]


def test_a_turn_that_is_not_answered_yet_gets_the_answer_of_history() -> None:
    assert lines_of([turn("A", "u hi", "u there?", at=1)], "u hi\nthere?", "a yes") == [
        "A u hi",
        "A u there?",
        "A a yes",
    ]
    turns = [turn("A", "u q1", "a a1", at=1), turn("B", "u q2", at=2)]
    assert lines_of(turns, "u q1\nq2", "a a1", "a a2") == ["A u q1", "A a a1", "B u q2", "B a a2"]


def test_turns_without_an_answer_may_stand_before_those_that_are_joined() -> None:
    turns = [turn("A", "u q1", at=1), turn("B", "u q2", "a a2", at=2), turn("C", "u q3", "a a3", at=3)]
    for shown in (["u q1", "u q2\nq3", "a a2", "a a3"], ["u q1", "u q2", "u q3", "a a2\n\na3"]):
        assert lines_of(turns, *shown) == ["A u q1", "B u q2", "B a a2", "C u q3", "C a a3"]
    turns = [turn("A", "u q1", at=1), turn("B", "u q2", "a a2", "a more", at=2)]
    assert lines_of(turns, "u q1", "u q2", "a a2\n\nmore") == ["A u q1", "B u q2", "B a a2", "B a more"]


@pytest.mark.parametrize("more", [[], ["a a5"]])
def test_i6_an_answer_after_a_turn_without_one_goes_to_the_turn_that_has_it(more: list[str]) -> None:
    turns = [turn("A", "u q4", "a a4", at=1), turn("B", "u yes", at=2)]
    rest = [f"B {text}" for text in more]
    assert lines_of(turns, "u q4", "u yes", "a a4", *more) == ["A u q4", "A a a4", "B u yes", *rest]
    turns = [turn("X", "u q3", "a a3", at=0), *turns, turn("C", "u q5", "a a6", at=3)]
    shown = ["u q3", "a a3", "u q4", "u yes", "u q5", "a a4", "a a6"]
    assert lines_of(turns, *shown) == [
        *("X u q3", "X a a3", "A u q4", "A a a4"),
        *("B u yes", "C u q5", "C a a6"),
    ]


def test_turns_without_an_answer_stay_where_each_message_has_its_line() -> None:
    turns = [turn("A", "u q1", at=1), turn("B", "u q2", at=2)]
    lines = transcript(turns, [reading("u q1", "u q2", "a a2")])
    assert [line.chat_id for line in lines] == [*"ABB"]
    assert not any(line.is_reworded for line in lines)


@pytest.mark.parametrize(
    "shown",
    [
        ["u hi there", "a no"],
        ["u hi\nare you", "a yes"],
        ["u hi\nare you there? Hello", "a yes"],
        ["u hiare youthere?", "a yes"],
        ["u Hi\nare you there?", "a yes"],
    ],
)
def test_different_texts_never_merge(shown: list[str]) -> None:
    lines = lines_of([turn("A", "u hi", "u are you there?", "a yes", at=1)], *shown)
    assert len(lines) == 5
    assert {line[0] for line in lines} == {"A", "-"}


def test_white_space_within_a_message_counts() -> None:
    lines = lines_of([turn("A", "u now", "u here", "a ok", at=1)], "u no where", "a ok")
    assert len(lines) == 5
    assert lines_of([turn("A", "u no", "u where", "a ok", at=1)], "u nowhere", "a ok")[0] == "A u no"


_WORDS = [f"{first} {second}" for first in "abcd" for second in "efgh"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_i6_any_division_of_the_messages_leaves_each_turn_once(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 6))
    words = iter([f"{text} {copy}" for copy in range(4) for text in _WORDS])
    turns: list[TurnMessages] = []
    shown: list[str] = []
    whole: list[tuple[str, str]] = []
    joint = st.sampled_from(JOINTS)

    def divide(messages: list[str]) -> list[str]:
        result = [messages[0]]
        for each in messages[1:]:
            if data.draw(st.booleans()):
                result[-1] += data.draw(joint) + each[2:]
            else:
                result.append(each)
        return result

    group: list[list[str]] = []
    for index in range(number):
        inputs = [f"u {next(words)}" for _ in range(data.draw(st.integers(1, 2)))]
        outputs = [f"a {next(words)}" for _ in range(data.draw(st.integers(1, 2)))]
        at = index * 2 + data.draw(st.floats(-0.6, 0.6))
        turns.append(turn(f"C{index}", *inputs, *outputs, at=at))
        whole += [(f"C{index}", text) for text in (*inputs, *outputs)]
        group.append([*inputs, *outputs])
        if data.draw(st.booleans()) or len(group) == 3:
            shown += _history(group, divide)
            group = []
    shown += _history(group, divide) if group else []
    lines = transcript(turns, [reading(*shown)])
    assert [(line.chat_id, f"{line.role[0]} {line.content}") for line in lines] == whole
    assert all(line.in_history for line in lines)


def _history(group: Sequence[Sequence[str]], divide: Callable[[list[str]], list[str]]) -> list[str]:
    """What all turns of a group say, first the questions, then the answers."""
    everything = [text for each in group for text in each]
    return [text for role in "ua" for text in divide([each for each in everything if each[0] == role])]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_i6_any_joined_turns_of_which_webhooks_were_lost_stand_once(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 12]))  # 12 words: so long that a beginning of it counts as a cut text
    words = iter([" ".join([text, str(copy)] * size) for copy in range(4) for text in _WORDS])
    known: list[TurnMessages] = []
    shown: list[str] = []
    everything: list[str] = []
    for group in range(data.draw(st.integers(1, 4))):
        members = [
            turn(f"C{group}{number}", f"u {next(words)}", f"a {next(words)}", at=group * 3 + number)
            for number in range(data.draw(st.integers(1, 3)))
        ]
        known += [each for each in members if data.draw(st.booleans())]
        is_asked_joined, is_answered_joined = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
        for role, number, is_joined in (("u", 0, is_asked_joined), ("a", 1, is_answered_joined)):
            contents = [each.messages[number].content for each in members]
            joint = data.draw(st.sampled_from(["\n", "\n\n", "\r\n"]))
            shown += [f"{role} {joint.join(contents)}"] if is_joined else [f"{role} {text}" for text in contents]
        everything += [message.content for each in members for message in each.messages]
    lines = transcript(known, [reading(*shown)])
    for each in known:
        own = [line for line in lines if line.chat_id == each.chat_id]
        assert texts(own) == texts(each.messages)
    assert all(line.in_history for line in lines)
    assert sorted(text for line in lines for text in line.content.splitlines() if text) == sorted(everything)


WHOLE = ["u q1", "a a1", "u q2", "a a2"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (WHOLE, ["u q1\nq2", "a a1", "a a2"]),
        (["u q1\nq2", "a a1", "a a2"], WHOLE),
        (["u q1", "u q2", "a a1", "a a2"], ["u q1\n\nq2", "a a1\n\na2"]),
        (WHOLE[:2], ["u q1\nq2", "a a1", "a a2"]),
        (WHOLE[:3], ["u q1\nq2", "a a1\na2"]),
    ],
)
@pytest.mark.parametrize("known", ["", "AB", "A", "B"])
@pytest.mark.parametrize("is_between", [False, True])
def test_i6_readings_that_divide_messages_differently_do_not_double_them(
    first: list[str], second: list[str], known: str, is_between: bool
) -> None:
    before, after = (["u before", "a that"], ["u after", "a this"]) if is_between else ([], [])
    turns = [each for each in (turn("A", *WHOLE[:2], at=1), turn("B", *WHOLE[2:], at=2)) if each.chat_id in known]
    readings = [reading(*before, *first, at=50), reading(*before, *second, *after)]
    lines = transcript(turns, readings)
    for role in ("user", "assistant"):
        said_by = [text[2:] for text in [*before, *WHOLE, *after] if text[0] == role[0]]
        assert [text for line in lines if line.role == role for text in line.content.split()] == said_by
    assert all(line.in_history for line in lines)
    assert [line.chat_id for line in lines if line.chat_id] == [name for name in known for _ in "qa"]


def test_messages_are_the_same_however_two_readings_divide_them_by_spaces_or_nothing() -> None:
    turns = [turn("A", *WHOLE[:2], at=1), turn("B", *WHOLE[2:], at=2)]
    for joint in (" ", "", "\u00a0"):
        joined = [f"u q1{joint}q2", "a a1", "a a2"]
        for readings in ([WHOLE, joined], [joined, WHOLE]):
            lines = transcript(turns, [reading(*shown, at=50 + at) for at, shown in enumerate(readings)])
            assert texts(lines) == texts(said(*WHOLE))


def test_i7_messages_that_a_later_reading_does_not_have_in_any_division_stay() -> None:
    for second in (["u q1", "u q3", "a a1"], ["u q1\nq3", "a a1", "a a3"], ["u q1 q2 q3", "a a1", "a a2"]):
        lines = transcript([], [reading(*WHOLE, at=50), reading(*second)])
        assert "q2" in [line.content for line in lines if line.in_history is False]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_i6_any_two_divisions_of_a_growing_history_show_each_text_once(data: st.DataObject) -> None:
    turns = [turn(f"C{at}", f"u q{at} x", f"a a{at} y", at=at) for at in range(data.draw(st.integers(1, 6)))]
    readings = []
    for number in range(2):
        grown = turns if number else turns[: data.draw(st.integers(0, len(turns)))]
        shown: list[str] = []
        while grown:
            size = data.draw(st.integers(1, 3))
            group, grown = (
                [[f"u {m[0].content}", f"a {m[1].content}"] for m in (t.messages for t in grown[:size])],
                grown[size:],
            )
            shown += _history(group, lambda texts: ["\n".join([texts[0], *(text[2:] for text in texts[1:])])])
        readings.append(reading(*shown, at=50 + number))
    known = [each for each in turns if data.draw(st.booleans())]
    for some in (turns, known):
        lines = transcript(some, readings)
        found = sorted(text for line in lines for text in line.content.splitlines() if line.in_history)
        assert found == sorted(message.content for each in turns for message in each.messages)
        assert all(line.in_history for line in lines)
