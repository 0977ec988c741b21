"""Untrusted text in pages of the console."""

from archiver.console.rendering import snippet


def test_found_words_are_marked_and_the_rest_is_text() -> None:
    assert snippet("a **<b>** c ** d") == "a <mark>&lt;b&gt;</mark> c <mark> d</mark>"
    assert snippet("\u202eno words") == (
        '<span class="hidden-character" title="RIGHT-TO-LEFT OVERRIDE">U+202E</span>no words'
    )
