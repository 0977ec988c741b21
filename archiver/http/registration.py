"""`POST /sessions`: the application registers the sessions that it opened."""

import asyncio
import hmac
from datetime import UTC, datetime

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from archiver.events import responses
from archiver.http.bodies import Bodies, BodiesFullError, BodyIncompleteError, BodyTooLargeError
from archiver.http.connections import mark_authenticated
from archiver.http.headers import RETRY_AFTER
from archiver.inbound import Delivery, Ingest, Outcome, QueueFullError, UnavailableError


class Registration:
    """`POST /sessions`: registers sessions that the application opened, so that each is reconciled."""

    def __init__(self, token: str, bodies: Bodies, ingest: Ingest) -> None:
        self._bodies, self._ingest = bodies, ingest
        self.use(token)

    def use(self, token: str) -> None:
        """Require this token from now on."""
        self._token = token.encode()

    async def register(self, request: Request) -> Response:
        """Store all sessions, then return 200 with the number of new ones."""
        if not self._token:
            raise HTTPException(404)
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            detail = "Send the token of ARCHIVER_API_TOKEN: Authorization: Bearer TOKEN."
            return JSONResponse(_error_response("unauthenticated", detail), 401, {"www-authenticate": "Bearer"})
        mark_authenticated(request.scope)
        try:
            sessions = responses.registrations(await self._bodies.read(request.scope, request.receive))
        except (BodyTooLargeError, BodiesFullError, BodyIncompleteError, ClientDisconnect, ValueError) as error:
            return self._refusal(error)
        now = datetime.now(UTC)
        deliveries = [Delivery(session, now, None, source=responses.APPLICATION) for session in sessions]
        results = await asyncio.gather(*map(self._ingest.submit, deliveries), return_exceptions=True)
        faults = [result for result in results if isinstance(result, BaseException)]
        for fault in faults:
            if not isinstance(fault, QueueFullError | UnavailableError):
                raise fault
            # What is committed already is known by then, and registering it again changes nothing.
            return JSONResponse(_error_response("unavailable", str(fault)), 503, RETRY_AFTER)
        if any(isinstance(result, Outcome) and result.status == "quarantined" for result in results):
            detail = "Some of them could not be stored: see archiver quarantine list."
            return JSONResponse(_error_response("quarantined", detail), 422)
        stored = sum(isinstance(result, Outcome) and result.status == "stored" for result in results)
        is_spooled = any(isinstance(result, Outcome) and result.status == "spooled" for result in results)
        status = "spooled" if is_spooled else "stored"
        return JSONResponse({"status": status, "sessions": len(sessions), "new": stored})

    def _refusal(self, error: Exception) -> Response:
        if isinstance(error, BodyTooLargeError):
            detail = f"Send at most {self._bodies.max_bytes} bytes (ARCHIVER_MAX_BODY)."
            return JSONResponse(_error_response("too_large", detail), 413)
        if isinstance(error, BodiesFullError):
            return JSONResponse(_error_response("overloaded", str(error)), 503, RETRY_AFTER)
        return JSONResponse(_error_response("invalid", str(error)), 422)


def _error_response(status: str, detail: str) -> dict[str, str]:
    return {"status": status, "reason": status, "detail": detail}
