"""The HTTP service: its routes, its answers, and the only code that knows status codes."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache

import anyio.to_thread
import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from archiver import database, events, schema, settings, signatures, telemetry
from archiver.ingest import Delivery, Ingest, Outcome, QueueFullError, UnavailableError
from archiver.settings import Settings

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/callhq"
RETRY_AFTER_SECONDS = 5
READY_SECONDS = 2


class BodyTooLargeError(Exception):
    """The body is larger than ARCHIVER_MAX_BODY allows."""


class BodyIncompleteError(Exception):
    """The body is not as long as Content-Length tells; send it again, without an Upgrade header."""


class Receiver:
    """`POST /webhooks/callhq`: bytes, then signature, then meaning, then the queue.

    Plain ASGI: what request and response objects, router and middleware cost is a good part of what an event costs.
    """

    def __init__(self, configuration: Settings, verifier: signatures.Verifier, ingest: Ingest) -> None:
        self._max_body = configuration.max_body
        self._verifier = verifier
        self._ingest = ingest
        self._signs_url = configuration.webhook_scheme == "hmac" and "{url}" in configuration.hmac_template

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as docs/http.md has it."""
        try:
            body = await read_body(scope, receive, self._max_body)
            url = _url(scope) if self._signs_url else ""
            key_id = self._verifier.verify(body, scope["headers"], scope["method"], url, time.time())
        except ClientDisconnect:
            telemetry.received.labels("disconnected", "").inc()
            return
        except BodyIncompleteError as error:
            await _refusal(400, "incomplete", "incomplete", str(error.__doc__))(scope, receive, send)
            return
        except BodyTooLargeError:
            detail = f"The body is larger than {self._max_body} bytes (ARCHIVER_MAX_BODY)."
            await _refusal(413, "too_large", "too_large", detail)(scope, receive, send)
            return
        except signatures.SignatureError as error:
            await _refusal(401, "unauthenticated", error.reason, str(error))(scope, receive, send)
            return
        delivery = Delivery(events.parse(body), datetime.now(UTC), key_id)
        try:
            outcome = await self._ingest.submit(delivery)
        except QueueFullError as error:
            await _refusal(503, "overloaded", "", str(error.__doc__))(scope, receive, send)
        except UnavailableError as error:
            await _refusal(503, "unavailable", "", str(error.__doc__))(scope, receive, send)
        else:
            await _answer(outcome, send)


@cache
def _counter(status: str, reason: str | None) -> Counter:
    return telemetry.received.labels(status, reason or "")


async def _answer(outcome: Outcome, send: Send) -> None:
    _counter(outcome.status, outcome.reason).inc()
    body = msgspec.json.encode(outcome)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    code = 422 if outcome.status == "quarantined" else 200
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _url(scope: Scope) -> str:
    """The URL as the platform called it, for signatures that cover it."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    query = scope["query_string"]
    target: bytes = host + scope["raw_path"] + (b"?" + query if query else b"")
    return f"{scope['scheme']}://{target.decode('latin-1')}"


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
    if told is not None and told != size:
        raise BodyIncompleteError
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refusal(code: int, status: str, reason: str, detail: str) -> Response:
    telemetry.received.labels(status, reason).inc()
    content = {"status": status, "reason": reason or status, "detail": detail}
    return JSONResponse(content, code, _REFUSAL_HEADERS.get(code))


# RFC 9110: a 401 names a scheme to authenticate by (15.5.2), a 503 may say when to come again (15.6.4).
_REFUSAL_HEADERS = {401: {"www-authenticate": "Webhook"}, 503: {"retry-after": str(RETRY_AFTER_SECONDS)}}


async def healthz(_: Request) -> Response:
    """Alive: says nothing of the database."""
    return JSONResponse({"status": "alive"})


async def metrics(_: Request) -> Response:
    """Prometheus text."""
    return Response(telemetry.metrics(), media_type=telemetry.CONTENT_TYPE)


class Readiness:
    """Ready: an event could be committed now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def readyz(self, _: Request) -> Response:
        """Whether an event could be committed now, and if not, why."""
        fault = await anyio.to_thread.run_sync(self._fault)
        if fault is None:
            return JSONResponse({"status": "ready", "database": "ready"})
        answer = {"status": "not ready", "database": fault}
        return JSONResponse(answer, 503, {"retry-after": str(RETRY_AFTER_SECONDS)})

    def _fault(self) -> str | None:
        try:
            with database.transaction(self._engine, statement_seconds=READY_SECONDS) as connection:
                schema.check(connection)
                read_only = connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
        except SQLAlchemyError as error:
            return f"unavailable: SQLSTATE {database.sqlstate(error) or 'unknown'}"
        except schema.SchemaError as error:
            return str(error)
        return "read-only" if read_only else None


class Service(Starlette):
    """All routes; webhooks go straight to the receiver."""

    receiver: Receiver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] == WEBHOOK_PATH and scope["method"] == "POST":
            await self.receiver(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create(configuration: Settings | None = None) -> Service:
    """The composition root: settings to a service. Opens nothing until the server starts it.

    Raises `SettingsError` when a setting is missing or wrong.
    """
    configuration = configuration or settings.read()
    if configuration.database_url is None:
        raise settings.SettingsError("DATABASE_URL: not set; `archiver serve` sets it for the embedded database.")
    url = database.database_url(configuration.database_url.get_secret_value())
    verifier = signatures.verifier(configuration)

    prepared = configuration.prepared_statements
    writing = database.connect_async(url, pool_size=1, prepared_statements=prepared)
    # Readiness has a connection of its own, so that a busy writer does not make the service look dead.
    asking = database.connect(url, pool_size=1, prepared_statements=prepared)
    ingest = Ingest(
        writing,
        queue_events=configuration.queue_events,
        queue_bytes=configuration.queue_bytes,
        batch_events=configuration.batch_events,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        _end_with_parent()
        _collect_less_garbage()
        async with ingest.running():
            yield
        await writing.dispose()
        asking.dispose()
        log.info("stopped")

    receiver = Receiver(configuration, verifier, ingest)
    app = Service(
        routes=[
            Route(WEBHOOK_PATH, receiver, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", Readiness(asking).readyz),
            Route("/metrics", metrics),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.receiver = receiver
    app.router.redirect_slashes = False  # a redirect loses the body of whoever does not follow it
    return app


def _end_with_parent() -> None:
    """One of several receiving processes does not outlive the one that started them, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _collect_less_garbage() -> None:
    """What a request makes holds no cycles: the collector finds nothing, and looking cost a tenth of each event."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


async def _http_error(_: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    headers = error.headers if isinstance(error, HTTPException) else None
    content = {"status": "refused", "reason": detail.lower().replace(" ", "_"), "detail": f"{detail}."}
    return JSONResponse(content, code, headers)
