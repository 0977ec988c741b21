"""Deliveries written as the receiver does, from code without an event loop."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from archiver import database, events
from archiver.events import Content, Delivery
from archiver.inbound import Outcome, Result, write

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def delivery(body: bytes, seconds: float = 0) -> Delivery[Content]:
    return Delivery(events.parse(body), NOW + timedelta(seconds=seconds), "key-1")


def outcomes(results: Sequence[Result]) -> list[Outcome]:
    assert all(isinstance(result, Outcome) for result in results), results
    return [result for result in results if isinstance(result, Outcome)]


class Receiver:
    """One receiver with an event loop and a connection of its own, for code and threads that have none."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.Runner()
        self._engine = database.connect_async(engine.url)

    def __enter__(self) -> "Receiver":
        self._loop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._engine.dispose())
        self._loop.close()

    def write(self, deliveries: Sequence[Delivery[Content]]) -> list[Result]:
        return self._loop.run(write(self._engine, deliveries))

    def take(self, *bodies: bytes, seconds: float = 0) -> list[Outcome]:
        return outcomes(self.write([delivery(body, seconds) for body in bodies]))


def take(engine: Engine, *bodies: bytes, seconds: float = 0) -> list[Outcome]:
    with Receiver(engine) as receiver:
        return receiver.take(*bodies, seconds=seconds)
