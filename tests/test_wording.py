"""Texts that a person would call the same, and texts that a person would call different."""

import html
import unicodedata
from collections.abc import Callable
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archiver.archive.transcript.wording import are_similar, text_key
from archiver.events.normal import normal_text

CHANGES: dict[str, Callable[[str], str]] = {
    "trailing line end": lambda text: text + "\n",
    "leading space": lambda text: "  " + text,
    "CR LF": lambda text: text.replace("\n", "\r\n"),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "entities": html.escape,
    "entities twice": lambda text: html.escape(html.escape(text)),
    "numeric entities": lambda text: text.encode("ascii", "xmlcharrefreplace").decode(),
    "no-break space": lambda text: text.replace(" ", "\u00a0"),
    "nbsp": lambda text: text.replace(" ", "&nbsp;"),
    "two spaces": lambda text: text.replace(" ", "  "),
    "tabs": lambda text: text.replace(" ", "\t"),
    "byte order mark": lambda text: "\ufeff" + text,
    "zero-width space": lambda text: text.replace(" ", " \u200b"),
    "typographic quotes": lambda text: text.replace("'", "\u2019").replace('"', "\u201d"),
    "ellipsis": lambda text: text.replace("...", "\u2026"),
    "variation selector": lambda text: text.replace("\u2764", "\u2764\ufe0f"),
    "guillemets": lambda text: text.replace('"', "\u00ab").replace("'", "\u2039"),
    "acute accents": lambda text: text.replace("'", "\u00b4"),
    "control characters": lambda text: f"\x07{text}\x7f",
    "marks of direction": lambda text: f"\u2067{text}\u2069\u061c",
    "narrow no-break space": lambda text: text.replace(" ", "\u202f"),
    "line separator": lambda text: text.replace("\n", "\u2028"),
    "en dash": lambda text: text.replace("-", "\u2013"),
}
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


DIFFERENT = [
    ("Отмените заказ, please help me now", "please help me now"),
    ("返金 please help me now", "please help me now"),
    ("great work \U0001f44d", "great work?"),
    ("can you call me now Отмените", "can you call me now?"),
    ("a < b and c > d here now", "a and c > d here now"),
    ("yes", "no"),
    ("order 12", "order 13"),
    ("order 1", "order 12"),
    ("Order number 4711, please", "Order number 4712, please"),
    ("I do want to cancel my subscription today", "I don't want to cancel my subscription today"),
    ("ok", "ok thanks"),
    ("yes", "yes please"),
    ("C#", "C1"),
    ("C++", "C"),
    ("it costs 10.5 in total today", "it costs 105 in total today"),
    ("great work \U0001f44d", "great work \U0001f44e"),
    ("\U0001f44d", "\U0001f44e"),
    ("My order number is 1", "My order number is 12"),
    ("please send it to 12 Main Street, Springfield 1", "please send it to 12 Main Street, Springfield 12"),
    ("the temperature outside is -5 degrees", "the temperature outside is 5 degrees"),
    ("***", "yes"),
    ("<no>", "yes"),
    ("card 12** please", "card 1345 please 2"),
    ("x\u00b2", "x2"),
    ("press #", "press 1"),
    ("press *", "press 1"),
    ("size X", "size 1"),
    ("is it 12", "is it ??"),
    ("10 of 12", "XX of 1X"),
    ("what is 2*4 then", "what is 214 then"),
    ("you are #1 for me", "you are 11 for me"),
    ("5x please", "51 please"),
    ("it costs 10\\.5 in total today", "it costs 105 in total today"),
    ("see [this](http://a.example)", "see [this](http://b.example)"),
    ("I would like a refund", "I would like a"),
    ("cancel", "cancellation"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_texts_are_neither_equal_nor_alike(one: str, other: str) -> None:
    assert normal_text(one) != normal_text(other)
    assert not are_similar(normal_text(one), normal_text(other))
    assert not are_similar(normal_text(other), normal_text(one))


LONG = "This is a rather long message of a user, which some system stored in a column that is too short for it. " * 3
ALIKE = [
    (LONG, LONG[:100]),
    (LONG, LONG[:255]),
    (LONG, LONG[:80] + "\u2026"),
    (LONG, LONG[:80] + "... [truncated]"),
    ("My card is 4111 1111 1111 1234", "My card is **** **** **** 1234"),
    ("My card is 4111 1111 1111 1234", "My card is XXXX-XXXX-XXXX-1234".replace("-", " ")),
    ("Call 555-0100 now", "Call ### now"),
    ("Call 555-0100 now", "Call [PHONE] now"),
    ("order 12", "order **"),
    ("order 12", "order 1*"),
    ("My PIN is 1234", "My PIN is xxxx"),
    ("My PIN is 1234", "My PIN is \u25cf\u25cf\u25cf\u25cf"),
    ("My PIN is 1234", "My PIN is \u25cf\u25cf34"),
    ("order 12", "order 1\u2022"),
    ("My order 12345 has 3 items", "My order ##### has # items"),
    ("Call 5 people at 7 pm", "Call * people at * pm"),
    ("I was born on 3.4.1985, flat 7b", "I was born on X.X.XXXX, flat Xb"),
    ("order 12", "order __"),
    ("AB12CD", "ABxxCD"),
    ("PIN 1234", "PIN \u2b1b\u2b1b\u2b1b\u2b1b"),
    ("Yes", "**Yes**"),
    ("no", "_no_"),
    ("1. First of 3 * 4", "1\\. First of 3 \\* 4"),
    ('say "hi"', 'say \\"hi\\"'),
    ("Write to jane@example.org please", "Write to <EMAIL> please"),
    ("**Hello there**, nice to see you", "Hello there, nice to see you"),
    ("Line one<br>line two of it", "Line one line two of it"),
    ("great work \U0001f44d", "great work"),
    ("great \U0001f44d work of you", "great work of you"),
    ("great work \U0001f44d ok", "great work ?? ok"),
    ("Größe und Übergröße", "Gr??e und ?bergr??e"),
]


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
