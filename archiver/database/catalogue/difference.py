"""One difference between the database and what this version expects."""

from typing import Literal

import msgspec


class Difference(msgspec.Struct, frozen=True):
    """`object` names it by kind and qualified name; `repairs` is the SQL that undoes it, where some statements do.

    A failure breaks a promise of the archive; a warning names what does not belong there but harms nothing.
    """

    object: str
    verdict: Literal["failure", "warning"]
    detail: str
    advice: str
    repairs: tuple[str, ...] = ()
