"""The HTTP service: its routes, its answers, and the only code that knows status codes."""

import asyncio
import gc
import hmac
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from archiver import database, events, history, schema, settings, signatures, telemetry
from archiver.ingest import Delivery, Ingest, Outcome, QueueFullError, UnavailableError
from archiver.settings import Settings
from archiver.worker import timing_of

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/callhq"
RETRY_AFTER_SECONDS = 5
READY_SECONDS = 3
FAILURE_SECONDS = 15


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
    if outcome.status == "quarantined":
        telemetry.refusals.tell(status=outcome.status, reason=outcome.reason or "", detail=outcome.detail or "")
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
    if told != size and (told is not None or (size == 0 and _offers_upgrade(scope))):
        raise BodyIncompleteError
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _offers_upgrade(scope: Scope) -> bool:
    return any(name == b"upgrade" for name, _ in scope["headers"])


def _refusal(code: int, status: str, reason: str, detail: str) -> Response:
    telemetry.received.labels(status, reason).inc()
    telemetry.refusals.tell(status=status, reason=reason, detail=detail)
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


class Registration:
    """`POST /sessions`: the application tells which sessions it opened, so that each is read."""

    def __init__(self, token: str, max_body: int, ingest: Ingest) -> None:
        self._token, self._max_body, self._ingest = token.encode(), max_body, ingest

    async def register(self, request: Request) -> Response:
        """Answers once all of them are committed: 200 with how many were new."""
        if not self._token:
            raise HTTPException(404)
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            detail = "Send the token of ARCHIVER_API_TOKEN: Authorization: Bearer TOKEN."
            return JSONResponse(_problem("unauthenticated", detail), 401, {"www-authenticate": "Bearer"})
        try:
            sessions = history.registrations(await read_body(request.scope, request.receive, self._max_body))
        except BodyTooLargeError:
            return JSONResponse(
                _problem("too_large", f"Send at most {self._max_body} bytes (ARCHIVER_MAX_BODY)."), 413
            )
        except (BodyIncompleteError, ClientDisconnect, ValueError) as error:
            return JSONResponse(_problem("invalid", str(error) or str(error.__doc__)), 422)
        now = datetime.now(UTC)
        deliveries = [Delivery(session, now, None, source=history.APPLICATION) for session in sessions]
        results = await asyncio.gather(*map(self._ingest.submit, deliveries), return_exceptions=True)
        faults = [result for result in results if isinstance(result, BaseException)]
        for fault in faults:
            if not isinstance(fault, QueueFullError | UnavailableError):
                raise fault
            # What is committed already is known by then, and registering it again changes nothing.
            retry = {"retry-after": str(RETRY_AFTER_SECONDS)}
            return JSONResponse(_problem("unavailable", str(fault.__doc__)), 503, retry)
        if any(isinstance(result, Outcome) and result.status == "quarantined" for result in results):
            detail = "Some of them could not be stored: see archiver quarantine list."
            return JSONResponse(_problem("quarantined", detail), 422)
        stored = sum(isinstance(result, Outcome) and result.status == "stored" for result in results)
        return JSONResponse({"status": "stored", "sessions": len(sessions), "new": stored})


def _problem(status: str, detail: str) -> dict[str, str]:
    return {"status": status, "reason": status, "detail": detail}


class Readiness:
    """Ready: an event could be committed now."""

    def __init__(self, engine: AsyncEngine, ingest: Ingest) -> None:
        self._engine, self._ingest = engine, ingest

    async def readyz(self, _: Request) -> Response:
        """Whether an event could be committed now, and if not, why."""
        fault = await self._fault()
        if fault is None:
            return JSONResponse({"status": "ready", "database": "ready"})
        answer = {"status": "not ready", "database": fault}
        return JSONResponse(answer, 503, {"retry-after": str(RETRY_AFTER_SECONDS)})

    async def _fault(self) -> str | None:
        try:
            async with asyncio.timeout(READY_SECONDS):
                is_read_only = await database.run_in_transaction(self._engine, _look)
        except TimeoutError:
            return f"silent for {READY_SECONDS} seconds"
        except SQLAlchemyError as error:
            return f"unavailable: {database.explain(error)}"
        except schema.SchemaError as error:
            return str(error)
        if is_read_only:
            return "read-only"
        # A full disk answers questions as ever, so what the last batch met counts too: but not for long, since
        # whoever is thought unready is sent no event that could prove the contrary.
        failed_at = self._ingest.failed_at
        has_failed = failed_at is not None and time.monotonic() - failed_at < FAILURE_SECONDS
        return "the last events could not be committed: see the log" if has_failed else None


def _look(connection: Connection) -> bool:
    schema.check(connection)
    return connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"


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
    asking = database.connect_async(url, pool_size=1, prepared_statements=prepared)
    ingest = Ingest(
        writing,
        queue_events=configuration.queue_events,
        queue_bytes=configuration.queue_bytes,
        batch_events=configuration.batch_events,
        timing=timing_of(configuration),
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        end_with_parent()
        _collect_less_garbage()
        async with ingest.running():
            yield
        await writing.dispose()
        await asking.dispose()
        log.info("stopped")

    receiver = Receiver(configuration, verifier, ingest)
    token = configuration.api_token.get_secret_value()
    app = Service(
        routes=[
            Route(WEBHOOK_PATH, receiver, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", Readiness(asking, ingest).readyz),
            Route("/metrics", metrics),
            Route("/sessions", Registration(token, configuration.max_body, ingest).register, methods=["POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.receiver = receiver
    app.router.redirect_slashes = False  # a redirect loses the body of whoever does not follow it
    return app


def end_with_parent() -> None:
    """A process that another one started does not outlive it, however that ended."""
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
