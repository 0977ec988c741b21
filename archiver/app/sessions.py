"""`POST /sessions`: the application tells which sessions it opened."""

import asyncio
import hmac
from datetime import UTC, datetime

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from archiver import history
from archiver.app.answers import RETRY_AFTER
from archiver.app.bodies import Bodies, BodiesFullError, BodyIncompleteError, BodyTooLargeError
from archiver.app.connections import prove
from archiver.ingest import Delivery, Ingest, Outcome, QueueFullError, UnavailableError


class Registration:
    """`POST /sessions`: the application tells which sessions it opened, so that each is read."""

    def __init__(self, token: str, bodies: Bodies, ingest: Ingest) -> None:
        self._bodies, self._ingest = bodies, ingest
        self.use(token)

    def use(self, token: str) -> None:
        """Demand this token from now on."""
        self._token = token.encode()

    async def register(self, request: Request) -> Response:
        """Answers once all of them are committed: 200 with how many were new."""
        if not self._token:
            raise HTTPException(404)
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            detail = "Send the token of ARCHIVER_API_TOKEN: Authorization: Bearer TOKEN."
            return JSONResponse(_problem("unauthenticated", detail), 401, {"www-authenticate": "Bearer"})
        prove(request.scope)
        try:
            sessions = history.registrations(await self._bodies.read(request.scope, request.receive))
        except (BodyTooLargeError, BodiesFullError, BodyIncompleteError, ClientDisconnect, ValueError) as error:
            return self._refusal(error)
        now = datetime.now(UTC)
        deliveries = [Delivery(session, now, None, source=history.APPLICATION) for session in sessions]
        results = await asyncio.gather(*map(self._ingest.submit, deliveries), return_exceptions=True)
        faults = [result for result in results if isinstance(result, BaseException)]
        for fault in faults:
            if not isinstance(fault, QueueFullError | UnavailableError):
                raise fault
            # What is committed already is known by then, and registering it again changes nothing.
            return JSONResponse(_problem("unavailable", str(fault.__doc__)), 503, RETRY_AFTER)
        if any(isinstance(result, Outcome) and result.status == "quarantined" for result in results):
            detail = "Some of them could not be stored: see archiver quarantine list."
            return JSONResponse(_problem("quarantined", detail), 422)
        stored = sum(isinstance(result, Outcome) and result.status == "stored" for result in results)
        is_spooled = any(isinstance(result, Outcome) and result.status == "spooled" for result in results)
        status = "spooled" if is_spooled else "stored"
        return JSONResponse({"status": status, "sessions": len(sessions), "new": stored})

    def _refusal(self, error: Exception) -> Response:
        if isinstance(error, BodyTooLargeError):
            detail = f"Send at most {self._bodies.largest} bytes (ARCHIVER_MAX_BODY)."
            return JSONResponse(_problem("too_large", detail), 413)
        if isinstance(error, BodiesFullError):
            return JSONResponse(_problem("overloaded", str(error.__doc__)), 503, RETRY_AFTER)
        return JSONResponse(_problem("invalid", str(error) or str(error.__doc__)), 422)


def _problem(status: str, detail: str) -> dict[str, str]:
    return {"status": status, "reason": status, "detail": detail}
