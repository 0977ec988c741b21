"""Open the engines of a process; each is disposed of at the end of its block."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.database import connect, connect_async


class Connections:
    """The engines for one database, each opened for a block. `prepared_statements`: see `connect`."""

    def __init__(self, url: URL, prepared_statements: bool | None = None) -> None:
        self.url, self._prepared_statements = url, prepared_statements

    @contextmanager
    def synchronous(self, pool_size: int = 1) -> Iterator[Engine]:
        """Yield an engine for threads."""
        engine = connect(self.url, pool_size=pool_size, prepared_statements=self._prepared_statements)
        try:
            yield engine
        finally:
            engine.dispose()

    @asynccontextmanager
    async def asynchronous(self, pool_size: int = 1) -> AsyncIterator[AsyncEngine]:
        """Yield an engine for the event loop."""
        engine = connect_async(self.url, pool_size=pool_size, prepared_statements=self._prepared_statements)
        try:
            yield engine
        finally:
            await engine.dispose()
