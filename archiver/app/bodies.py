"""The bodies of requests, and no more of them than is allowed: of one, and of all that are being read."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

SMALL = 65_536  # bytes


class BodyTooLargeError(Exception):
    """The body is larger than ARCHIVER_MAX_BODY allows."""


class BodyIncompleteError(Exception):
    """The body is not as long as Content-Length tells; send it again, without an Upgrade header."""


class BodiesFullError(Exception):
    """Too much is being received at once; send this again in a moment."""


class Bodies:
    """At most `largest` bytes of one body, and `most` bytes of all that are being read; one always may be."""

    def __init__(self, largest: int, most: int) -> None:
        self.largest, self._most = largest, most
        self._bytes = 0

    async def check_unread(self, scope: Scope, receive: Receive) -> None:
        """Instead of reading it: raises `BodyTooLargeError` where that is told, or what has come already is."""
        told = _told_length(scope)
        if told is not None:
            if told > self.largest:
                raise BodyTooLargeError
            return
        try:
            async with asyncio.timeout(0):
                message = await receive()
        except TimeoutError:
            return
        if len(message.get("body", b"")) > self.largest:
            raise BodyTooLargeError

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises `BodyTooLargeError` as soon as it is known to be, be that told or not, `BodiesFullError` where too much
        is being read, Starlette's `ClientDisconnect` where the connection ends before the body does, and
        `BodyIncompleteError` where the server lost it: Uvicorn's parser takes what follows an `Upgrade` that it does
        not know for another protocol.
        """
        told = _told_length(scope)
        if told is not None and told > self.largest:
            raise BodyTooLargeError
        message = await _next(receive)
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._read_on(body, receive)
        if len(body) > self.largest:
            raise BodyTooLargeError
        if told != len(body) and (told is not None or (not body and _offers_upgrade(scope))):
            raise BodyIncompleteError
        return body

    async def _read_on(self, first: bytes, receive: Receive) -> bytes:
        parts, size, more = [first], len(first), True
        self._bytes += size
        try:
            while more:
                if size > self.largest:
                    raise BodyTooLargeError
                if self._bytes > self._most and self._bytes > size:
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


def _told_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


def is_small(scope: Scope) -> bool:
    """Whether the body is known to be so small that it may arrive unread."""
    told = _told_length(scope)
    return told is not None and told <= SMALL


def _offers_upgrade(scope: Scope) -> bool:
    return any(name == b"upgrade" for name, _ in scope["headers"])
