"""The archive's own `POST /sessions`: an application tells it which sessions it opened."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx2
import msgspec
import structlog
from pydantic import SecretStr

from archiver.callhq.access import base, secret
from archiver.callhq.slots import slots

log = structlog.get_logger(__name__)

REGISTRY_SECONDS = 5.0
MAX_REMEMBERED = 100_000  # sessions told to the registry, or still to be told
_FIELDS = ("id", "assistantId", "name", "createdAt")


class Registry(msgspec.Struct, frozen=True):
    """An archive that wants to know which sessions were opened: its URL, and the bearer token of its `/sessions`."""

    url: str
    token: SecretStr


class Registrar:
    """Tells the archive of each session once; what failed is told again with the next call for that session."""

    def __init__(self, concurrency: int, registry: Registry) -> None:
        self._slots = slots(concurrency)
        self._url = base("Registry.url", registry.url) + "/sessions"
        self._headers = {"authorization": f"Bearer {secret('Registry.token', registry.token)}"}
        self._sessions: dict[str, dict[str, Any] | None] = {}  # by id: what is still to be told, None once it was

    async def tell(self, session: Mapping[str, Any]) -> None:
        """Never fails. Of the session at least the `id` is known."""
        session_id: str = session["id"]
        known = {name: session[name] for name in _FIELDS if session.get(name) is not None}
        untold = self._sessions.setdefault(session_id, known)
        if untold is None:
            return
        self._sessions[session_id] = None  # at once: a call beside this one need not tell it too
        is_told = False
        try:
            is_told = await self._send(
                session_id, {"sessions": [untold]} if len(untold) > 1 else {"ids": [session_id]}
            )
        finally:
            if not is_told:
                self._sessions[session_id] = untold
        if len(self._sessions) > MAX_REMEMBERED:
            del self._sessions[next(iter(self._sessions))]  # the oldest: at worst it is told again

    async def aclose(self) -> None:
        """End every connection."""
        await self._slots.aclose()

    async def _send(self, session_id: str, body: dict[str, Any]) -> bool:
        try:
            async with self._slots.one() as http, asyncio.timeout(REGISTRY_SECONDS):
                response = await http.post(self._url, json=body, headers=self._headers)
        except (httpx2.RequestError, TimeoutError) as error:
            reason = type(error).__name__
        else:
            if response.is_success:
                return True
            reason = str(response.status_code)
        log.warning("session not registered", session_id=session_id, reason=reason)
        return False
