"""Extend Uvicorn's HTTP protocol with limits on the input, the time and the unread responses of a client.

A client that exceeds a limit gets an error response if possible, and is disconnected.
"""

import asyncio
import weakref
from enum import Enum
from typing import Any

import httptools
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from archiver import telemetry
from archiver.http.answers import CONNECTION_ANSWERS, Refused
from archiver.http.connection_limiter import ConnectionLimiter
from archiver.http.listening import DrainingLoop

MAX_HEAD = 65_536  # bytes of a request line and its headers
MAX_WAITING = 16  # pipelined requests behind the current one
MAX_DISCARDED = 65_536  # bytes of a body that arrive after its response
CHUNK = 16_384  # bytes parsed at a time; a limit can be exceeded by at most this much
LINGER_SECONDS = 2.0  # time during which further input is discarded, so that the client receives its response
GRACE_SECONDS = 1.0  # at shutdown, for a request that is just arriving
FRAMING = 8  # maximum ratio of chunked framing to the size of the body; trailers are ignored
MIN_BODY_RATE = 16_384  # bytes per second at which a body extends its deadline


def mark_authenticated(scope: Scope) -> None:
    """Mark the connection of this request as authenticated, which protects it from eviction."""
    connection = scope.get("state", {}).get("connection")
    if connection is not None and (client := connection()) is not None:
        client.mark_authenticated()


class Part(Enum):
    """The part of a request that is being read."""

    NOTHING = 1
    HEAD = 2
    BODY = 3


class Connection(HttpToolsProtocol):
    """One client connection; `app_state["limiter"]` limits all connections."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # The reference is weak because the scope of each request contains it; otherwise a cycle would remain for the
        # garbage collector.
        super().__init__(config, server_state, {**app_state, "connection": weakref.ref(self)}, _loop)
        self._limiter: ConnectionLimiter = app_state["limiter"]
        self._part = Part.NOTHING
        self._size = 0  # bytes of that part
        self._framed = 0  # bytes of a body with its framing
        self._since = self.loop.time()  # start of the part, or of the wait for it
        self._unsent_since: float | None = None  # since when bytes of a response are unread; None if there are none
        self._is_used = False  # at least one request was received
        self._discards_input = False  # further input is discarded
        self._is_lingering = False
        self._is_last = False  # the next response closes the connection
        self._response_transport: _ResponseTransport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in Uvicorn
        super().connection_made(transport)
        self.flow = _Flow(self)
        self._response_transport = _ResponseTransport(self)
        if not self._limiter.admit(self):
            self._refuse("too_many")
            if self._limiter.is_saturated:
                transport.close()
        elif isinstance(self.loop, DrainingLoop) and self.loop.is_draining:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limiter.remove(self)
        super().connection_lost(exc)
        # These objects refer to each other: break the cycle, so that nothing is left for the garbage collector.
        self.pipeline.clear()
        self._response_transport = None
        if self._is_used:
            self.cycle.transport = self.transport

    def data_received(self, data: bytes) -> None:
        if self._discards_input:
            return
        try:
            if len(data) <= CHUNK:
                self._feed(data)
            else:
                whole = memoryview(data)
                for start in range(0, len(data), CHUNK):
                    self._feed(whole[start : start + CHUNK])
        except httptools.HttpParserUpgrade:
            # The parser treats further input as another protocol, and no other protocol is supported.
            self._discards_input, self._part = True, Part.BODY
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            self._refuse(error.__context__.reason if isinstance(error.__context__, Refused) else "malformed")

    def _feed(self, piece: bytes | memoryview) -> None:
        if self._discards_input:
            return
        self.parser.feed_data(piece)
        if self._part is Part.HEAD:
            self._size += len(piece)
            if self._size > MAX_HEAD + CHUNK:  # the first piece may begin with the end of another request
                self._refuse("headers_too_large")
        elif self._part is Part.BODY:
            self._framed += len(piece)
            if self._framed > MAX_HEAD + CHUNK + FRAMING * self._size:
                self._refuse("headers_too_large")

    # The parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._size, self._since = Part.HEAD, 0, self.loop.time()

    def on_headers_complete(self) -> None:
        if self._size > MAX_HEAD - CHUNK and self._head_size() > MAX_HEAD:
            raise Refused("headers_too_large")
        if self._has_invalid_host() or self._has_ambiguous_framing():
            raise Refused("malformed")
        if len(self.pipeline) >= MAX_WAITING:
            raise Refused("too_many_waiting")
        super().on_headers_complete()
        if self._response_transport is not None:
            self.cycle.transport = self._response_transport
        if self._is_last:
            self.cycle.keep_alive = False
        self._is_used = True
        self._part, self._size, self._framed, self._since = Part.BODY, 0, 0, self.loop.time()
        self.headers = []  # trailers must not become headers, because a proxy in front may not have checked them

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self.cycle.response_complete and self._size > MAX_DISCARDED and not self._discards_input:
            telemetry.connections_refused.labels("body_unwanted").inc()
            self.end()
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._part = Part.NOTHING
        if self.cycle.response_complete:
            self._since = self.loop.time()

    def _has_invalid_host(self) -> bool:
        """Return whether a request has several `Host` headers, or none in HTTP/1.1 (RFC 9112, 3.2)."""
        version, hosts = self.parser.get_http_version(), sum(name == b"host" for name, _ in self.headers)
        return version not in {"1.0", "1.1"} or hosts > 1 or (hosts == 0 and version == "1.1")

    def _has_ambiguous_framing(self) -> bool:
        """Return whether a proxy may see the end of this request elsewhere (RFC 9112, 6.1 and 6.3)."""
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if not codings:
            return False
        has_length = any(name == b"content-length" for name, _ in self.headers)
        is_chunked = len(codings) == 1 and codings[0].strip(b" \t").lower() == b"chunked"
        return has_length or not is_chunked or self.parser.get_http_version() != "1.1"

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # Methods for the limiter

    @property
    def address(self) -> str:
        """Return the client's address; empty if it has none."""
        return self.client[0] if self.client else ""

    @property
    def is_occupied(self) -> bool:
        """Return whether a complete request is waiting for its response."""
        return self._is_answering and self._part is Part.NOTHING

    def mark_authenticated(self) -> None:
        """Mark the connection as authenticated."""
        self._limiter.mark_authenticated(self)

    def evict(self) -> None:
        """Close immediately, to make room for another connection."""
        self.transport.abort()

    # Closing

    def on_response_complete(self) -> None:
        """Start the next pipelined request, or wait for one without a separate timer."""
        self.server_state.total_requests += 1
        if self._response_transport is not None:
            self._response_transport.complete()
        if self.transport.is_closing() or self._is_lingering:
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._discards_input:
            self.end()
        elif self._part is Part.NOTHING:
            self._since = self.loop.time()
        self.flow.resume_reading()

    def shutdown(self) -> None:
        """Close after responding to accepted requests, and to requests that arrive within `GRACE_SECONDS`."""
        if self._is_last:
            return
        self._is_last = True
        if self._is_answering:
            self.cycle.keep_alive = False
        elif self._part is Part.NOTHING:
            self._since = self.loop.time()

    def end(self) -> None:
        """Close the connection; within a request, first discard input for a moment, because a reset could destroy the
        response (RFC 9112, 9.6).
        """
        if self._part is Part.NOTHING:
            self.transport.close()
        elif not self._is_lingering:
            self._linger()

    def _linger(self) -> None:
        self._discards_input = self._is_lingering = True
        self._since = self.loop.time()
        self.pipeline.clear()
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write_eof()

    def _refuse(self, reason: str) -> None:
        """Stop reading and send an error response, unless it could be taken for the response to an earlier
        request.
        """
        telemetry.connections_refused.labels(reason).inc()
        self._discards_input = True
        is_within_body = self._part is Part.BODY
        if is_within_body and self.pipeline:
            self.pipeline.popleft()  # an incomplete request is dropped; earlier ones get their responses
        elif is_within_body and self._is_answering:
            if not self.cycle.response_started:
                self.transport.write(self._answer(reason))
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._linger()
        elif is_within_body:
            self._linger()
        elif self._is_answering:
            self.cycle.keep_alive = False
        else:
            self.transport.write(self._answer(reason))
            self._linger()

    def _answer(self, reason: str) -> bytes:
        status, rest = CONNECTION_ANSWERS[reason]
        dates = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        return b"".join([status, *dates, rest])

    @property
    def _is_answering(self) -> bool:
        return self._is_used and not self.cycle.response_complete

    # Deadlines

    def check(self, now: float, timeout: float) -> None:
        """Close the connection if it is overdue at `now`; called several times a second."""
        if self._is_reading_too_slowly(now, 3 * timeout):
            telemetry.connections_refused.labels("not_reading").inc()
            self.transport.abort()
        elif self._is_lingering:
            if now - self._since > LINGER_SECONDS:
                self.transport.close()
        elif self.flow.read_paused:
            self._since = now  # the client is waiting for the response
        elif not self._discards_input and self._is_overdue(now - self._since, timeout):
            self._time_out()

    def _is_reading_too_slowly(self, now: float, seconds: float) -> bool:
        if not self.transport.get_write_buffer_size():
            self._unsent_since = None
        elif self._unsent_since is None:
            self._unsent_since = now
        return self._unsent_since is not None and now - self._unsent_since > seconds

    def _is_overdue(self, seconds: float, timeout: float) -> bool:
        if self._part is Part.BODY:
            return seconds > 3 * timeout + self._size / MIN_BODY_RATE
        if self._part is Part.HEAD:
            return seconds > timeout
        if self._is_last:
            timeout = GRACE_SECONDS
        elif self._is_used:  # longer, because a sender may reuse an idle connection at the moment it is closed
            timeout *= 3
        return not self._is_answering and seconds > timeout

    def _time_out(self) -> None:
        if self._part is Part.HEAD:
            self._refuse("slow_headers")
        elif self._part is Part.BODY:
            self._refuse("slow_body")
        else:
            if not self._is_used and not self._is_last:
                telemetry.connections_refused.labels("silent").inc()
            self.transport.close()


class _Flow(FlowControl):
    """Flow control that pauses reading while a pipelined request waits for an earlier response."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.transport)
        self._pipeline: Any = connection.pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class _ResponseTransport(asyncio.Transport):
    """A transport for responses that lingers on close and writes the headers with the first part of the body.

    ASGI recommends the joint write; separate writes would be two system calls and two packets.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._transport = connection, connection.transport
        self._has_begun, self._head = False, b""

    def write(self, data: Any) -> None:
        if not self._has_begun and self._connection.cycle.response_started:
            self._has_begun, self._head = True, data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def complete(self) -> None:
        """Finish the response, with or without a body."""
        if self._head:
            self._transport.write(self._head)
        self._has_begun, self._head = False, b""

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.complete()
        self._connection.end()
