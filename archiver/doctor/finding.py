"""What a check says."""

from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was checked. `advice` is empty where there is nothing to do."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""
