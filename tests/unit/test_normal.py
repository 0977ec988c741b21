"""Two encodings of the same words have one normalised form; different words have different forms."""

import html
import unicodedata
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archiver.events.normal import normal_text

TEXT = "Größe & <Farbe>: 5 €\nnaïve\tcafé"
WRITTEN = [
    TEXT + "\n",
    "  " + TEXT,
    TEXT.replace("\n", "\r\n"),
    TEXT.replace("\n", "\r"),
    TEXT.replace(" ", "\u00a0"),
    TEXT.replace(" ", "\u202f\u2009"),
    unicodedata.normalize("NFD", TEXT),
    html.escape(TEXT),
    html.escape(html.escape(TEXT)),
    TEXT.replace(" ", "&nbsp;").replace("é", "&eacute;").replace("ö", "&#246;").replace("€", "&#x20ac;"),
    "\ufeff" + TEXT,
]


@pytest.mark.parametrize("written", WRITTEN)
def test_the_same_words_have_one_form(written: str) -> None:
    assert normal_text(written) == normal_text(TEXT)


@pytest.mark.parametrize("other", ["Größe", "grösse & <farbe>: 5 €\nnaive\tcafe", TEXT + ".", TEXT.replace("5", "6")])
def test_other_words_have_another(other: str) -> None:
    assert normal_text(other) != normal_text(TEXT)


def test_compatibility_characters_stay_apart() -> None:
    assert len({normal_text(each) for each in ("x2", "x\u00b2", "\ufb01", "fi", "\uff21", "A")}) == 6


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("&;#x3amplt \n"))))
@example("&amp;amp;amp;amp;lt;")
def test_a_form_is_its_own_form_but_for_entities_beyond_the_limit(text: str) -> None:
    once = normal_text(text)
    assert normal_text(once) == once or "&" in once
    assert normal_text(text + "\r\n") == once


def test_i12_no_text_takes_long_to_normalise() -> None:
    started = process_time()
    marks = "\u0301\u0316" * 250_000
    assert normal_text(f"a{marks}b") == normal_text(f"a{marks}b".replace(marks, marks[:30]))
    assert process_time() - started < 2


def test_marks_and_symbols_that_texts_have_stay() -> None:
    for text in ("a" + "\u0301\u0316" * 10, "\u2500" * 500, "\U0001f44d" * 100):
        assert normal_text(text) == unicodedata.normalize("NFC", text)
