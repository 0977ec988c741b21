"""Reversibly make the cells of a CSV file harmless to spreadsheets and terminals.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@`, including full-width forms, as a formula; some
programs drop white space before it. A terminal obeys ESC, and the C1 control characters, each of which stands for
ESC and a letter. Source: OWASP, "CSV Injection"; ECMA-48. Hence two rules, in this order:

1. ESC (U+001B) and the characters from U+0080 to U+009F become U+241B and their code in two hexadecimal digits;
   U+241B itself becomes U+241B twice.
2. A cell that a spreadsheet could run is prefixed with an apostrophe.

Cells of numeric columns stay as they are: `-1.5` is a number there.
"""

import re
from collections.abc import Collection

_ESCAPE = "\u241b"  # SYMBOL FOR ESCAPE
_CONTROL = re.compile("[\x1b\x80-\x9f\u241b]")
_ESCAPED = re.compile("\u241b(\u241b|[0-9A-F]{2})")
# A cell that begins with apostrophes gets one more, so that restoring removes exactly one.
_RISKY = re.compile("'*[\\s\u200b-\u200f\u2060\ufeff]*[\t\r\n=+\\-@\uff0b\uff0d\uff1d\uff20]")
# Matches every line with a cell that must change, and few others. A sign after a letter or digit, as in a time, does
# not count.
_SUSPECT = re.compile(
    rb"(?:^|[^0-9A-Za-z])(?:[=+\-@\t\r]|\n(?!\Z))|\xef\xbc[\x8b\x8d\x9d\xa0]"  # signs, also full-width; white space
    rb"|\x1b|\xc2[\x80-\x9f]|\xe2\x90\x9b"  # control characters and their replacements
)
_CELL = re.compile(r'("(?:[^"]|"")*"|[^,"\n]*)(,|\n\Z|\Z)')


def neutralise_cell(cell: str) -> str:
    """Return the cell in a form that spreadsheets and terminals display but do not act on; see the rules above."""
    if _CONTROL.search(cell):
        cell = _CONTROL.sub(_code, cell)
    return f"'{cell}" if _RISKY.match(cell) else cell


def restore_cell(cell: str) -> str:
    """Return the original of a cell returned by `neutralise_cell`."""
    if cell.startswith("'") and _RISKY.match(cell):
        cell = cell[1:]
    return _ESCAPED.sub(lambda found: found[1] if found[1] == _ESCAPE else chr(int(found[1], 16)), cell)


def neutralise_line(line: bytes, numbers: Collection[int]) -> bytes:
    """Return one CSV record, as COPY writes it, with its cells neutralised.

    `numbers`: the indexes, from 0, of numeric columns. A harmless cell keeps its bytes, and therefore
    the difference between NULL (nothing) and an empty string (`""`).
    """
    if not _SUSPECT.search(line):
        return line
    pieces: list[str] = []
    for column, item in enumerate(_CELL.finditer(line.decode())):
        written, end = item[1], item[2]
        if column not in numbers:
            is_quoted = written.startswith('"')
            cell = written[1:-1].replace('""', '"') if is_quoted else written
            harmless = neutralise_cell(cell)
            if harmless != cell:
                written = '"' + harmless.replace('"', '""') + '"'
        pieces += (written, end)
        if end != ",":
            break
    return "".join(pieces).encode()


def _code(found: re.Match[str]) -> str:
    return _ESCAPE * 2 if found[0] == _ESCAPE else f"{_ESCAPE}{ord(found[0]):02X}"
