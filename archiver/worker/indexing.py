"""Index messages for full-text search, behind the change feed."""

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from time import monotonic
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.archive import search
from archiver.archive.search import Item, Page
from archiver.database import explain, is_cancelled, is_data_error, is_lock_timeout, run_async
from archiver.operations import heartbeats
from archiver.outbound import feed
from archiver.settings import SettingsError
from archiver.telemetry.duty_health import Duty
from archiver.worker.pacing import Pace

log = structlog.get_logger(__name__)

PAGE_SECONDS = 10.0
ITEM_SECONDS = 3.0  # so that a text that Postgres would parse for minutes delays the others only by seconds
MONTH_LOCK_SECONDS = 1.0
REBUILD_SECONDS = 1_800.0
REBUILD_CHECK_SECONDS = 60.0
# The exchange of a rewritten partition: searches queue behind each attempt.
EXCHANGE_ATTEMPTS, EXCHANGE_LOCK_SECONDS, EXCHANGE_PAUSE_SECONDS = 5, 2.0, 5.0
BEAT_SECONDS = 5.0
# Before a worker with ARCHIVER_SEARCH=off deletes the index: longer than a restart of all workers.
UNUSED_SECONDS = 60.0


class Indexing:
    """The search duty."""

    def __init__(self, engine: AsyncEngine, duty: Duty) -> None:
        self._engine, self._duty = engine, duty
        self._rebuild_at = float("-inf")  # on `time.monotonic`
        self._pace = Pace()
        self._used_at = float("-inf")  # on `time.monotonic`, when another worker was last seen to keep the index
        self._is_kept = False
        self.pause_seconds = 0.0  # before the next step

    async def switch_on(self, name: str) -> None:
        """Start the index with this text search configuration, unless it has one already.

        Raises `SettingsError` if there is none of this name.
        """
        language = await run_async(self._engine, partial(search.select_language, name=name))
        if language is None:
            raise SettingsError(" ".join(search.unknown_language(name)))
        present = await run_async(self._engine, partial(search.switch_on, language=language))
        if present != language:
            detail, advice = search.other_language(name, present)
            log.warning("search index in another language", reason=detail, advice=advice)

    async def restart_if_deleted(self, name: str) -> None:
        """Start the index again if another worker deleted it, because it did not see that this one had started."""
        if (await run_async(self._engine, search.select_lag)).language is None:
            await self.switch_on(name)

    async def switch_off(self) -> None:
        """Delete the index."""
        await run_async(self._engine, search.switch_off)

    async def switch_off_unused(self, now: float) -> bool:
        """Delete the index if no worker has kept it for `UNUSED_SECONDS`; return whether there is none.

        Workers with different settings would otherwise delete and build it again at each start. `now`: on
        `time.monotonic`.
        """
        if (await run_async(self._engine, search.select_lag)).language is None:
            return True
        keeper = next(iter(await run_async(self._engine, heartbeats.select_indexing)), None)
        if keeper is not None or self._used_at == float("-inf"):
            self._used_at = now
        if keeper is not None and not self._is_kept:
            self._is_kept = True
            detail, advice = search.other_setting("off", [keeper.name])
            log.warning("search index kept for another worker", reason=detail, advice=advice)
        if now - self._used_at < UNUSED_SECONDS:
            return False
        await self.switch_off()
        log.info("search index deleted", reason="ARCHIVER_SEARCH is off")
        return True

    async def step(self) -> bool:
        """Index the next page; return False if there is none. The caller then pauses for `pause_seconds`."""
        began = monotonic()
        await run_async(self._engine, search.close_gap)
        page = await run_async(self._engine, search.select_page)
        if page is not None:
            await self._add_months(page.items)
            await self._index(page)
            self._duty.beat()
        newest, now = await self._measure(), monotonic()
        self.pause_seconds = self._pace.pause(newest, page.size if page else 0, now - began, now)
        return page is not None

    async def _measure(self) -> int:
        """Set the metric of the lag; return the newest cursor of the feed."""
        lag, extent = await run_async(self._engine, lambda each: (search.select_lag(each), feed.select_extent(each)))
        seconds = 0.0 if lag.since is None else (database.now() - lag.since).total_seconds()
        telemetry.search_lag.set(max(0.0, seconds))
        return extent.newest

    async def _add_months(self, items: Sequence[Item]) -> None:
        for month in await run_async(self._engine, partial(search.select_new_months, items=items)):
            try:
                await run_async(self._engine, partial(search.add_month, month=month), lock_seconds=MONTH_LOCK_SECONDS)
            except DBAPIError as error:
                if not is_lock_timeout(error):
                    raise
                # Its rows go to the partition of other times until its own partition is added.
                log.warning("search partition not added", month=f"{month:%Y-%m}", reason=explain(error))

    async def _index(self, page: Page) -> None:
        try:
            indexed = await run_async(
                self._engine, partial(search.index_page, page=page), statement_seconds=PAGE_SECONDS
            )
        except DBAPIError as error:
            if not _is_of_an_item(error):
                raise
            await self._index_each(page)
        else:
            telemetry.search_partial.inc(indexed.partial if indexed else 0)

    async def _index_each(self, page: Page) -> None:
        """Index the items of a page one by one; a session that is too slow as a whole, turn by turn."""
        for item in page.items:
            if item.chat_id is not None or await self._index_item(page, item):
                turns = [item] if item.chat_id is not None else []
            else:
                turns = await run_async(self._engine, partial(search.select_turns, session_id=item.session_id))
            for turn in turns:
                if not await self._index_item(page, turn):
                    telemetry.search_skipped.inc()
        await run_async(self._engine, partial(search.finish_page, page=page))

    async def _index_item(self, page: Page, item: Item) -> bool:
        """Index an item; if Postgres rejects it or takes too long, delete its outdated rows and return False."""
        self._duty.beat()
        try:
            indexed = await run_async(
                self._engine, partial(search.index_item, page=page, item=item), statement_seconds=ITEM_SECONDS
            )
        except DBAPIError as error:
            if not _is_of_an_item(error):
                raise
            log.warning("session not indexed for search", session_id=item.session_id, reason=explain(error))
            await run_async(self._engine, partial(search.delete_item, item=item))
            return False
        telemetry.search_partial.inc(indexed.partial)
        return True

    async def rebuild(self) -> None:
        """Rewrite a partition that contains words of erased messages, if one is due."""
        if monotonic() < self._rebuild_at:
            return
        self._rebuild_at = monotonic() + REBUILD_CHECK_SECONDS
        name = await run_async(self._engine, search.select_stale)
        claim = partial(heartbeats.claim, name="search_rebuild", seconds=REBUILD_CHECK_SECONDS)
        if name is None or not await run_async(self._engine, claim):
            return
        await run_async(self._engine, partial(search.record_attempt, name=name))
        exchange = partial(search.rebuild, name=name, attempts=EXCHANGE_ATTEMPTS, pause=EXCHANGE_PAUSE_SECONDS)
        work = run_async(
            self._engine, exchange, statement_seconds=REBUILD_SECONDS, lock_seconds=EXCHANGE_LOCK_SECONDS
        )
        try:
            is_rebuilt = await self._with_beats(work)
        except DBAPIError as error:
            if not is_lock_timeout(error) and not is_cancelled(error):
                raise
            log.warning("search partition not rebuilt", partition=name, reason=explain(error))
        else:
            log.info("search partition rebuilt", partition=name, rebuilt=is_rebuilt)

    async def _with_beats(self, work: Coroutine[Any, Any, bool]) -> bool:
        running = asyncio.ensure_future(work)
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=BEAT_SECONDS)
                self._duty.beat()
            return running.result()
        finally:
            running.cancel()


def _is_of_an_item(error: DBAPIError) -> bool:
    return is_cancelled(error) or is_data_error(error)
