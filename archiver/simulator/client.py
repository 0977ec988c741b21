"""An application that calls the platform as CallHQ's quickstart does, with many concurrent customers."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx2

from archiver.simulator.conversations import Conversation

_PARALLEL = 12  # conversations
_IDLE = 2.0  # seconds that an unused connection is kept; the archiver's server keeps it longer


class Client:
    """The documented API calls. Use it with an `httpx2.AsyncClient` whose base URL is the API's."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def create_session(self, name: str, assistant_id: str) -> dict[str, Any]:
        """Create a session and return it."""
        return await self._call("POST", "/sessions", "session", {"name": name, "assistantId": assistant_id})

    async def send_message(self, session_id: str, text: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a message; return the chat with question and answer."""
        body: dict[str, Any] = {"sessionId": session_id, "input": text}
        if variables is not None:
            body["assistantOverrides"] = {"variableValues": variables}
        return await self._call("POST", "/chats", "chat", body)

    async def history(self, session_id: str) -> dict[str, Any]:
        """Return the session with its messages."""
        return await self._call("GET", f"/chats/session/{session_id}", "session", None)

    async def delete_chat(self, chat_id: str) -> None:
        """Delete one turn."""
        await self._call("DELETE", f"/chats/{chat_id}", "chat", None)

    async def _call(self, method: str, path: str, name: str, body: Any) -> dict[str, Any]:
        response = await self._http.request(method, path, json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()[name]
        return answer


def connect(api_url: str, api_key: str) -> httpx2.AsyncClient:
    """Return an HTTP client for the API, which the caller closes."""
    return httpx2.AsyncClient(
        base_url=api_url,
        headers={"x-api-key": api_key},
        timeout=30.0,
        limits=httpx2.Limits(max_connections=_PARALLEL, max_keepalive_connections=_PARALLEL, keepalive_expiry=_IDLE),
        trust_env=False,
    )


async def run_all(client: Client, conversations: Iterable[Conversation], ended: Callable[[], object]) -> None:
    """Run these conversations, some concurrently; `ended` is called after each."""
    waiting = iter(conversations)

    async def work_loop() -> None:
        for conversation in waiting:
            await _run_one(client, conversation)
            ended()

    async with asyncio.TaskGroup() as group:
        for _ in range(_PARALLEL):
            group.create_task(work_loop())


async def _run_one(client: Client, conversation: Conversation) -> None:
    session = await client.create_session(conversation.name, conversation.assistant_id)
    for number, line in enumerate(conversation.lines):
        # As applications do: the variables are sent with the first message, and the platform remembers them.
        chat = await client.send_message(session["id"], line.text, conversation.variables if number == 0 else None)
        if line.is_deleted:
            await client.delete_chat(chat["id"])
