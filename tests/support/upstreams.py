"""A simulated CallHQ on a real port, in a thread of the test, to be looked at and changed from the test."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from archiver.inbound.signatures import verifier
from archiver.settings import Settings
from archiver.simulator.faults import Faults
from archiver.simulator.platform import Platform, create
from archiver.simulator.serving import serving
from archiver.simulator.upstream import Session, Upstream
from archiver.simulator.webhooks import Record, Sender

API_KEY = "a-key-for-tests"
START_SECONDS = 240


@contextmanager
def hosting(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """An ASGI app on a port of its own meanwhile, or on this one; gives its URL."""
    listening: Future[str] = Future()
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def host() -> None:
        async with serving(app, "127.0.0.1", port) as url:
            listening.set_result(url)
            await ending.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(host(),))
    thread.start()
    try:
        yield listening.result(START_SECONDS)
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


@dataclass
class CallHQ:
    """The platform's memory, and the settings of whoever reads its histories."""

    upstream: Upstream
    app: Starlette
    url: str = ""
    refused: str = ""  # the session that `Refusing` refuses

    @property
    def settings(self) -> dict[str, str]:
        return {"CALLHQ_API_URL": f"{self.url}/api", "CALLHQ_API_KEY": API_KEY}

    def session(self, name: str, *inputs: str) -> Session:
        """A session in which this was said, and answered."""
        session = self.upstream.create_session(name, "assistant-1")
        for texts in inputs:
            self.upstream.create_chat(session.id, texts, None)
        return session


class Refusing:
    """The platform, but for the one session that is `refused`: 403."""

    def __init__(self, callhq: CallHQ) -> None:
        self._callhq = callhq

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._callhq.refused
        is_refused = scope["type"] == "http" and refused and scope["path"].endswith(refused)
        answer = JSONResponse({"message": "not yours"}, 403) if is_refused else self._callhq.app
        await answer(scope, receive, send)


class Pausing:
    """The platform, which answers so many calls, and all others once `most` is None."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._calls = 0
        self.most: int | None = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._calls += 1
            number = self._calls
            while self.most is not None and number > self.most:  # noqa: ASYNC110  # the test sets it in a thread of its own
                await asyncio.sleep(0.01)
        await self._app(scope, receive, send)


@contextmanager
def answering(callhq: CallHQ, most: int) -> Iterator[Pausing]:
    """The platform, which answers so many calls at first."""
    pausing = Pausing(callhq.app, most)
    with hosting(pausing) as callhq.url:
        try:
            yield pausing
        finally:
            pausing.most = None


@contextmanager
def simulated(faults: Faults | None = None, api_key: str = API_KEY, **shares: Any) -> Iterator[CallHQ]:
    """The platform; it sends no webhooks."""
    sender = Sender(None, verifier(Settings.model_construct(webhook_scheme="none")), Record())
    platform = Platform(sender, faults or Faults(**shares), api_key)
    callhq = CallHQ(platform.upstream, create(platform))
    with hosting(callhq.app) as url:
        callhq.url = url
        yield callhq
