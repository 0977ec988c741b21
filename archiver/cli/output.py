"""Console output and number formats."""

import os
import sys

import click
import msgspec
import rich.table
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.style import StyleType
from rich.text import Text

from archiver.cli import escaped

UNBOUNDED_WIDTH = 10_000  # characters
WIDE = 120  # characters; narrower terminals would break the cells of a table with many columns
MAX_SHOWN_FINDINGS = 20  # findings; the rest are only counted


def console() -> Console:
    """Return a console on stdout; it cuts and wraps lines only on a terminal or if COLUMNS is set."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if has_width else Console(width=UNBOUNDED_WIDTH)


def progress(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """Return a progress bar on stderr; it is disabled without a terminal or with `quiet`."""
    on_stderr = Console(stderr=True)
    return Progress(*columns, console=on_stderr, disable=quiet or not on_stderr.is_terminal)


class Table(rich.table.Table):
    """A table whose text cells can neither control the terminal nor act as markup; see `escaped`."""

    def add_row(
        self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        """Add a row. A cell that is a `Text` is printed unchanged."""
        safe = (Text(escaped(each)) if isinstance(each, str) else each for each in cells)
        super().add_row(*safe, style=style, end_section=end_section)


def print_table(table: rich.table.Table) -> None:
    """Print a table; on a terminal with fewer than `WIDE` columns, print its rows as blocks of lines instead."""
    shown = console()
    if shown.width >= WIDE:
        shown.print(table)
        return
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            if len(text := cell if isinstance(cell, Text) else Text(str(cell))):
                shown.print(Text.assemble(f"{column.header}: ", text), overflow="fold")
        shown.print()


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return number and noun, such as `1 seal`, `2 seals`; `plural` for irregular nouns."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def count_findings(number: int, page: str, *, are_shown: bool) -> str:
    """Return the sentence that counts the findings of a check; `page` explains them.

    `are_shown`: the first `MAX_SHOWN_FINDINGS` have been printed.
    """
    more = f"; the first {MAX_SHOWN_FINDINGS} are above" if are_shown and number > MAX_SHOWN_FINDINGS else ""
    return f"{counted(number, 'finding')}{more}; see {page}"


def print_json(value: object) -> None:
    """Print a value as indented JSON, for programs."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


class Whole(click.IntRange):
    """A parameter type: a whole number within bounds."""

    name = "whole number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Return the placeholder in --help."""
        del param, ctx
        return "N"


class Number(click.FloatRange):
    """A parameter type: a number within bounds."""

    name = "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Return the placeholder in --help."""
        del param, ctx
        return "X"
