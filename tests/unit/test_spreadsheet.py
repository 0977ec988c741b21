"""CSV cells that a spreadsheet would run are made harmless, and can be restored."""

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archiver.compliance.export import spreadsheet
from archiver.compliance.export.spreadsheet import neutralise_cell, neutralise_line, restore_cell

TRIGGERS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
PIECES = st.sampled_from([*TRIGGERS, *"'\" ,;a1\x1b\x9b\x07\x7f\u241b\u200b\ufeff\xa0é😀", "1B", "\u241b1B"])
TEXTS = st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=20)).map(
    lambda each: each.replace("\0", "").encode(errors="ignore").decode()
)


@pytest.mark.parametrize(
    ("cell", "harmless"),
    [
        ("=1+1", "'=1+1"),
        ('=HYPERLINK("http://example.com")', '\'=HYPERLINK("http://example.com")'),
        ("+1", "'+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("\tx", "'\tx"),
        ("  =1", "'  =1"),
        ("\ufeff=1", "'\ufeff=1"),
        ("\u200b@x", "'\u200b@x"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "''=1"),
        ("'tis", "'tis"),
        ("a=b", "a=b"),
        ("", ""),
        ("\x1b[31mred", "\u241b1B[31mred"),
        ("\x9b31m", "\u241b9B31m"),
        ("\x1b=1", "\u241b1B=1"),
        ("\u241b1B", "\u241b\u241b1B"),
    ],
)
def test_a_cell_that_would_be_run_is_harmless_and_can_be_restored(cell: str, harmless: str) -> None:
    assert neutralise_cell(cell) == harmless
    assert restore_cell(harmless) == cell


@given(TEXTS)
@example("'\t")
@example("'\u241b")
def test_every_cell_is_harmless_and_can_be_restored(cell: str) -> None:
    harmless = neutralise_cell(cell)
    assert harmless.strip("\u200b\ufeff \xa0")[:1] not in {*TRIGGERS} - {""}
    assert not any(each == "\x1b" or 128 <= ord(each) < 160 for each in harmless)
    assert restore_cell(harmless) == cell


def as_postgres(cells: list[str | None]) -> bytes:
    """A record as COPY writes it: NULL is nothing, an empty text is quoted."""
    written = []
    for cell in cells:
        if cell is None:
            written.append("")
        elif cell == "" or any(each in cell for each in ',"\r\n') or cell == "\\.":
            written.append('"' + cell.replace('"', '""') + '"')
        else:
            written.append(cell)
    return (",".join(written) + "\n").encode()


@given(st.lists(st.none() | TEXTS, min_size=2, max_size=4))
@example(["2024-01-15 09:30:00+00", None])
@example([None, "\t"])
def test_a_line_is_its_cells_made_harmless(cells: list[str | None]) -> None:
    line = neutralise_line(as_postgres(cells), set())
    (item,) = csv.reader(io.StringIO(line.decode(), newline=""))
    assert item == ["" if each is None else neutralise_cell(each) for each in cells]
    unchanged = [each is None or neutralise_cell(each) == each for each in cells]
    if all(unchanged):
        assert line == as_postgres(cells)


def test_a_number_stays_a_number() -> None:
    line = as_postgres(["-1.5", "-1.5", None])
    assert neutralise_line(line, {0}) == b'-1.5,"\'-1.5",\n'


def test_the_quick_look_passes_over_ordinary_lines() -> None:
    line = as_postgres(["ses_1", "2024-01-15 09:30:00.5+00", "Hello, how are you? fine-tuned", None])
    assert not spreadsheet._SUSPECT.search(line)
