"""Read what a page shows and render it, both in threads that only the pages use."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver.console import rendering
from archiver.console.logins import Login
from archiver.console.outcomes import sentence_of
from archiver.console.permissions import GRANTED
from archiver.console.refreshing import refresh_of
from archiver.database import snapshot

T = TypeVar("T")

READ_SECONDS = 10.0  # for each statement of a page


class PageRenderer:
    """Reads with `engine` and renders in `threads`. `has_actions`: whether pages may change anything."""

    def __init__(self, engine: Engine, threads: Executor, *, has_actions: bool) -> None:
        self._engine, self._threads = engine, threads
        self.has_actions = has_actions

    async def read(self, select: Callable[..., T], *arguments: Any) -> T:
        """Return what `select` returns for a connection and these arguments, in one read-only transaction."""

        def read() -> T:
            # A replica's clock must not become that of the receiver.
            with snapshot(self._engine, statement_seconds=READ_SECONDS, keeps_time=False) as connection:
                return select(connection, *arguments)

        return await self.in_thread(read)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what `work` returns."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def render(
        self,
        request: Request,
        template: str,
        login: Login,
        status: int = 200,
        *,
        can_refresh: bool = False,
        **values: Any,
    ) -> Response:
        """Return a page, with the outcome of the action that led to it.

        `can_refresh`: the page may load itself again. Not with content, because each view is an audit entry.
        """
        values |= {
            "refresh": refresh_of(request) if can_refresh else None,
            "login": login,
            "granted": GRANTED[login.role],
            "has_actions": self.has_actions,
            "done": sentence_of(request.query_params.get("done", ""), login),
        }
        return await self.in_thread(partial(rendering.html, template, values, status))
