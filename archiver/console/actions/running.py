"""Run the use case of an action in a thread of its own, limit how many wait, and explain why one failed."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request
from starlette.responses import Response

from archiver.console.failures import PageError
from archiver.console.gate import Handler
from archiver.console.logins import Login
from archiver.database import sqlstate
from archiver.database.lock_waits import INSUFFICIENT_PRIVILEGE
from archiver.errors import ArchiverError, sentence

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_WAITING = 8  # actions of a process, of which one runs
WAIT_SECONDS = 30.0  # for which a page waits for its action, which continues after that


class Runner:
    """The actions of one process. `engine`: of the database that is written to, with one connection."""

    def __init__(self, engine: Engine, *, is_on: bool) -> None:
        self._engine, self.is_on = engine, is_on
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="console-action")
        self._waiting = 0

    def when_on(self, handler: Handler) -> Handler:
        """Return the handler of a page that exists only if actions are enabled."""

        async def respond(request: Request, login: Login) -> Response:
            if not self.is_on:
                raise PageError(
                    404,
                    "The console only reads here",
                    "An administrator can let users change the archive from these pages with"
                    " ARCHIVER_CONSOLE_ACTS=on; the command line can do it at any time.",
                )
            return await handler(request, login)

        return respond

    async def run(self, work: Callable[[Engine], T], command: str) -> T:
        """Return what `work` returns. `command` does the same on the command line. Raises `PageError`."""
        task = self._start(work)
        try:
            return await asyncio.wait_for(asyncio.shield(task), WAIT_SECONDS)
        except TimeoutError:
            task.add_done_callback(partial(_log_fault, command))
            raise PageError(
                503,
                "This takes longer than expected",
                "It continues. The audit log has an entry once it is done.",
            ) from None
        except PageError:
            raise
        except ArchiverError as error:
            raise PageError(409, "Nothing was changed", sentence(error)) from None
        except DBAPIError as error:
            if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
                raise
            raise PageError(
                409,
                "The database does not allow this",
                f"The console's database user lacks the privilege. The owner of the database can run: {command}",
            ) from None

    async def finishes(self, work: Callable[[Engine], None], command: str) -> bool:
        """Run work that a worker completes if it fails here; return whether it is complete now."""
        task = self._start(work)
        try:
            await asyncio.wait_for(asyncio.shield(task), WAIT_SECONDS)
        except TimeoutError:
            task.add_done_callback(partial(_log_fault, command))
            return False
        except DBAPIError as error:
            log.warning("action left to a worker", command=command, reason=str(error.orig))
            return False
        return True

    def _start(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        if self._waiting >= MAX_WAITING:
            raise PageError(503, "Other actions are running", "Wait a moment, then try again.", {"retry-after": "10"})
        self._waiting += 1
        task = asyncio.get_running_loop().run_in_executor(self._thread, partial(work, self._engine))
        task.add_done_callback(self._end)
        return task

    def _end(self, _: asyncio.Future[T]) -> None:
        self._waiting -= 1


def _log_fault(command: str, task: asyncio.Future[T]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("console action failed", command=command, exc_info=error)
