"""Client of CallHQ's documented API: one connection pool, bounded retries, one shared pause.

It returns responses without interpreting them. Neither key nor content enters a log line or an error.
"""

from archiver.history.callhq.access import printable
from archiver.history.callhq.client import Client, Limits, Pause
from archiver.history.callhq.probe import PauseRequestedError, probe
from archiver.history.callhq.responses import (
    Answer,
    CallError,
    TooLargeError,
    UnauthorizedError,
    UnreachableError,
)

__all__ = [
    "Answer",
    "CallError",
    "Client",
    "Limits",
    "Pause",
    "PauseRequestedError",
    "TooLargeError",
    "UnauthorizedError",
    "UnreachableError",
    "printable",
    "probe",
]
