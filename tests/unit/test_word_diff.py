"""The comparison of two texts, word by word, for the pages of the console."""

from hypothesis import given
from hypothesis import strategies as st

from archiver.console.word_diff import MAX_WORDS, Part, compare

TEXTS = st.text(st.sampled_from("ab .,\nü"), max_size=60)


@given(TEXTS, TEXTS)
def test_the_parts_give_both_texts(before: str, after: str) -> None:
    parts = compare(before, after)
    assert "".join(part.text for part in parts if part.kind != "added") == before
    assert "".join(part.text for part in parts if part.kind != "removed") == after


def test_only_the_words_that_differ_are_marked() -> None:
    assert compare("The refund takes three days.", "The refund takes five days.") == [
        Part("same", "The refund takes "),
        Part("removed", "three"),
        Part("added", "five"),
        Part("same", " days."),
    ]


def test_i12_long_texts_that_differ_are_not_compared_word_by_word() -> None:
    before, after = "a b " * MAX_WORDS, "b c " * MAX_WORDS
    assert [part.kind for part in compare(before, after)] == ["removed", "added", "same"]
