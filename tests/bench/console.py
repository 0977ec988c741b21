"""What the pages of the console cost: `make bench-console`.

Fills archives of two sizes as `make bench-analytics` does, and reads what each page reads. A page examines at most
a half of the rows of the smaller archive, so that it has as many rows to examine in both. Prints the statements of
each page and their buffers, and how these grow. Exits 1 if a page reads more than 1.5 times as many buffers in the
larger archive, or reads a large table whole.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import msgspec
import psycopg

from archiver import database
from archiver.console import conversations, lists, overview
from tests.bench.database import migrated, server
from tests.support.analysts import MESSAGES_PER_SESSION, fill, measure
from tests.support.console_pages import PAGES, statements_of, surround

GROWTH = 1.5
NOISE = 30  # buffers: each index that a page uses may have one level more in the larger archive
RECENT = 10  # one in so many conversations of the smaller archive began within the newest 90 days


class PageCost(msgspec.Struct, frozen=True):
    """Statements of a page, the buffers that they read, and the large tables that they read whole."""

    statements: int
    buffers: int
    whole: frozenset[str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-console BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="in the smaller archive (default 100,000)")
    parser.add_argument("--times", type=int, default=10, help="how many times larger the other one is (default 10)")
    arguments = parser.parse_args()
    recent = arguments.messages // MESSAGES_PER_SESSION // RECENT
    now = datetime.now(UTC)
    limit(arguments.messages // MESSAGES_PER_SESSION // 2)
    sizes = [arguments.messages, arguments.messages * arguments.times]
    with server() as (postgres, _):
        small, large = (costs(migrated(postgres, f"bench_{size}"), size, recent, now) for size in sizes)
    print("| page | statements | buffers | buffers | growth |\n| --- | --- | --- | --- | --- |")
    broken = [line for name in PAGES for line in report(name, small[name], large[name])]
    if broken:
        sys.exit("bench-console: " + "; ".join(broken))


def limit(most: int) -> None:
    """Let no page examine more rows than this; the limits of the product are for archives of any size."""
    conversations.EXAMINED = min(conversations.EXAMINED, most)
    lists.EXAMINED = min(lists.EXAMINED, most)
    overview.EXAMINED = min(overview.EXAMINED, most)
    conversations.EXAMINED_FOR_HOLDS = min(conversations.EXAMINED_FOR_HOLDS, most)


def costs(url: str, messages: int, recent: int, now: datetime) -> Mapping[str, PageCost]:
    """What each page costs in a new archive of so many messages."""
    engine, started = database.connect(database.database_url(url)), time.monotonic()
    fill(engine, messages // MESSAGES_PER_SESSION, recent, now)
    subject = surround(engine)
    with psycopg.connect(url) as connection:
        (number,) = connection.execute("SELECT count(*) FROM archiver.messages").fetchone() or (0,)
        print(f"{number:,} messages recorded and published in {time.monotonic() - started:.0f} s", flush=True)
        result = {}
        for name, read in PAGES.items():
            statements = statements_of(engine, read, subject)
            measured = [measure(connection, each) for each in statements]
            whole = frozenset[str]().union(*(each.whole for each in measured))
            result[name] = PageCost(len(statements), sum(each.buffers for each in measured), whole)
    engine.dispose()
    return result


def report(name: str, small: PageCost, large: PageCost) -> Iterator[str]:
    """Print the costs of a page, and yield the bounds that it breaks."""
    growth = large.buffers / max(small.buffers, 1)
    print(f"| {name} | {large.statements} | {small.buffers:,} | {large.buffers:,} | {growth:.2f} |")
    if large.statements > small.statements:
        yield f"{name}: {small.statements} statements, {large.statements} in the larger archive"
    if large.buffers > GROWTH * small.buffers + NOISE:
        yield f"{name}: grew {growth:.2f} times"
    if large.whole:
        yield f"{name}: reads all of {', '.join(sorted(large.whole))}"


if __name__ == "__main__":
    main()
