"""Record who saw which content in the audit log, before it is sent.

Requests that wait at the same time share a transaction, so that reading stays cheap.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import run_async
from archiver.ledger import audit_log

Kind = Literal["console.login", "console.view", "console.search", "console.download"]


class _Entry(msgspec.Struct, frozen=True):
    kind: Kind
    user: str
    detail: Mapping[str, Any]
    recorded: asyncio.Future[None]


class ViewLog:
    """The entries that wait to be recorded. `engine` needs one connection."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._waiting: list[_Entry] = []
        self._writing: asyncio.Task[None] | None = None

    async def record(self, kind: Kind, user: str, **detail: Any) -> None:
        """Return once the entry is committed; raise the error of the database otherwise. `detail` has no content."""
        entry = _Entry(kind, user, detail, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await entry.recorded

    async def _write(self) -> None:
        while self._waiting:
            entries, self._waiting = self._waiting, []
            fault: Exception | None = None
            try:
                await run_async(self._engine, partial(_insert, entries))
            except Exception as error:  # noqa: BLE001  # each request raises it
                fault = error
            for each in entries:
                if each.recorded.done():  # its request was cancelled
                    continue
                if fault is None:
                    each.recorded.set_result(None)
                else:
                    each.recorded.set_exception(fault)
        self._writing = None


def _insert(entries: Sequence[_Entry], connection: Connection) -> None:
    for each in entries:
        audit_log.insert_entry(connection, each.kind, f"{each.user}@console", None, each.detail)
