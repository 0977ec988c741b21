"""Webhook bodies as the platform is assumed to send them."""

import json
from typing import Any

SECRET = "a-secret-for-tests"
WEBHOOK = "/webhooks/callhq"


def chat(chat_id: str = "chat-1", session_id: str | None = "session-1", **fields: Any) -> dict[str, Any]:
    """A chat object; a field given as None is left out."""
    whole = {
        "id": chat_id,
        "sessionId": session_id,
        "input": f"question of {chat_id}",
        "output": [{"role": "assistant", "content": f"answer to {chat_id}"}],
        "assistantId": "assistant-1",
        "status": "completed",
        "cost": 0.0125,
        "createdAt": "2024-01-15T09:30:00Z",
        "updatedAt": "2024-01-15T09:30:01Z",
        "assistantOverrides": {"variableValues": {"customerTier": "Premium"}},
    } | fields
    return {name: value for name, value in whole.items() if value is not None}


def created(
    chat_id: str = "chat-1", session_id: str | None = "session-1", at: int = 1_705_311_000_000, **fields: Any
) -> bytes:
    """`chat.created`, told at `at` (epoch milliseconds)."""
    return event("chat.created", at, chat(chat_id, session_id, **fields))


def deleted(chat_id: str = "chat-1", session_id: str | None = "session-1", at: int = 1_705_312_000_000) -> bytes:
    """`chat.deleted`, which carries only ids."""
    ids = {"id": chat_id} if session_id is None else {"id": chat_id, "sessionId": session_id}
    return event("chat.deleted", at, ids)


def event(event_type: str, at: int, chat_object: dict[str, Any]) -> bytes:
    return json.dumps({"message": {"type": event_type, "timestamp": at, "chat": chat_object}}).encode()


def envelope(event_type: str, at: int | None, **fields: Any) -> bytes:
    """A flat event of any type with these fields."""
    return json.dumps({"type": event_type} | ({"timestamp": at} if at else {}) | fields).encode()
