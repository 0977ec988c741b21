"""The body of a request, and no more of it than is allowed."""

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope


class BodyTooLargeError(Exception):
    """The body is larger than ARCHIVER_MAX_BODY allows."""


class BodyIncompleteError(Exception):
    """The body is not as long as Content-Length tells; send it again, without an Upgrade header."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises `BodyTooLargeError` as soon as it is known to exceed `limit` bytes, be that told or not, Starlette's
    `ClientDisconnect` where the connection ends before the body does, and `BodyIncompleteError` where the server
    lost it: Uvicorn's parser takes what follows an `Upgrade` that it does not know for another protocol.
    """
    told = None
    for name, value in scope["headers"]:
        if name == b"content-length":
            told = int(value)
    if told is not None and told > limit:
        raise BodyTooLargeError
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLargeError
        parts.append(part)
        more = message.get("more_body", False)
    if told != size and (told is not None or (size == 0 and _offers_upgrade(scope))):
        raise BodyIncompleteError
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _offers_upgrade(scope: Scope) -> bool:
    return any(name == b"upgrade" for name, _ in scope["headers"])
