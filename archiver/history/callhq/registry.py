"""Client of the archive's `POST /sessions`: registers sessions that an application opened."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx2
import msgspec
import structlog
from pydantic import SecretStr

from archiver.history.callhq.access import base, secret
from archiver.history.callhq.connections import connection_pool

log = structlog.get_logger(__name__)

REGISTRY_SECONDS = 5.0
MAX_REMEMBERED = 100_000  # sessions, registered or pending
_FIELDS = ("id", "assistantId", "name", "createdAt")


class Registry(msgspec.Struct, frozen=True):
    """URL of an archive and bearer token of its `/sessions`."""

    url: str
    token: SecretStr


class Registrar:
    """Registers each session once; a failed registration is repeated with the next call for that session."""

    def __init__(self, concurrency: int, registry: Registry) -> None:
        self._pool = connection_pool(concurrency)
        self._url = base("Registry.url", registry.url) + "/sessions"
        self._headers = {"authorization": f"Bearer {secret('Registry.token', registry.token)}"}
        self._sessions: dict[str, dict[str, Any] | None] = {}  # the pending registration by id; None once registered

    async def register(self, session: Mapping[str, Any]) -> None:
        """Register a session; never raises. `session` has at least `id`."""
        session_id: str = session["id"]
        known = {name: session[name] for name in _FIELDS if session.get(name) is not None}
        unsent = self._sessions.setdefault(session_id, known)
        if unsent is None:
            return
        self._sessions[session_id] = None  # at once: a concurrent call must not register it too
        is_sent = False
        try:
            is_sent = await self._send(
                session_id, {"sessions": [unsent]} if len(unsent) > 1 else {"ids": [session_id]}
            )
        finally:
            if not is_sent:
                self._sessions[session_id] = unsent
        if len(self._sessions) > MAX_REMEMBERED:
            del self._sessions[next(iter(self._sessions))]  # the oldest; at worst it is registered again

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def _send(self, session_id: str, body: dict[str, Any]) -> bool:
        try:
            async with self._pool.acquire() as http, asyncio.timeout(REGISTRY_SECONDS):
                response = await http.post(self._url, json=body, headers=self._headers)
        except (httpx2.RequestError, TimeoutError) as error:
            reason = type(error).__name__
        else:
            if response.is_success:
                return True
            reason = str(response.status_code)
        log.warning("session not registered", session_id=session_id, reason=reason)
        return False
