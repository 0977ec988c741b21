"""What each role may see and do."""

from collections.abc import Mapping
from typing import Literal

from archiver.console.accounts import Role

# figures: counts, states and ids. content: what was said. evidence: exact bytes, seals, audit log, holds, quarantine.
# operation: follow-ups and quarantine, and the actions where ARCHIVER_CONSOLE_ACTS is on.
Permission = Literal["figures", "content", "evidence", "operation"]

GRANTED: Mapping[Role, frozenset[Permission]] = {
    "viewer": frozenset({"figures"}),
    "reader": frozenset({"figures", "content"}),
    "auditor": frozenset({"figures", "content", "evidence"}),
    "operator": frozenset({"figures", "content", "operation"}),
}
