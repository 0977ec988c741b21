"""Texts that a person would call the same, and texts that a person would call different."""

import html
from collections.abc import Callable
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archiver.archive.transcript.wording import are_similar, text_key
from archiver.events.normal import normal_text
from tests.support.wordings import ALIKE, CHANGES, DIFFERENT

TEXTS = ['Größe & <Farbe>: "5 €"\nnaïve café ...', "I can't - really \u2764 it", "yes", "order 12", "a\nb"]

changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
@pytest.mark.parametrize("text", TEXTS)
def test_a_change_of_writing_changes_no_key(change: Callable[[str], str], text: str) -> None:
    assert text_key("user", change(text)) == text_key("user", text)


_texts = st.text(st.sampled_from("ab é&<'\"-\n12€"), max_size=30)


@given(_texts, st.lists(st.sampled_from(sorted(CHANGES)), max_size=3))
@example("<", ["entities", "entities twice", "entities twice"])
def test_any_changes_of_writing_change_no_key(text: str, names: list[str]) -> None:
    changed = text
    for name in names:
        changed = CHANGES[name](changed)
    assert normal_text(changed) == normal_text(text) or html.unescape(text) != text


@pytest.mark.parametrize("role", ["user", "User", "HUMAN", "human", " customer "])
def test_names_of_roles_are_no_difference(role: str) -> None:
    assert text_key(role, "x") == ("user", "x")
    assert text_key({"user": "ai"}.get(role, "Model"), "x") == ("assistant", "x")


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_texts_are_neither_equal_nor_alike(one: str, other: str) -> None:
    assert normal_text(one) != normal_text(other)
    assert not are_similar(normal_text(one), normal_text(other))
    assert not are_similar(normal_text(other), normal_text(one))


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_texts_that_were_cut_masked_or_reformatted_are_alike(one: str, other: str) -> None:
    assert are_similar(normal_text(one), normal_text(other))
    assert are_similar(normal_text(other), normal_text(one))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_different_numbers_are_never_alike(one: int, other: int) -> None:
    assert are_similar(f"please cancel my order number {one}", f"please cancel my order number {other}") == (
        one == other
    )


@pytest.mark.parametrize(
    ("masked", "whole"),
    [
        ("abcdefg " + "[AA] " * 20 + "end", "abcdefg " + "a " * 1_900 + "!"),
        ("tel " + "** " * 20 + "end", "tel " + "1 " * 1_900 + "!"),
        ("(more " * 20_000, "something else"),
        ("*" + "a" * 100_000, "something else"),
        ("_a*" * 30_000, "something else"),
        ("\\" * 100_000, "something else"),
    ],
    ids=["names", "numbers", "marks", "emphasis", "emphases", "escapes"],
)
def test_i12_no_text_of_a_user_takes_long_to_compare(masked: str, whole: str) -> None:
    started = process_time()
    assert not are_similar(masked, whole)
    assert process_time() - started < 2
