"""Serve `POST /webhooks/callhq`."""

import asyncio
import time
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus

import msgspec
from prometheus_client import Counter
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from archiver import events, telemetry
from archiver.http.answers import ERRORS, answer_to
from archiver.http.bodies import Bodies, is_small
from archiver.http.connections import mark_authenticated
from archiver.inbound import Ingest, Outcome, QueueFullError, UnavailableError, signatures
from archiver.settings import Settings

# Refused clients that retry immediately take time from others: 1,000 such senders reduced the throughput of the
# receiver to a thirtieth.
REFUSAL_SECONDS = 0.25


class Receiver:
    """The receiver of webhooks: it checks headers, reads bytes, verifies the signature, parses and enqueues.

    It is plain ASGI, because request and response objects, router and middleware would be a large part of the cost of
    an event.
    """

    def __init__(
        self, configuration: Settings, verifier: signatures.Verifier, bodies: Bodies, ingest: Ingest
    ) -> None:
        self._bodies = bodies
        self._ingest = ingest
        self.use(configuration, verifier)

    def use(self, configuration: Settings, verifier: signatures.Verifier) -> None:
        """Verify deliveries with these settings from now on.

        Requests whose headers are already checked keep the previous settings.
        """
        self._verifier = verifier
        self._signs_url = configuration.webhook_scheme == "hmac" and "{url}" in configuration.hmac_template

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request as docs/http.md describes."""
        try:
            body, key_id = await self._authenticate(scope, receive)
        except ClientDisconnect:
            telemetry.received.labels("disconnected", "").inc()
            return
        except ERRORS as error:
            if isinstance(error, QueueFullError):
                await asyncio.sleep(REFUSAL_SECONDS)  # no body is in memory here
            refusal = _refusal(error, scope)
            if not is_small(scope):  # do not wait for a long body
                refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        delivery = events.Delivery(events.parse(body), datetime.now(UTC), key_id)
        try:
            outcome = await self._ingest.submit(delivery)
        except (QueueFullError, UnavailableError) as error:
            await _refusal(error, scope)(scope, receive, send)
        else:
            await _answer(outcome, send)

    async def _authenticate(self, scope: Scope, receive: Receive) -> tuple[bytes, str]:
        """Return body and key id; do not read the body if the headers cannot authenticate the request."""
        headers, verifier, signs_url = scope["headers"], self._verifier, self._signs_url
        try:
            verifier.check_headers(headers, time.time())
        except signatures.SignatureError:
            await self._bodies.check_length(scope, receive)
            raise
        self._ingest.check_room()
        body = await self._bodies.read(scope, receive)
        url = _url(scope) if signs_url else ""
        key_id = verifier.verify(body, headers, scope["method"], url, time.time())
        mark_authenticated(scope)
        return body, key_id


@cache
def _counter(status: str, reason: str | None) -> Counter:
    return telemetry.received.labels(status, reason or "")


async def _answer(outcome: Outcome, send: Send) -> None:
    _counter(outcome.status, outcome.reason).inc()
    if outcome.status == "quarantined":
        telemetry.refusals.record(status=outcome.status, reason=outcome.reason or "", detail=outcome.detail or "")
    body = msgspec.json.encode(outcome)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    code = 422 if outcome.status == "quarantined" else 200
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _url(scope: Scope) -> str:
    """Return the URL that the platform called, for signatures that cover it."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    query = scope["query_string"]
    target: bytes = host + scope["raw_path"] + (b"?" + query if query else b"")
    return f"{scope['scheme']}://{target.decode('latin-1')}"


def _refusal(error: Exception, scope: Scope) -> Response:
    """Return the response for an error; count and record it."""
    answer = answer_to(error)
    address = scope["client"][0] if answer.code == HTTPStatus.UNAUTHORIZED and scope["client"] else ""
    telemetry.received.labels(answer.status, answer.reason).inc()
    telemetry.refusals.record(status=answer.status, reason=answer.reason, detail=answer.detail, address=address)
    return answer.response()
