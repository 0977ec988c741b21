"""What comes back from a call: an answer, or an error that says what came instead."""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import msgspec

DEFAULT_PAUSE, SHORTEST_PAUSE, LONGEST_PAUSE = 5.0, 1.0, 3600.0  # seconds

_UNAUTHORIZED = frozenset({401, 403})
_BUSY = frozenset({429, 503})
_ENCODINGS = frozenset({"", "identity", "gzip"})  # what we ask for: others would come undecoded, or in layers
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?", re.ASCII)


class CallError(Exception):
    """A call to CallHQ failed; the text says how."""


class UnreachableError(CallError):
    """No answer was to be had, after retries; another time there may be one, at the soonest after `retry_after`."""

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after  # seconds


class UnauthorizedError(CallError):
    """CallHQ refuses the key: set CALLHQ_API_KEY to a valid key of the account whose chats are archived."""

    def __init__(self) -> None:
        super().__init__(str(self.__doc__))


class TooLargeError(CallError):
    """An answer is larger than what is read of one."""


class RefusedError(CallError):
    """CallHQ answered with HTTP's `status` that it did not do what was asked, or told nothing of what it did."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


class FailedError(Exception):
    """One attempt failed. `was_sent`: the request may have arrived nevertheless."""

    def __init__(self, what: str, *, was_sent: bool) -> None:
        super().__init__(what)
        self.was_sent = was_sent


class BusyError(Exception):
    """CallHQ asks us to wait."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"{status}, wait {seconds:.0f} s")
        self.status, self.seconds = status, seconds


class Answer(msgspec.Struct, frozen=True):
    """What upstream answered: HTTP's status, and the body byte for byte once decompressed.

    `began`: when the attempt did that was answered; what was said from then on may be missing in the answer.
    """

    status: int
    body: bytes
    began: datetime


def check(response: httpx2.Response) -> None:
    """Raises for everything that is no answer."""
    status = response.status_code
    if status in _UNAUTHORIZED:
        raise UnauthorizedError
    if status in _BUSY:
        raise BusyError(status, _retry_after(response.headers.get("retry-after", "")))
    if status >= 500:  # noqa: PLR2004  # HTTP's server errors begin there
        raise FailedError(f"it answered {status}", was_sent=True)
    if response.headers.get("content-encoding", "").strip().lower() not in _ENCODINGS:
        raise FailedError("its answer has a Content-Encoding that was not asked for", was_sent=True)


def failure(error: httpx2.RequestError) -> FailedError:
    """Only what failed while connecting is quoted: later errors may hold what was sent or received."""
    if isinstance(error, httpx2.ConnectError):
        return FailedError(f"cannot connect: {error}", was_sent=False)
    if isinstance(error, httpx2.ConnectTimeout):
        return FailedError("no connection in time", was_sent=False)
    if isinstance(error, httpx2.ProtocolError | httpx2.DecodingError):
        return FailedError("its answer is broken, or ended early", was_sent=True)
    return FailedError(f"the connection failed ({type(error).__name__})", was_sent=True)


def _retry_after(header: str) -> float:
    """Seconds, from seconds or an HTTP date (RFC 9110, 10.2.3), within bounds."""
    text = header.strip()
    seconds = DEFAULT_PAUSE
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    elif text:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            pass
        else:
            aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            seconds = (aware - datetime.now(UTC)).total_seconds()
    return min(max(seconds, SHORTEST_PAUSE), LONGEST_PAUSE)


def member(body: bytes, name: str) -> dict[str, Any] | None:
    """The object that a JSON object holds under this name."""
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    held = document.get(name) if isinstance(document, dict) else None
    return held if isinstance(held, dict) else None
