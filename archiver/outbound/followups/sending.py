"""Make one delivery attempt: a POST without redirects, proxies or cookies."""

import asyncio
import ssl
from datetime import UTC, datetime
from time import monotonic, time
from types import TracebackType
from typing import Literal, Self

import httpcore2
import msgspec
import structlog

from archiver import retry_after, telemetry
from archiver.inbound.signatures import standard_webhooks
from archiver.inbound.signatures.standard_webhooks import SecretError
from archiver.outbound.followups import guard
from archiver.outbound.followups.guard import (
    AddressRefusedError,
    Endpoint,
    GuardedNetwork,
    HostNotFoundError,
    Resolve,
    resolve,
)
from archiver.outbound.followups.schedule import MAX_RETRY_AFTER
from archiver.outbound.followups.subscriptions import Subscription
from archiver.outbound.followups.verified_stream import VerifiedStream

log = structlog.get_logger(__name__)

SECONDS = 15.0  # for an attempt, up to the last byte of the response
MAX_ANSWER_BYTES = 65_536  # per response
MAX_PARTS = 256  # per response; each chunk of a chunked response counts as one
KEPT = 256  # bytes of a response that are stored
IDLE_SECONDS = 4.0  # an idle connection is kept this long; servers keep it longer
GONE = 410

Fault = Literal[
    "refused_address",  # the host resolves to an address that must not be used
    "unknown_host",
    "no_connection",
    "bad_certificate",  # or no TLS at all
    "timeout",
    "broken_answer",  # ended early, or not HTTP
    "failed_here",
    "bad_secret",  # damaged in the database
    "redirect",
    "not_2xx",
]


class Attempt(msgspec.Struct, frozen=True):
    """The result of an attempt. `status`: of the response. `fault`: None for 2xx. `answer`: first bytes of the body.

    `retry_after`: seconds requested by the receiver.
    """

    at: datetime
    seconds: float
    status: int | None = None
    fault: Fault | None = None
    answer: bytes = b""
    retry_after: float | None = None

    @staticmethod
    def refused() -> "Attempt":
        """Return the result of an attempt that was not made because the address is refused."""
        return Attempt(datetime.now(UTC), 0.0, fault="refused_address")


class Transport:
    """The connections to one receiver; use it in `async with`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int,
        allow_private: bool,
        seconds: float = SECONDS,
        trusted: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._endpoint, self._seconds = endpoint, seconds
        self._network = GuardedNetwork(
            is_encrypted=endpoint.is_encrypted, allow_private=allow_private, resolve=resolve
        )
        self._url = httpcore2.URL(
            scheme=endpoint.scheme, host=endpoint.host, port=endpoint.port, target=endpoint.target
        )
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=trusted or guard.ssl_context(),
            max_connections=concurrency,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=self._network,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        self._network.close()
        await self._pool.aclose()

    async def send(self, subscription: Subscription, message_id: str, body: bytes) -> Attempt:
        """Send one POST, signed with the current time, and return the result."""
        began, started = datetime.now(UTC), monotonic()

        def ended(**what: object) -> Attempt:
            return msgspec.structs.replace(Attempt(began, monotonic() - started), **what)

        try:
            headers = {
                "host": self._endpoint.authority,
                "content-type": "application/json",
                "user-agent": "callhq-archiver",
                "accept-encoding": "identity",
                **standard_webhooks.sign(subscription.keys(began), message_id, int(time()), body),
            }
            async with asyncio.timeout(self._seconds):
                return ended(**await self._exchange(headers, body))
        except TimeoutError:
            return ended(fault="timeout")
        except Exception as error:  # noqa: BLE001  # any error must count as an attempt, or it would be retried forever
            return ended(fault=_fault(error))

    async def _exchange(self, headers: dict[str, str], body: bytes) -> dict[str, object]:
        async with self._pool.stream("POST", self._url, headers=list(headers.items()), content=body) as response:
            stream = response.extensions.get("network_stream")
            if isinstance(stream, VerifiedStream):
                stream.begin_body()
            answer, parts = bytearray(), 0
            async for part in response.aiter_stream():
                answer += part
                parts += 1
                if len(answer) >= MAX_ANSWER_BYTES or parts >= MAX_PARTS:  # unread bytes close the connection
                    break
            else:
                if isinstance(stream, VerifiedStream):
                    stream.settle(bytes(answer))
            header_values = {name.lower(): value for name, value in response.headers}
            seconds = retry_after.parse(header_values.get(b"retry-after", b"").decode("latin-1"), datetime.now(UTC))
            return {
                "status": response.status,
                "fault": _judge(response.status),
                "answer": bytes(answer[:KEPT]),
                "retry_after": None if seconds is None else min(seconds, MAX_RETRY_AFTER),
            }


def _judge(status: int) -> Fault | None:
    if status in range(200, 300):
        return None
    return "redirect" if status in range(300, 400) else "not_2xx"


_FAULTS: tuple[tuple[type[Exception], Fault], ...] = (
    (AddressRefusedError, "refused_address"),
    (HostNotFoundError, "unknown_host"),
    (httpcore2.TimeoutException, "timeout"),
)


def _fault(error: Exception) -> Fault:
    """Return the fault for an error of an attempt."""
    for kind, fault in _FAULTS:
        if isinstance(error, kind):
            return fault
    if isinstance(error, httpcore2.ConnectError):
        # The library keeps the original error as an argument.
        is_about_tls = any(isinstance(each, ssl.SSLError) for each in error.args)
        return "bad_certificate" if is_about_tls else "no_connection"
    if isinstance(error, httpcore2.ProtocolError | httpcore2.NetworkError):
        return "broken_answer"
    telemetry.followup_defects.inc()
    if isinstance(error, SecretError):
        return "bad_secret"
    log.error("follow-up attempt failed in the archiver", exc_info=(type(error), error, error.__traceback__))
    return "failed_here"
