"""Reuse a connection only if it received exactly one response.

Otherwise the rest of one response, such as a forbidden body of a 204, would be read as the beginning of the next.
"""

import asyncio
import re
import ssl
from typing import Any

import httpcore2

MAX_KEPT = 262_144  # bytes; a complete response has fewer

# Limits of one attempt, because a receiver that keeps sending takes time from others.
MAX_BYTES = 262_144  # received per attempt
READ_BYTES = 4_096  # parsed at a time
MAX_INFORMATIONAL = 16  # 1xx responses before the final response
FREE_READS, READS_PER_SECOND = 64, 100

_INFORMATIONAL = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9]")
_MAX_MATCH = 12


class VerifiedStream(httpcore2.AsyncNetworkStream):
    """A connection that remembers the bytes received since the last write."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._came = bytearray()
        self._is_clean = False
        self._bytes = self._reads = self._informational = 0
        self._tail = b""
        self._ahead = b""  # received, not yet parsed
        self._is_body = False

    def begin_body(self) -> None:
        """Record that the headers of the response have been read."""
        self._is_body = True

    def settle(self, body: bytes) -> None:
        """Compare the received bytes with this body; the connection is reusable only if nothing else arrived."""
        _, _, rest = self._came.partition(b"\r\n\r\n")
        self._is_clean = rest == body and not self._has_decrypted()  # never true for a chunked response

    def _has_decrypted(self) -> bool:
        """Return whether TLS has decrypted bytes that were not read, which the socket does not show."""
        tls = self._stream.get_extra_info("ssl_object")
        if tls is None:
            return False
        try:
            tls.read(1)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            return True  # the connection was closed
        return True

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  # the library's name
        """Implement the method of the library."""
        if self._ahead:
            await asyncio.sleep(0)  # lets other tasks run
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
            raise httpcore2.RemoteProtocolError("the response does not end")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # the library's name
        """Implement the method of the library."""
        self._came.clear()
        self._is_clean = self._is_body = False
        self._bytes = self._reads = self._informational = 0
        self._tail = self._ahead = b""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Implement the method of the library."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # the library's name
    ) -> httpcore2.AsyncNetworkStream:
        """Implement the method of the library."""
        return VerifiedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Implement the method of the library, which closes an idle connection with unread data."""
        if info == "is_readable" and not self._is_clean:
            return True
        return self._stream.get_extra_info(info)
