"""What is printed, and what numbers are called where one is wrong."""

import os
import sys

import click
from rich.console import Console

WIDE = 10_000  # characters


def console() -> Console:
    """On stdout. What is no terminal has no width: nothing is cut or wrapped for whoever searches it."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if has_width else Console(width=WIDE)


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
