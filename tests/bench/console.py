"""What the pages of the console cost: `make bench-console`.

Fills archives of two sizes as `make bench-analytics` does, and reads what each page reads. A page examines at most
a half of the rows of the smaller archive, so that it has as many rows to examine in both. Prints the statements of
each page and their buffers, and how these grow. Exits 1 if a page reads more than 1.5 times as many buffers in the
larger archive, or reads a large table whole.
"""

import sys
from collections.abc import Iterator, Mapping

import msgspec
import psycopg

from archiver import database
from archiver.console import conversations, lists, overview
from tests.bench.archives import archives, parse_sizes
from tests.support.analysts import measure
from tests.support.console_pages import PAGES, statements_of, surround

GROWTH = 1.5
NOISE = 30  # buffers: each index that a page uses may have one level more in the larger archive


class PageCost(msgspec.Struct, frozen=True):
    """Statements of a page, the buffers that they read, and the large tables that they read whole."""

    statements: int
    buffers: int
    whole: frozenset[str]


def main() -> None:
    sizes = parse_sizes("bench-console", __doc__)
    limit(sizes.sessions // 2)
    small, large = map(costs, archives(sizes))
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


def costs(url: str) -> Mapping[str, PageCost]:
    """What each page costs in this archive."""
    engine = database.connect(database.database_url(url))
    subject = surround(engine)
    with psycopg.connect(url) as connection:
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
