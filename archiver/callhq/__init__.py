"""CallHQ's documented API as a patient client: one connection pool, bounded retries, one pause that all share.

It tells what was answered, not what the answer means. Neither key nor content enters a log line or an error.
"""

from archiver.callhq.access import shown
from archiver.callhq.answers import (
    Answer,
    CallError,
    RefusedError,
    TooLargeError,
    UnauthorizedError,
    UnreachableError,
)
from archiver.callhq.client import Client, Pause
from archiver.callhq.probe import WaitError, probe
from archiver.callhq.registry import Registry

__all__ = [
    "Answer",
    "CallError",
    "Client",
    "Pause",
    "RefusedError",
    "Registry",
    "TooLargeError",
    "UnauthorizedError",
    "UnreachableError",
    "WaitError",
    "probe",
    "shown",
]
