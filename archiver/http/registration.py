"""Serve `POST /sessions`: the application registers the sessions that it opened."""

import asyncio
import hmac
from datetime import UTC, datetime

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archiver.events import Delivery, responses
from archiver.http.answers import Answer, TokenError
from archiver.http.bodies import Bodies
from archiver.http.connections import mark_authenticated
from archiver.inbound import Ingest, Outcome


class Registration:
    """The route that registers sessions that the application opened, so that each is reconciled."""

    def __init__(self, token: str, bodies: Bodies, ingest: Ingest) -> None:
        self._bodies, self._ingest = bodies, ingest
        self.use(token)

    def use(self, token: str) -> None:
        """Require this token from now on."""
        self._token = token.encode()

    async def register(self, request: Request) -> Response:
        """Store the sessions; return 200 with the number of new ones, or 422 if any was quarantined.

        Raises errors that `answers` maps to responses.
        """
        if not self._token:
            raise HTTPException(404)
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            raise TokenError
        mark_authenticated(request.scope)
        sessions = responses.registrations(await self._bodies.read(request.scope, request.receive))
        now = datetime.now(UTC)
        deliveries = [Delivery(session, now, None, source=responses.APPLICATION) for session in sessions]
        results = await asyncio.gather(*map(self._ingest.submit, deliveries), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result  # after all have a result: registering committed sessions again changes nothing
        statuses = [result.status for result in results if isinstance(result, Outcome)]
        if "quarantined" in statuses:
            detail = "Some sessions could not be stored; see `archiver quarantine list`."
            return Answer(422, "quarantined", detail=detail).response()
        status = "spooled" if "spooled" in statuses else "stored"
        return JSONResponse({"status": status, "sessions": len(sessions), "new": statuses.count("stored")})
