"""A connection that is used again only if all that came on it was the one answer that was asked for.

Else what is left of one answer, as the body that a 204 must not have, would be taken for the beginning of the next.
"""

import ssl
from typing import Any

import httpcore2

MOST_KEPT = 262_144  # bytes; an answer that is whole has fewer


class Wire(httpcore2.AsyncNetworkStream):
    """A connection that remembers what came since something was last sent."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._came = bytearray()
        self._is_clean = False

    def settle(self, body: bytes) -> None:
        """Tell what the body of the answer was; whether nothing else came is known from then on."""
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
        part = await self._stream.read(max_bytes, timeout)
        if len(self._came) < MOST_KEPT:
            self._came += part
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # the library's name
        """As the library says."""
        self._came.clear()
        self._is_clean = False
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
        return Wire(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """As the library says, which closes an idle connection on which there is something to read."""
        if info == "is_readable" and not self._is_clean:
            return True
        return self._stream.get_extra_info(info)
