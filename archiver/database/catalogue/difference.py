"""One difference between the database and what this version expects."""

from typing import Literal

import msgspec


class Difference(msgspec.Struct, frozen=True):
    """A difference. `object`: kind and qualified name; `repairs`: the SQL that undoes the difference, if any can.

    A failure breaks a guarantee of the archive; a warning reports something unexpected that does no harm.
    """

    object: str
    verdict: Literal["failure", "warning"]
    detail: str
    advice: str
    repairs: tuple[str, ...] = ()
