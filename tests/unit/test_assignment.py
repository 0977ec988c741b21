"""Which lines of a history belong to which turn, where texts repeat and webhooks were lost (I6)."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from archiver.archive.transcript import TranscriptLine, transcript
from tests.support.conversations import DISTINCT, REALISTIC, tally
from tests.support.transcripts import reading, turn

# The full size is in `make soak`.
CONVERSATIONS = 1_500


def chats(lines: Sequence[TranscriptLine]) -> str:
    return "".join(line.chat_id or "-" for line in lines)


def ambiguous(lines: Sequence[TranscriptLine]) -> set[str | None]:
    return {line.chat_id for line in lines if line.is_ambiguous}


@pytest.mark.parametrize("is_skewed", [False, True])
def test_i6_each_turn_has_its_own_lines_or_is_ambiguous(is_skewed: bool) -> None:
    result = tally(range(CONVERSATIONS), is_skewed=is_skewed)
    assert result.wrong == []
    # An answer that is always "ambiguous" would be no answer.
    assert result.needless == []
    assert result.ambiguous < result.conversations * 0.35


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
@example(30, True)
@example(867, True)
def test_i6_no_turn_has_the_lines_of_another_without_a_report(seed: int, is_skewed: bool) -> None:
    result = tally([seed], is_skewed=is_skewed)
    assert (result.wrong, result.needless) == ([], [])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_a_conversation_of_distinct_texts_is_never_ambiguous(seed: int, is_skewed: bool) -> None:
    result = tally([seed], is_skewed=is_skewed, words=DISTINCT)
    assert (result.wrong, result.ambiguous, result.misplaced) == ([], 0, 0)


def test_few_conversations_of_mostly_distinct_texts_are_ambiguous() -> None:
    result = tally(range(CONVERSATIONS), is_skewed=True, words=REALISTIC)
    assert result.wrong == []
    assert result.ambiguous < result.conversations * 0.01


def test_nothing_is_ambiguous_where_every_webhook_arrived_and_times_are_far_enough_apart() -> None:
    turns = [turn(name, "u ok", "a ok", at=1.5 * at) for at, name in enumerate("ABCDE")]
    lines = transcript(turns, [reading(*["u ok", "a ok"] * 5)])
    assert (chats(lines), ambiguous(lines)) == ("AABBCCDDEE", set())


@pytest.mark.parametrize("seconds", [0, 1, 40, 79, 80, 81, 200])
@pytest.mark.parametrize("between", [[], ["u x", "a x"]])
def test_times_decide_between_equal_turns_where_both_may_be_wrong_by_40_seconds(
    seconds: int, between: list[str]
) -> None:
    turns = [turn("A", "u ok", "a ok", at=1), turn("C", "u ok", "a ok", at=1 + seconds / 60)]
    turns += [turn("B", *between, at=1 + seconds / 120)] if between else []
    lines = transcript(turns, [reading("u ok", "a ok", *between, "u ok", "a ok")])
    assert chats(lines) == "AABBCC" if between else "AACC"
    assert ambiguous(lines) == ({"A", "C"} if seconds <= 80 else set())


def test_i6_a_deleted_turn_beside_words_that_no_turn_has_is_ambiguous() -> None:
    """Its lines may be the end of a turn whose webhook was lost."""
    deleted = msgspec.structs.replace(turn("A", "u ok", "a yes", at=1), is_deleted=True)
    assert ambiguous(transcript([deleted], [reading("u yes", "u ok", "a yes")])) == {"A"}
    assert ambiguous(transcript([deleted], [reading("u yes", "a no", "u ok", "a yes")])) == set()


def test_a_match_without_skipped_lines_wins() -> None:
    lines = transcript([turn("B", "u ok", "a ok")], [reading("u ok", "a looking it up", "a ok", "u ok", "a ok")])
    assert (chats(lines), ambiguous(lines)) == ("---BB", set())


def test_a_match_without_skipped_asides_wins_and_is_ambiguous() -> None:
    """Webhooks often do not report calls of tools."""
    lines = transcript([turn("B", "u ok", "a ok")], [reading("u ok", "t look", "a ok", "u ok", "a ok")])
    assert (chats(lines), ambiguous(lines)) == ("---BB", {"B"})


def test_an_answer_between_two_inputs_ends_a_turn() -> None:
    lines = transcript([turn("A", "u ok", "u ok", "a ok")], [reading("u ok", "a ok", "u ok", "u ok", "a ok")])
    assert chats(lines) == "--AAA"


def test_a_turn_that_fits_lost_ones_as_well_is_ambiguous() -> None:
    lines = transcript([turn("A", "u ok", "a ok")], [reading("u ok", "a ok", "u ok", "a ok")])
    assert ambiguous(lines) == {"A"}


def test_a_turn_reported_before_all_of_its_answers_is_ambiguous_beside_a_shorter_one() -> None:
    lines = transcript([turn("A", "u ok", "a ok")], [reading("u ok", "a ok", "a more", "u ok", "a ok")])
    assert (chats(lines), ambiguous(lines)) == ("---AA", {"A"})


def test_neighbours_that_are_certain_decide() -> None:
    turns = [turn("A", "u a", "a A", at=0), turn("B", "u ok", "a ok", at=5), turn("C", "u c", "a C", at=10)]
    history = ["u ok", "a ok", "u a", "a A", "u ok", "a ok", "u c", "a C", "u ok", "a ok"]
    lines = transcript(turns, [reading(*history)])
    assert (chats(lines), ambiguous(lines)) == ("--AABBCC--", set())


def test_neighbours_decide_nothing_where_times_are_too_close() -> None:
    turns = [turn("A", "u a", "a A", at=0), turn("B", "u ok", "a ok", at=1)]
    lines = transcript(turns, [reading("u ok", "a ok", "u a", "a A", "u ok", "a ok")])
    assert (chats(lines), ambiguous(lines)) == ("--AABB", {"B"})


def test_an_earlier_reading_decides() -> None:
    first = ["u ok", "a ok", "u x", "a x"]
    readings = [reading(*first, at=5), reading(*first, "u ok", "a ok", at=20)]
    for at, expected in ((1, "AA----"), (10, "----AA")):
        lines = transcript([turn("A", "u ok", "a ok", at=at)], readings)
        assert (chats(lines), ambiguous(lines)) == (expected, set())


def test_turns_of_one_instant_that_say_the_same_are_ambiguous() -> None:
    turns = [turn(name, "u ok", "a ok", at=1) for name in "AB"]
    assert ambiguous(transcript(turns, [reading(*["u ok", "a ok"] * 2)])) == {"A", "B"}


def test_turns_that_say_the_same_are_ambiguous_where_times_of_the_session_are_wrong() -> None:
    turns = [turn("A", "u ok", "a ok", at=1), turn("B", "u ok", "a ok", at=3), turn("X", "u x", "a x", at=0.5)]
    history = ["u ok", "a ok", "u ok", "a ok"]
    assert ambiguous(transcript(turns, [reading("u x", "a x", *history)])) == set()
    assert ambiguous(transcript(turns, [reading(*history, "u x", "a x")])) == {"A", "B"}


def test_a_turn_that_came_too_late_in_time_finds_its_lines_by_its_input() -> None:
    """Its time is a little wrong: by that alone no reading could show it, nor at that place."""
    late = turn("A", "u a", "a draft", at=100.5, told=90)
    lines = transcript([late, turn("B", "u b", "a B", at=100)], [reading("u a", "a final", "u b", "a B", at=100)])
    assert chats(lines) == "AABB"


def test_a_turn_makes_room_for_one_that_fits_nowhere_else() -> None:
    turns = [turn("B", "u ok", "a ok", at=1), turn("A", "u ok", "a ok", "a ok", at=1.5)]
    lines = transcript(turns, [reading("u ok", "a ok", "a ok", "u ok", "a ok")])
    assert chats(lines) == "AAABB"
    assert not any(line.in_history is False for line in lines)


def test_living_turns_come_before_deleted_ones() -> None:
    deleted = msgspec.structs.replace(turn("A", "u ok", "a ok", at=1), is_deleted=True)
    lines = transcript([deleted, turn("B", "u ok", "a ok", at=2)], [reading("u ok", "a ok")])
    assert {line.chat_id for line in lines if line.in_history} == {"B"}
