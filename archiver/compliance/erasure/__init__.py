"""Erasure: holds, orders, and deletion of content (I8)."""

from archiver.compliance.erasure.holds import (
    HoldError,
    covering,
    insert_hold,
    is_any_in_force,
    release_hold,
    select_holds,
)
from archiver.compliance.erasure.ordering import AuditEntry, HeldError, Ordered, order
from archiver.compliance.erasure.sweeping import sweep
from archiver.compliance.erasure.targets import Counts, Target
from archiver.compliance.legal_holds import Criteria

__all__ = [
    "AuditEntry",
    "Counts",
    "Criteria",
    "HeldError",
    "HoldError",
    "Ordered",
    "Target",
    "covering",
    "insert_hold",
    "is_any_in_force",
    "order",
    "release_hold",
    "select_holds",
    "sweep",
]
