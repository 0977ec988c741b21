"""A turn that repeats the conversation before it adds only what is new; what a user really says again stays."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver.archive.rebuild import rebuild
from archiver.archive.transcript import TurnMessages, transcript
from archiver.archive.transcript.context import as_sent, messages_of_turn
from tests.support.histories import TIMING, Archive, answer
from tests.support.payloads import created
from tests.support.transcripts import minute, reading, said, texts

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres

Texts = list[tuple[str, str]]


def turn(chat_id: str, inputs: list[str], outputs: list[str], at: float) -> TurnMessages:
    item, answered = messages_of_turn(said(*inputs), said(*outputs))
    times = minute(at), minute(at)
    return TurnMessages(chat_id, item + answered, len(item), *times, sent=as_sent(said(*inputs)))


@pytest.mark.parametrize("known", ["ABC", "CB", "B"])
def test_an_input_of_texts_without_roles_that_repeats_the_conversation_adds_only_what_is_new(known: str) -> None:
    said_so_far = ["u q0", "u a0", "u q1", "u a1", "u q2"]
    turns = [turn(chat, said_so_far[: 2 * n + 1], [f"a a{n}"], n) for n, chat in enumerate("ABC") if chat in known]
    whole = ["u q0", "a a0", "u q1", "a a1", "u q2", "a a2"]
    lines = transcript(turns, [reading(*whole)])
    assert texts(lines) == texts(said(*whole))
    assert [line.chat_id for line in lines] == [chat if chat in known else None for chat in "AABBCC"]


def test_a_text_that_history_shows_as_the_users_own_is_no_repeat_of_an_answer() -> None:
    whole = ["u q0", "a a0", "u a0", "u what?", "a a1"]
    lines = transcript(
        [turn("A", ["u q0"], ["a a0"], 1), turn("B", ["u a0", "u what?"], ["a a1"], 2)], [reading(*whole)]
    )
    assert texts(lines) == texts(said(*whole))
    assert [line.chat_id for line in lines] == [*"AABBB"]


def conversation(length: int) -> list[str]:
    return [f"{role} {number}" for number in range(length) for role in "ua"]


@pytest.mark.parametrize(
    "inputs",
    [
        ["u 0", "a 0", "u 1"],
        ["s rules", "u 0", "a 0", "u 1"],
        ["a 0", "u 1"],
        ["u 0 ", "a  0", "u 1"],
        ["u 0", "t look", "a 0", "u 1"],
        ["u 0", "a 0", "u 1", "a "],
        ["u 0", "a 0", "u 1", "a 1"],
        ["u 1"],
    ],
)
@pytest.mark.parametrize("outputs", [["a 1"], ["u 1", "a 1"], ["u 0", "a 0", "u 1", "a 1"]])
def test_an_input_that_repeats_the_conversation_adds_only_what_is_new(inputs: list[str], outputs: list[str]) -> None:
    first, second = turn("A", ["u 0"], ["a 0"], 1), turn("B", inputs, outputs, 2)
    whole = ["u 0", "a 0", "u 1", "a 1"]
    for known, history, chats in (
        ([first, second], [], "AABB"),
        ([second], [], "BB"),
        ([first, second], [reading(*whole)], "AABB"),
        ([second], [reading(*whole)], "--BB"),
    ):
        lines = transcript(known, history)
        assert "".join(line.chat_id or "-" for line in lines) == chats
        assert texts(lines) == texts(said(*whole[-len(chats) :]))


def test_what_only_history_shows_to_be_a_repeat_goes_once_it_was_read() -> None:
    turns = [turn("A", ["u 0"], ["a 0"], 1), turn("B", ["u 0", "u 1"], ["a 1"], 2)]
    assert len(transcript(turns, [])) == 5
    lines = transcript(turns, [reading("u 0", "a 0", "u 1", "a 1")])
    assert "".join(line.chat_id or "-" for line in lines) == "AABB"


@pytest.mark.parametrize("again", ["u 1", "u 0"])
@pytest.mark.parametrize("answer", ["a 1", "a 0"])
@pytest.mark.parametrize(("questions", "answers"), [(True, False), (False, True), (True, True)])
def test_questions_or_answers_alone_are_repeats_where_history_shows_it(
    again: str, answer: str, questions: bool, answers: bool
) -> None:
    """Whatever the user really asks again, and however often it is answered the same."""
    whole = ["u 0", "a 0", again, answer]
    resent = turn("B", ["u 0", again] if questions else [again], ["a 0", answer] if answers else [answer], 2)
    for known, chats in (([turn("A", ["u 0"], ["a 0"], 1), resent], "AABB"), ([resent], "--BB")):
        lines = transcript(known, [reading(*whole)])
        assert texts(lines) == texts(said(*whole))
        assert "".join(line.chat_id or "-" for line in lines) == chats or (again, answer) == ("u 0", "a 0")


NEWEST_FIRST = [
    ["u 1", "a 0", "u 0"],
    ["u 1", "a 0", "u 0", "s rules"],
    ["a ", "u 1", "a 0", "u 0"],
    ["u 1", "a 0"],
    ["u 1", "u 0"],
    ["u 1", "u a 0", "u 0"],  # texts without roles
]


@pytest.mark.parametrize("inputs", NEWEST_FIRST)
@pytest.mark.parametrize("outputs", [["a 1"], ["a a 0"]])
def test_i6_an_input_that_repeats_the_conversation_newest_first_adds_only_what_is_new(
    inputs: list[str], outputs: list[str]
) -> None:
    before = "a a 0" if "u a 0" in inputs else "a 0"
    whole = ["u 0", before, "u 1", *outputs]
    turns = [turn("A", ["u 0"], [before], 1), turn("B", inputs, outputs, 2)]
    for known, chats in ((turns, "AABB"), (turns[1:], "--BB")):
        lines = [line for line in transcript(known, [reading(*whole)]) if line.role != "system"]
        assert texts(lines) == texts(said(*whole))
        assert "".join(line.chat_id or "-" for line in lines) == chats
        assert not any(line.is_ambiguous for line in lines)


def test_i6_a_turn_that_is_not_answered_yet_may_repeat_the_conversation_newest_first() -> None:
    turns = [turn("A", ["u 0"], ["a 0"], 1), turn("B", ["u 1", "a 0", "u 0"], [], 2)]
    for whole in (["u 0", "a 0", "u 1"], ["u 0", "a 0", "u 1", "a 1"]):
        assert texts(transcript(turns, [reading(*whole)])) == texts(said(*whole))


def test_i6_a_history_cut_before_a_turn_shows_that_its_input_was_sent_newest_first() -> None:
    lines = transcript([turn("B", ["u 1", "a 0", "u 0"], ["a 1"], 2)], [reading("u 1", "a 1")])
    assert texts(lines) == texts(said("u 1", "a 1"))


def test_an_input_that_fits_the_history_in_both_directions_is_ambiguous() -> None:
    turns = [turn("A", ["u 0"], ["a ok"], 1), turn("B", ["u 0", "a ok", "u 1"], ["a ok"], 2)]
    turns.append(turn("C", ["u 1", "a ok", "u 0"], ["a ok"], 3))
    whole = ["u 0", "a ok", "u 1", "a ok", "u 0", "a ok"]
    for known, undecided in ((turns, {"B", "C"}), (turns[2:], {"C"})):
        lines = transcript(known, [reading(*whole)])
        assert texts(lines) == texts(said(*whole))
        assert {line.chat_id for line in lines if line.is_ambiguous} == undecided
    lines = transcript(turns[:2], [reading(*whole[:4])])
    assert not any(line.is_ambiguous for line in lines)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.data())
def test_i6_a_conversation_repeated_newest_first_stands_once(length: int, data: st.DataObject) -> None:
    whole = conversation(length)
    turns = []
    for number in range(length):
        before = whole[data.draw(st.integers(0, 2 * number)) : 2 * number]
        inputs = [whole[2 * number], *before[::-1]]
        turns.append(turn(f"C{number}", inputs, [whole[2 * number + 1]], number))
    known = [each for each in turns if data.draw(st.integers(0, 3))]
    lines = transcript(known, [reading(*whole)])
    assert texts(lines) == texts(said(*whole))
    for each in known:
        assert [line.content for line in lines if line.chat_id == each.chat_id] == [each.chat_id[1:]] * 2
    assert not any(line.is_ambiguous for line in lines)


def test_questions_and_answers_that_history_shows_are_no_repeats() -> None:
    first = turn("A", ["u 0"], ["a 0"], 1)
    for inputs, outputs in ((["u 0", "u 1"], ["a 1"]), (["u 1"], ["a 0", "a 1"]), (["u 0", "u 0"], ["a 0", "a 0"])):
        whole = ["u 0", "a 0", *inputs, *outputs]
        for known in ([first, turn("B", inputs, outputs, 2)], [turn("B", inputs, outputs, 2)]):
            assert texts(transcript(known, [reading(*whole)])) == texts(said(*whole))


def test_a_turn_that_a_reading_could_not_show_loses_nothing_to_it() -> None:
    later = turn("B", ["u 0", "u 0"], ["a 0", "a 0"], 200)
    lines = transcript([later], [reading("u 0", "a 0", "u 0", "a 0", at=100)])
    assert texts(line for line in lines if line.chat_id == "B") == texts(later.messages)


def test_a_result_of_a_tool_in_an_input_keeps_no_turn_from_its_lines() -> None:
    turns = [turn("A", ["u 0"], ["a 0"], 1), turn("B", ["u 0", "a 0", "u 1", "t found"], ["a 1"], 2)]
    lines = transcript(turns, [reading("u 0", "a 0", "u 1", "a 1")])
    assert texts(lines) == texts(said("u 0", "a 0", "u 1", "t found", "a 1"))


def test_a_system_message_of_each_turn_stands_once_where_history_does_not_show_it() -> None:
    turns = [turn("A", ["s rules", "u 0"], ["a 0"], 1), turn("B", ["s rules", "u 1"], ["a 1"], 2)]
    lines = transcript(turns, [reading("u 0", "a 0", "u 1", "a 1")])
    assert texts(lines) == texts(said("s rules", "u 0", "a 0", "u 1", "a 1"))
    shown = ["s rules", "u 0", "a 0", "s rules", "u 1", "a 1"]
    assert texts(transcript(turns, [reading(*shown)])) == texts(said(*shown))


def test_what_a_user_really_says_again_stays() -> None:
    turns = [turn("A", ["u 0"], ["a 0"], 1), turn("B", ["u 0"], ["a 0"], 2), turn("C", ["u 0", "u 1"], ["a 1"], 3)]
    whole = ["u 0", "a 0", "u 0", "a 0", "u 0", "u 1", "a 1"]
    for history in ([], [reading(*whole)]):
        lines = transcript(turns, history)
        assert "".join(line.chat_id or "-" for line in lines) == "AABBCCC"
        assert texts(lines) == texts(said(*whole))


@pytest.mark.parametrize(
    ("inputs", "outputs", "history"),
    [
        (["u ok"], ["a ok", "a else?"], ["u yes", "a ok", "u ok", "a thanks", "a else?"]),
        (["u ok", "u why"], ["a so"], ["u ok", "a yes", "u why", "a no"]),
        (["u thanks", "u ok"], ["a ok"], ["u thanks", "a thanks", "u yes", "a ok", "u ok", "a ok"]),
    ],
)
def test_i3_texts_that_recur_in_other_turns_are_no_repeats(
    inputs: list[str], outputs: list[str], history: list[str]
) -> None:
    deleted = turn("A", inputs, outputs, 1)  # the first is seed 190 of the simulation
    lines = transcript([msgspec.structs.replace(deleted, is_deleted=True)], [reading(*history)])
    assert texts(line for line in lines if line.chat_id == "A") == texts(deleted.messages)


def test_an_output_that_holds_all_of_the_turn_is_split() -> None:
    assert messages_of_turn((), said("u 0", "a 0", "u 1", "u 2", "a 1")) == (said("u 1", "u 2"), said("a 1"))
    assert messages_of_turn((), said("u 0")) == ((), said("u 0"))
    assert messages_of_turn(said("u 0", "a draft"), ()) == (said("u 0", "a draft"), ())
    assert messages_of_turn(said("u 0", "a draft"), said("a 1")) == (said("u 0", "a draft"), said("a 1"))


def test_an_output_that_ends_with_the_input_is_no_answer_yet() -> None:
    assert messages_of_turn(said("u 1"), said("u 0", "a 0", "u 1")) == (said("u 1"), ())
    assert messages_of_turn(said("u 1"), said("u 0", "a 0", "u 2")) == (said("u 1"), said("u 0", "a 0", "u 2"))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.data())
def test_i6_a_conversation_repeated_with_every_turn_stands_once(length: int, data: st.DataObject) -> None:
    whole = conversation(length)
    turns = []
    for number in range(length):
        before = whole[: 2 * number]
        window = before[data.draw(st.integers(0, len(before))) :]
        rules = ["s rules"] * data.draw(st.integers(0, 1)) if window else []
        resent = [*rules, *(f"{text}{data.draw(st.sampled_from(['', ' ', chr(160)]))}" for text in window)]
        echo = data.draw(st.sampled_from([[], [*window, whole[2 * number]]]))
        inputs = [*resent, whole[2 * number]] if "a" in [text[0] for text in window] else [whole[2 * number]]
        turns.append(turn(f"C{number}", inputs, [*echo, whole[2 * number + 1]], number))
    known = [each for each in turns if data.draw(st.integers(0, 3))]
    assert texts(transcript(turns, [])) == texts(said(*whole))
    lines = transcript(known, [reading(*whole)])
    assert texts(lines) == texts(said(*whole))
    for each in known:
        assert [line.content for line in lines if line.chat_id == each.chat_id] == [each.chat_id[1:]] * 2


def _created(number: int, inputs: Any) -> bytes:
    moment = minute(number).replace(year=2026).isoformat()
    output = [{"role": "assistant", "content": f"a{number}"}]
    return created(f"chat-{number}", input=inputs, output=output, createdAt=moment, updatedAt=moment)


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (2,)])
def test_i10_context_resent_newest_first_is_no_part_of_the_archive_once_history_was_read(
    archive: Archive, order: tuple[int, ...]
) -> None:
    whole = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    resent = [{"role": role, "content": content} for role, content in whole[2::-1]]
    for number in order:
        archive.webhook(number, _created(number, "q1" if number == 1 else resent))
    archive.reading(30, answer(*whole))
    assert [(role, content) for _, role, content, _ in archive.transcript()] == whole
    assert [chat_id for chat_id, *_ in archive.transcript()][-2:] == ["chat-2", "chat-2"]
    before = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == before


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (2,)])
@pytest.mark.parametrize("is_read", [False, True])
def test_i10_resent_context_is_no_part_of_the_archive(
    archive: Archive, order: tuple[int, ...], is_read: bool
) -> None:
    whole = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    resent = [{"role": role, "content": content} for role, content in whole[:3]]
    for number in order:
        archive.webhook(number, _created(number, "q1" if number == 1 else resent))
    if is_read:
        archive.reading(30, answer(*whole))
    shown = whole if is_read or 1 in order else whole[2:]
    assert [(role, content) for _, role, content, _ in archive.transcript()] == shown
    assert [chat_id for chat_id, *_ in archive.transcript()][-2:] == ["chat-2", "chat-2"]
    before = archive.dump()
    list(rebuild(archive.engine, TIMING))
    assert archive.dump() == before
