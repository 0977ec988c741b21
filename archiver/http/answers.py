"""Map errors to responses: one table for exceptions, one for faults of a connection.

Only `console.failures`, for pages, also maps errors to status codes.
"""

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from archiver.errors import ArchiverError
from archiver.events.responses import InvalidRegistrationError
from archiver.http.bodies import BodiesFullError, BodyIncompleteError, BodyTooLargeError
from archiver.inbound import QueueFullError, UnavailableError
from archiver.inbound.signatures import SignatureError

RETRY_AFTER = {"retry-after": "5"}  # seconds (RFC 9110, 15.6.4)


class TokenError(ArchiverError):
    """The request has no bearer token, or one other than ARCHIVER_API_TOKEN."""

    message = "Send the token of ARCHIVER_API_TOKEN: Authorization: Bearer TOKEN."


class Answer(msgspec.Struct, frozen=True):
    """An error response. `reason`: empty if it repeats `status`. `detail`: empty if the error's own text is sent.

    `scheme`: the authentication scheme that a 401 names (RFC 9110, 15.5.2).
    """

    code: int
    status: str
    reason: str = ""
    detail: str = ""
    scheme: str = ""

    def response(self) -> Response:
        """Return the HTTP response."""
        content = {"status": self.status, "reason": self.reason or self.status, "detail": self.detail}
        headers = RETRY_AFTER if self.code == HTTPStatus.SERVICE_UNAVAILABLE else {}
        return JSONResponse(content, self.code, headers | ({"www-authenticate": self.scheme} if self.scheme else {}))


ANSWERS: Mapping[type[Exception], Answer] = {
    BodyIncompleteError: Answer(400, "incomplete", "incomplete"),
    ClientDisconnect: Answer(400, "incomplete", "incomplete", "The connection ended before the body was complete."),
    SignatureError: Answer(401, "unauthenticated", scheme="Webhook"),  # with the error's own reason
    TokenError: Answer(401, "unauthenticated", scheme="Bearer"),
    BodyTooLargeError: Answer(413, "too_large", "too_large"),
    InvalidRegistrationError: Answer(422, "invalid"),
    BodiesFullError: Answer(503, "overloaded"),
    QueueFullError: Answer(503, "overloaded"),
    UnavailableError: Answer(503, "unavailable"),
}
ERRORS = tuple(ANSWERS)


def answer_to(error: Exception) -> Answer:
    """Return the `Answer` for one of `ERRORS`, with its reason and detail."""
    answer = ANSWERS[type(error)]
    reason = error.reason if isinstance(error, SignatureError) else answer.reason
    return msgspec.structs.replace(answer, reason=reason, detail=answer.detail or str(error))


async def respond(_: Request, error: Exception) -> Response:
    """Return the response for one of `ERRORS` that a route raised."""
    return answer_to(error).response()


async def respond_to_routing(_: Request, error: Exception) -> Response:
    """Return the response to a request that matches no route (404, 405)."""
    if not isinstance(error, HTTPException):
        raise error
    content = {"status": "refused", "reason": error.detail.lower().replace(" ", "_"), "detail": f"{error.detail}."}
    return JSONResponse(content, error.status_code, error.headers)


class Refused(Exception):  # noqa: N818  # not an error to report: the parser passes it on from its callback
    """The client exceeded a limit of its connection; `reason` is a key of `CONNECTION_ANSWERS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _render(code: int, reason: str, detail: str) -> tuple[bytes, bytes]:
    body = msgspec.json.encode({"status": "refused", "reason": reason, "detail": detail})
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers |= RETRY_AFTER
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[code], lines.encode() + b"\r\n" + body


CONNECTION_ANSWERS: Mapping[str, tuple[bytes, bytes]] = {
    reason: _render(code, reason, detail)
    for reason, code, detail in (
        ("malformed", 400, "The input is not an HTTP/1.1 request."),
        ("slow_headers", 408, "The headers did not arrive in time (ARCHIVER_CLIENT_TIMEOUT)."),
        ("slow_body", 408, "The body did not arrive in time (ARCHIVER_CLIENT_TIMEOUT)."),
        ("headers_too_large", 431, "The request line and the headers are larger than 65536 bytes."),
        ("too_many_waiting", 503, "Too many requests are waiting on this connection."),
        ("too_many", 503, "Too many connections are open (ARCHIVER_MAX_CONNECTIONS)."),
    )
}
"""The status line, and the bytes that follow the server's default headers, by reason."""
