"""Error responses to bytes that are not a valid request."""

from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from archiver.http.headers import RETRY_AFTER


class Refused(Exception):  # noqa: N818  # no error of ours: the parser carries it out of its callback
    """The client exceeded a limit."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_REFUSALS = {
    "malformed": (400, "This is not an HTTP/1.1 request."),
    "slow_headers": (408, "The headers did not arrive in time (ARCHIVER_CLIENT_TIMEOUT)."),
    "slow_body": (408, "The body did not arrive in time (ARCHIVER_CLIENT_TIMEOUT)."),
    "headers_too_large": (431, "Request line and headers are larger than 65536 bytes."),
    "too_many_waiting": (503, "Too many requests wait on this connection for the answer to another."),
    "too_many": (503, "Too many connections are open (ARCHIVER_MAX_CONNECTIONS)."),
}


def _answer(code: int, reason: str, detail: str) -> tuple[bytes, bytes]:
    body = msgspec.json.encode({"status": "refused", "reason": reason, "detail": detail})
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers |= RETRY_AFTER
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[code], lines.encode() + b"\r\n" + body


ANSWERS = {reason: _answer(code, reason, detail) for reason, (code, detail) in _REFUSALS.items()}
"""By reason: the status line, and what follows the server's own headers."""
