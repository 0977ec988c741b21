"""A connection that is reused only if it received exactly one response.

Else what is left of one answer, as the body that a 204 must not have, would be taken for the beginning of the next.
"""

import asyncio
import re
import ssl
from typing import Any

import httpcore2

MAX_KEPT = 262_144  # bytes; an answer that is whole has fewer

# What one attempt may cost: a receiver that keeps answering takes the time in which others could be served.
MAX_BYTES = 262_144  # that come on the wire
READ_BYTES = 4_096  # that are parsed at a time
MAX_INFORMATIONAL = 16  # responses 1xx before the one that is asked for
FREE_READS, READS_PER_SECOND = 64, 100

_INFORMATIONAL = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9]")
_MAX_MATCH = 12


class VerifiedStream(httpcore2.AsyncNetworkStream):
    """A connection that remembers what came since something was last sent."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._came = bytearray()
        self._is_clean = False
        self._bytes = self._reads = self._informational = 0
        self._tail = b""
        self._ahead = b""  # came, and is not parsed yet
        self._is_body = False

    def begin_body(self) -> None:
        """Note that the head of the answer has been read."""
        self._is_body = True

    def settle(self, body: bytes) -> None:
        """Set the body of the response; then it is known whether anything else arrived."""
        _, _, rest = self._came.partition(b"\r\n\r\n")
        self._is_clean = rest == body and not self._has_decrypted()  # an answer in chunks is none of these

    def _has_decrypted(self) -> bool:
        """Whether more was received than was read: it shows neither here nor at the socket."""
        tls = self._stream.get_extra_info("ssl_object")
        if tls is None:
            return False
        try:
            tls.read(1)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            return True  # it was ended
        return True

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  # the library's name
        """As the library says."""
        if self._ahead:
            await asyncio.sleep(0)  # others come first
        else:
            self._reads += 1
            if self._reads > FREE_READS:
                await asyncio.sleep(1 / READS_PER_SECOND)
            self._ahead = await self._stream.read(max_bytes, timeout)
            self._check(self._ahead)
            if len(self._came) < MAX_KEPT:
                self._came += self._ahead
        part, self._ahead = self._ahead[:READ_BYTES], self._ahead[READ_BYTES:]
        return part

    def _check(self, part: bytes) -> None:
        self._bytes += len(part)
        if not self._is_body:
            began = len(self._tail)
            seen = self._tail + part
            self._informational += sum(match.end() > began for match in _INFORMATIONAL.finditer(seen))
            self._tail = seen[-_MAX_MATCH:]
        if self._bytes > MAX_BYTES or self._informational > MAX_INFORMATIONAL:
            raise httpcore2.RemoteProtocolError("the response has no end")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # the library's name
        """As the library says."""
        self._came.clear()
        self._is_clean = self._is_body = False
        self._bytes = self._reads = self._informational = 0
        self._tail = self._ahead = b""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """As the library says."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # the library's name
    ) -> httpcore2.AsyncNetworkStream:
        """As the library says."""
        return VerifiedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """As the library says, which closes an idle connection on which there is something to read."""
        if info == "is_readable" and not self._is_clean:
            return True
        return self._stream.get_extra_info(info)
