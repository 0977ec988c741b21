"""What each role may see and do."""

from collections.abc import Mapping
from typing import Literal

from archiver.settings.console_roles import Role

# figures: counts, states and ids, and the quarantine without bodies. content: what was said. evidence: exact bytes,
# proofs, seals, audit log, holds, exports. bodies: those of the quarantine. operation: follow-ups and settings;
# retry, pause and test. preservation: place and release holds, order erasures.
Permission = Literal["figures", "content", "evidence", "bodies", "operation", "preservation"]

GRANTED: Mapping[Role, frozenset[Permission]] = {
    "viewer": frozenset({"figures"}),
    "reader": frozenset({"figures", "content"}),
    "auditor": frozenset({"figures", "content", "evidence", "bodies", "preservation"}),
    "operator": frozenset({"figures", "content", "bodies", "operation"}),
}
