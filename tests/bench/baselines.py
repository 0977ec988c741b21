"""What the archiver is measured against: a server that does nothing, and a receiver as most people would write it."""

import hashlib
import hmac
import json
import os
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.dialects.postgresql import insert
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from archiver import database
from archiver.database import tables
from tests.support.payloads import WEBHOOK


async def _nothing(request: Request) -> Response:
    await request.body()
    return JSONResponse({"status": "stored", "id": 1})


def noop() -> Starlette:
    """(a) Reads the body and answers."""
    return Starlette(routes=[Route(WEBHOOK, _nothing, methods=["POST"])])


def plain() -> Starlette:
    """(b) Checks the secret, parses, writes the same tables: one transaction an event, in a pool of threads."""
    engine = create_engine(database.database_url(os.environ["DATABASE_URL"]), pool_size=20, max_overflow=20)
    secret = os.environ["ARCHIVER_WEBHOOK_SECRETS"]

    async def receive(request: Request) -> Response:
        body = await request.body()
        if not hmac.compare_digest(request.headers.get("x-webhook-secret", ""), secret):
            return JSONResponse({"status": "unauthenticated"}, 401)
        return JSONResponse(await run_in_threadpool(store, body, json.loads(body)["message"]))

    def store(body: bytes, message: dict[str, Any]) -> dict[str, Any]:
        chat, now, salt = message["chat"], datetime.now(UTC), os.urandom(16)
        key = hashlib.sha256(json.dumps([message["type"], chat], sort_keys=True).encode()).digest()
        session_id, chat_id = chat["sessionId"], chat["id"]
        with engine.begin() as connection:
            events = insert(tables.events).values(
                session_id=session_id,
                dedupe_key=key,
                type=message["type"],
                source="webhook",
                chat_id=chat_id,
                received_at=now,
                last_received_at=now,
                delivery_count=1,
                occurred_at=datetime.fromtimestamp(message["timestamp"] / 1000, UTC),
                body=body,
                salt=salt,
                body_digest=hashlib.sha256(salt + body).digest(),
            )
            new_id = connection.scalar(events.on_conflict_do_nothing().returning(tables.events.c.id))
            if new_id is None:
                return {"status": "duplicate"}
            session = insert(tables.sessions).values(session_id=session_id, first_event_at=now, last_event_at=now)
            connection.execute(
                session.on_conflict_do_update(index_elements=["session_id"], set_={"last_event_at": now})
            )
            connection.execute(
                insert(tables.chats).values(
                    session_id=session_id,
                    chat_id=chat_id,
                    assistant_id=chat["assistantId"],
                    external_id=chat["externalChatId"],
                    status=chat["status"],
                    cost=chat["cost"],
                    variables=chat["assistantOverrides"]["variableValues"],
                    created_at=datetime.fromisoformat(chat["createdAt"]),
                    updated_at=datetime.fromisoformat(chat["updatedAt"]),
                    first_received_at=now,
                    source="webhook",
                )
            )
            messages = [("user", chat["input"]), *((m["role"], m["content"]) for m in chat["output"])]
            connection.execute(
                insert(tables.messages),
                [
                    {
                        "session_id": session_id,
                        "chat_id": chat_id,
                        "ordinal": ordinal,
                        "role": role,
                        "content": content,
                        "source": "webhook",
                    }
                    for ordinal, (role, content) in enumerate(messages)
                ],
            )
        return {"status": "stored", "id": new_id}

    return Starlette(routes=[Route(WEBHOOK, receive, methods=["POST"])])
