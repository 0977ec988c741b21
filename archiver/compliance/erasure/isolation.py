"""Process items in one transaction, and split it if an item is locked or slow."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archiver import database, ledger
from archiver.database import is_cancelled, is_lock_timeout, run

T = TypeVar("T")
Item = TypeVar("Item")

CONFLICT_RETRIES = 10


# Of a statement, and of a wait for a lock: in a transaction with several items, with one, and in one that has the
# placement lock alone, for which all who record wait.
BATCH_SECONDS, BATCH_LOCK_SECONDS = 10.0, 2.0
SINGLE_SECONDS, SINGLE_LOCK_SECONDS = 120.0, 10.0
EXCLUSIVE_SECONDS = 2.0


def lock_placement(connection: Connection, *, exclusive: bool) -> None:
    """As the ledger has it; alone for a short time only."""
    if exclusive:
        database.limit(connection, EXCLUSIVE_SECONDS)
        database.limit_locks(connection, EXCLUSIVE_SECONDS)
    ledger.lock_placement(connection, exclusive=exclusive)


def run_split(
    engine: Engine,
    items: Sequence[Item],
    work: Callable[[Connection, Sequence[Item]], T],
    slow: list[DBAPIError],
) -> Iterator[T]:
    """Yield the results of `work`, for all items together or for halves if an item makes it wait.

    An item that is locked, or takes too long, alone, is left as it is; why is added to `slow`.
    """
    if not items:
        return
    is_single = len(items) == 1
    try:
        answer = run(
            engine,
            lambda connection: work(connection, items),
            statement_seconds=SINGLE_SECONDS if is_single else BATCH_SECONDS,
            lock_seconds=SINGLE_LOCK_SECONDS if is_single else BATCH_LOCK_SECONDS,
            retries=CONFLICT_RETRIES,
        )
    except DBAPIError as error:
        if not is_lock_timeout(error) and not is_cancelled(error):
            raise
        if is_single:
            slow.append(error)
            return
    else:
        yield answer
        return
    middle = len(items) // 2
    yield from run_split(engine, items[:middle], work, slow)
    yield from run_split(engine, items[middle:], work, slow)
