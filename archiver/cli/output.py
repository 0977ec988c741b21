"""What is printed, and what numbers are called where one is wrong."""

import os
import sys

import click
from rich.console import Console
from rich.progress import Progress, ProgressColumn

WIDE = 10_000  # characters


def console() -> Console:
    """On stdout. What is no terminal has no width: nothing is cut or wrapped for whoever searches it."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if has_width else Console(width=WIDE)


def progress(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """A bar on stderr; nothing where that is no terminal, or where there is to be `quiet`."""
    on_stderr = Console(stderr=True)
    return Progress(*columns, console=on_stderr, disable=quiet or not on_stderr.is_terminal)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 seal`, `2 seals`; `plural` where that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class Whole(click.IntRange):
    """A whole number within bounds."""

    name = "whole number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """In the help."""
        del param, ctx
        return "N"


class Number(click.FloatRange):
    """A number within bounds."""

    name = "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """In the help."""
        del param, ctx
        return "X"
