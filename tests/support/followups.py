"""A receiver of follow-ups that records and misbehaves as told, and senders in a thread of the test."""

import asyncio
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, text
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from archiver import database
from archiver.archive import outbox
from archiver.compliance import seals
from archiver.database import transaction
from archiver.database.connections import Connections
from archiver.outbound.followups import CONNECTIONS, Followups, schedule, subscriptions
from archiver.settings import Settings
from tests.support.upstreams import hosting

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cywgMzIgYnl0ZXMgbG9uZw=="


class Got(NamedTuple):
    """One request that a receiver had."""

    message_id: str
    headers: dict[str, str]
    body: bytes
    path: str

    @property
    def payload(self) -> Any:
        return json.loads(self.body)

    @property
    def data(self) -> Any:
        return self.payload["data"]


@dataclass
class Receiver:
    """Answers each request with the next of `answers`, and 204 after them; hangs while `hangs` is set."""

    url: str = ""
    got: list[Got] = field(default_factory=list)
    answers: Iterator[Response] = field(default_factory=lambda: iter(()))
    hangs: bool = False
    most_at_once: int = 0
    _at_once: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] in {"http", "lifespan"}
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        request = Request(scope, receive)
        body = await request.body()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.got.append(Got(request.headers["webhook-id"], dict(request.headers), body, request.url.path))
            while self.hangs:  # noqa: ASYNC110  # the test sets it in a thread of its own
                await asyncio.sleep(0.01)
            answer = next(self.answers, None) or Response(status_code=204)
            await answer(scope, receive, send)
        finally:
            self._at_once -= 1

    def always(self, answer: int | Response) -> None:
        made = Response(status_code=answer) if isinstance(answer, int) else answer
        self.answers = itertools.repeat(made)

    def then(self, *answers: int | Response) -> None:
        self.answers = iter([Response(status_code=each) if isinstance(each, int) else each for each in answers])

    @property
    def cursors(self) -> list[int]:
        return [each.data["cursor"] for each in list(self.got)]

    @property
    def by_id(self) -> dict[str, list[Got]]:
        result = defaultdict(list)
        for each in list(self.got):
            result[each.message_id].append(each)
        return result


async def _live(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    receiver = Receiver()
    with hosting(receiver, port) as url:
        receiver.url = url
        try:
            yield receiver
        finally:
            receiver.hangs = False


def subscribe(engine: Engine, url: str, *events: str, after: int | None = 0, **values: Any) -> int:
    """A new subscription, all events unless told, from the beginning of the feed."""
    row = {
        "url": url,
        "events": list(events or outbox.TYPES),
        "is_ordered": False,
        "concurrency": 4,
        "secret": SECRET,
    }
    with transaction(engine) as connection:
        return subscriptions.insert_subscription(connection, row | values, after)


@contextmanager
def sending(url: str, **settings: Any) -> Iterator[None]:
    """What a worker does about follow-ups, without limit of rate unless told."""
    values = {"ARCHIVER_FOLLOWUPS_RATE": 0, "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": True} | settings
    connections = Connections(database.database_url(url))
    loop, ending = asyncio.new_event_loop(), asyncio.Event()
    failures: list[BaseException] = []

    async def follow_up() -> None:
        async with connections.asynchronous(CONNECTIONS) as engine:
            await Followups(Settings(**values), engine, seals.select_seal).run(ending)

    def run() -> None:
        try:
            loop.run_until_complete(follow_up())
        except BaseException as error:  # noqa: BLE001  # told to the test below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(120)
        loop.close()
    assert failures == []


def change(engine: Engine, *changes: tuple[str, str, str | None]) -> None:
    """Changes in the feed, each a type, a session and a chat, as a publisher would put them there."""
    with transaction(engine) as connection:
        for kind, session_id, chat_id in changes:
            connection.execute(
                text(
                    "INSERT INTO archiver.changes (cursor, type, session_id, chat_id, changed_at)"
                    " SELECT coalesce(max(cursor), 0) + 1, :kind, :session_id, :chat_id, now() FROM archiver.changes"
                ),
                {"kind": kind, "session_id": session_id, "chat_id": chat_id},
            )


def retry_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No delivery is due again, and no receiver probed, before the test says so: the constants alone are longer."""
    monkeypatch.setattr(schedule, "_BACKOFF", (10_000_000,))
    monkeypatch.setattr(schedule, "_INITIAL_PROBE_PAUSE", 900.0)


def let_time_pass(engine: Engine) -> None:
    """What waits to be tried again is due, and no receiver is left alone any more."""
    with transaction(engine) as connection:
        connection.execute(text("UPDATE archiver.deliveries SET due_at = now() WHERE state = 'pending'"))
        connection.execute(text("UPDATE archiver.subscriptions SET open_until = NULL, leased_until = NULL"))


def states(engine: Engine) -> dict[str, int]:
    with transaction(engine) as connection:
        query = text("SELECT state, count(*) FROM archiver.deliveries GROUP BY 1")
        return {row[0]: int(row[1]) for row in connection.execute(query)}
