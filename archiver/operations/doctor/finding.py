"""Results of checks."""

from collections.abc import Sequence
from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. `advice` is empty if no action is required."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""


MAX_NAMED = 5  # in one finding


def shortened(names: Sequence[str]) -> str:
    """Return the first `MAX_NAMED` names, and the number of the others."""
    more = f"; and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return "; ".join(names[:MAX_NAMED]) + more
