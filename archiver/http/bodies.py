"""Read request bodies within a limit for each body and a limit for all bodies together."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from archiver.errors import ArchiverError

SMALL_BODY = 65_536  # bytes


class BodyTooLargeError(ArchiverError):
    """The body exceeds ARCHIVER_MAX_BODY."""

    def __init__(self, most: int) -> None:
        super().__init__(f"The body is larger than {most} bytes (ARCHIVER_MAX_BODY).")


class BodyIncompleteError(ArchiverError):
    """The body is shorter than Content-Length."""

    message = "The body is shorter than Content-Length. Send it again, without an Upgrade header."


class BodiesFullError(ArchiverError):
    """Too many bodies are being received."""

    message = "Too many bodies are being received. Retry in a moment."


class Bodies:
    """A reader that limits, in bytes, each body and all bodies being read; a lone body may exceed the second."""

    def __init__(self, max_bytes: int, max_total: int) -> None:
        self.max_bytes, self._max_total = max_bytes, max_total
        self._bytes = 0

    async def check_length(self, scope: Scope, receive: Receive) -> None:
        """Raise `BodyTooLargeError` if Content-Length, or without it the part that has arrived, exceeds the limit.

        It does not wait for the body.
        """
        length = _content_length(scope)
        if length is not None:
            if length > self.max_bytes:
                raise BodyTooLargeError(self.max_bytes)
            return
        try:
            async with asyncio.timeout(0):
                message = await receive()
        except TimeoutError:
            return
        if len(message.get("body", b"")) > self.max_bytes:
            raise BodyTooLargeError(self.max_bytes)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body.

        Raises `BodyTooLargeError` as soon as the limit is exceeded, with or without Content-Length;
        `BodiesFullError` if too many bytes are being read; Starlette's `ClientDisconnect` if the connection ends
        before the body is complete; and `BodyIncompleteError` if the server lost a part: after an unknown `Upgrade`,
        Uvicorn's parser treats the body as another protocol.
        """
        declared = _content_length(scope)
        if declared is not None and declared > self.max_bytes:
            raise BodyTooLargeError(self.max_bytes)
        message = await _next(receive)
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._read_on(body, receive)
        if len(body) > self.max_bytes:
            raise BodyTooLargeError(self.max_bytes)
        if declared != len(body) and (declared is not None or (not body and _offers_upgrade(scope))):
            raise BodyIncompleteError
        return body

    async def _read_on(self, first: bytes, receive: Receive) -> bytes:
        parts, size, more = [first], len(first), True
        self._bytes += size
        try:
            while more:
                if size > self.max_bytes:
                    raise BodyTooLargeError(self.max_bytes)
                if self._bytes > self._max_total and self._bytes > size:
                    raise BodiesFullError
                message = await _next(receive)
                part: bytes = message.get("body", b"")
                parts.append(part)
                size += len(part)
                self._bytes += len(part)
                more = message.get("more_body", False)
        finally:
            self._bytes -= size
        return b"".join(parts)


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


def is_small(scope: Scope) -> bool:
    """Return whether the body is known to be so small that the connection can stay open while it arrives unread."""
    length = _content_length(scope)
    return length is not None and length <= SMALL_BODY


def _offers_upgrade(scope: Scope) -> bool:
    return any(name == b"upgrade" for name, _ in scope["headers"])
