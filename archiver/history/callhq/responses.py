"""Results of calls to CallHQ: a response or an error."""

from datetime import UTC, datetime

import httpx2
import msgspec

from archiver import retry_after
from archiver.errors import ArchiverError

DEFAULT_PAUSE, MIN_PAUSE, MAX_PAUSE = 5.0, 1.0, 3600.0  # seconds

_UNAUTHORIZED = frozenset({401, 403})
_BUSY = frozenset({429, 503})
_ENCODINGS = frozenset({"", "identity", "gzip"})  # the requested encodings; others would not be decoded


class CallError(ArchiverError):
    """A call to CallHQ failed; the message gives the reason."""


class UnreachableError(CallError):
    """CallHQ did not give a usable response. Wait at least `retry_after` seconds before the next call."""

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after  # seconds


class UnauthorizedError(CallError):
    """CallHQ rejects the API key."""

    message = "CallHQ rejects the API key. Set CALLHQ_API_KEY to a valid key of the account."


class TooLargeError(CallError):
    """A response exceeds the size limit."""


class AttemptFailedError(ArchiverError):
    """One attempt failed."""


class AttemptTimedOutError(AttemptFailedError):
    """The response to one attempt was incomplete at its deadline."""


class ThrottledError(ArchiverError):
    """CallHQ requests a pause (429 or 503)."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"{status}, wait {seconds:.0f} s")
        self.status, self.seconds = status, seconds


class Answer(msgspec.Struct, frozen=True):
    """A response: HTTP status and the decompressed body, byte for byte.

    `began`: when the successful attempt began. Messages since then may be missing from the response.
    """

    status: int
    body: bytes
    began: datetime


def check(response: httpx2.Response) -> None:
    """Raise the matching error if the response is a failure."""
    status = response.status_code
    if status in _UNAUTHORIZED:
        raise UnauthorizedError
    if status in _BUSY:
        seconds = retry_after.parse(response.headers.get("retry-after", ""), datetime.now(UTC))
        raise ThrottledError(status, min(max(DEFAULT_PAUSE if seconds is None else seconds, MIN_PAUSE), MAX_PAUSE))
    if status >= 500:  # noqa: PLR2004  # server errors (RFC 9110, 15.6)
        raise AttemptFailedError(f"it returned {status}")
    if response.headers.get("content-encoding", "").strip().lower() not in _ENCODINGS:
        raise AttemptFailedError("it used a Content-Encoding that was not requested")


def failure(error: httpx2.RequestError) -> AttemptFailedError:
    """Return an error that describes a transport error.

    Only errors of connecting are quoted: later ones may contain request or response data.
    """
    if isinstance(error, httpx2.ConnectError):
        return AttemptFailedError(f"cannot connect: {error}")
    if isinstance(error, httpx2.ConnectTimeout):
        return AttemptFailedError("no connection in time")
    if isinstance(error, httpx2.ProtocolError | httpx2.DecodingError):
        return AttemptFailedError("its response is malformed or ended early")
    return AttemptFailedError(f"the connection failed ({type(error).__name__})")
