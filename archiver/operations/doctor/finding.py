"""Results of checks."""

from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. `advice` is empty if no action is required."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""
