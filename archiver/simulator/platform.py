"""CallHQ's documented chat API as a small Starlette app, with webhooks and without a model.

`DELETE /api/chats/{id}` is not documented upstream; `GET /simulator/report` is the simulator's own.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from archiver.simulator import faults as planned
from archiver.simulator.faults import Faults
from archiver.simulator.histories import Histories
from archiver.simulator.upstream import FullError, UnknownError, Upstream
from archiver.simulator.webhooks import Sender

MAX_BODY = 1_048_576

Text = Annotated[str, msgspec.Meta(min_length=1)]
Body = TypeVar("Body", bound=msgspec.Struct)


class NewSession(msgspec.Struct, rename="camel"):
    """Body of `POST /sessions`; unknown fields are ignored."""

    name: Text
    assistant_id: Text


class InputMessage(msgspec.Struct):
    """One message of an `input` that is a list."""

    role: Text
    content: Text


class NewChat(msgspec.Struct, rename="camel"):
    """Body of `POST /chats`; without a session id, the chat has none. `assistant_overrides` is kept as received."""

    input: Text | Annotated[list[InputMessage], msgspec.Meta(min_length=1, max_length=1000)]
    session_id: Text | None = None
    assistant_id: Text | None = None
    assistant_overrides: dict[str, Any] | None = None


class Platform:
    """The endpoints of the platform, its state, and its webhook sender."""

    def __init__(self, sender: Sender, faults: Faults, api_key: str | None) -> None:
        self.upstream = Upstream(faults)
        self._histories = Histories(self.upstream, faults)
        self.sender = sender
        self._faults = faults
        self._api_key = api_key

    async def create_session(self, request: Request) -> Response:
        body = await _body(request, NewSession)
        session = self.upstream.create_session(body.name, body.assistant_id)
        return _answer(201, "Session created successfully", session=session.described())

    async def create_chat(self, request: Request) -> Response:
        body = await _body(request, NewChat)
        overrides = body.assistant_overrides
        if overrides and not isinstance(overrides.get("variableValues", {}), dict | None):
            raise HTTPException(400, "Expected `object` - at `$.assistantOverrides.variableValues`")
        input_messages = msgspec.to_builtins(body.input)
        if body.session_id is None:
            chat = self.upstream.create_single_chat(body.assistant_id, input_messages, overrides)
        else:
            chat = self.upstream.create_chat(body.session_id, input_messages, overrides)
        await _until(datetime.fromisoformat(chat["updatedAt"]))
        await self.sender.submit(planned.created(self._faults, chat))
        return _answer(201, "Chat created successfully", chat=chat)

    async def history(self, request: Request) -> Response:
        return await self._histories.answer(request, request.path_params["id"])

    async def delete_chat(self, request: Request) -> Response:
        chat = self.upstream.delete_chat(request.path_params["id"])
        await self.sender.submit(planned.deleted(self._faults, chat))
        return _answer(200, "Chat deleted successfully", chat={"id": chat["id"]})

    async def report(self, _: Request) -> Response:
        return JSONResponse(self.sender.record.report() | self._histories.report())

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint, restricted to callers with an API key."""

        async def with_key(request: Request) -> Response:
            key = request.headers.get("x-api-key", "").strip()
            if not key:
                raise HTTPException(401, "Missing x-api-key header")
            if self._api_key is not None and key != self._api_key:
                raise HTTPException(401, "Invalid API key")
            return await endpoint(request)

        return with_key


def create(platform: Platform) -> Starlette:
    """Return the app; it closes the platform's sender at shutdown."""
    routes = [
        Route("/api/sessions", platform.guarded(platform.create_session), methods=["POST"]),
        Route("/api/chats", platform.guarded(platform.create_chat), methods=["POST"]),
        Route("/api/chats/session/{id}", platform.guarded(platform.history), methods=["GET"]),
        Route("/api/chats/{id}", platform.guarded(platform.delete_chat), methods=["DELETE"]),
        Route("/simulator/report", platform.report, methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with platform.sender:
            yield

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, UnknownError: _unknown, FullError: _full},
    )


async def _until(moment: datetime) -> None:
    """Wait until this time, some milliseconds ahead, so that no response contains a future time."""
    await asyncio.sleep(max(0.0, (moment - datetime.now(UTC)).total_seconds()))


async def _body(request: Request, shape: type[Body]) -> Body:
    """Return the JSON body, regardless of its content type."""
    try:
        return msgspec.json.decode(await _bytes(request), type=shape)
    except msgspec.ValidationError as error:  # a field that is missing or wrong: the message says which
        raise HTTPException(400, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is not valid JSON: {error}") from error


async def _bytes(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise HTTPException(413, f"The body is larger than {MAX_BODY} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _answer(status: int, message: str, **content: Any) -> Response:
    return JSONResponse({"message": message, **content}, status)


def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"message": error.detail}, error.status_code, headers=dict(error.headers or {}))


def _unknown(_: Request, error: Exception) -> Response:
    return _answer(404, str(error))


def _full(_: Request, error: Exception) -> Response:
    return _answer(429, str(error))
