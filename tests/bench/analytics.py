"""What analysts' questions cost: `make bench-analytics`.

Fills archives of two sizes through the ledger, whose newest days are equally full, and asks thirty questions as
`archiver_reader`. Prints buffers and rows read, and how they grow. Exits 1 if a question about some days reads a
large table whole, or reads more than 1.5 times as much in the larger archive, or if a question exceeds its budget.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import psycopg

from archiver import database
from archiver.database import roles
from tests.bench.database import migrated, server
from tests.support.analysts import QUESTIONS, Cost, Question, asked, fill, measure

GROWTH = 1.5
PARTS = 2  # of the views of turns and lines: a window is read by its index once for each
NOISE = 50  # buffers or rows
BUFFERS_PER_ROW = 2  # of a plan by indexes; a small table is cheaper to read by other plans
MESSAGES_PER_SESSION = 8
LARGE = {"chats", "messages", "sessions", "summaries", "changes", "events", "search"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-analytics BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="in the smaller archive (default 100,000)")
    parser.add_argument("--times", type=int, default=10, help="how many times larger the other one is (default 10)")
    arguments = parser.parse_args()
    recent = arguments.messages // MESSAGES_PER_SESSION // 2
    now = datetime.now(UTC)
    sizes = [arguments.messages, arguments.messages * arguments.times]
    with server() as (postgres, _):
        small, large = (costs(migrated(postgres, f"bench_{size}"), size, recent, now) for size in sizes)
    broken = [line for question in QUESTIONS for line in report(question, small, large)]
    if broken:
        sys.exit("bench-analytics: " + "; ".join(broken))


def costs(url: str, messages: int, recent: int, now: datetime) -> Mapping[str, Cost]:
    """What each question costs in a new archive of so many messages."""
    engine, started = database.connect(database.database_url(url)), time.monotonic()
    fill(engine, messages // MESSAGES_PER_SESSION, recent, now)
    engine.dispose()
    with psycopg.connect(url) as connection:
        (number,) = connection.execute("SELECT count(*) FROM archiver.messages").fetchone() or (0,)
        print(f"{number:,} messages recorded and published in {time.monotonic() - started:.0f} s", flush=True)
        queries = {each.name: asked(connection, each) for each in QUESTIONS}
        connection.execute(f"SET ROLE {roles.READER}")
        return {name: measure(connection, query) for name, query in queries.items()}


def report(question: Question, small: Mapping[str, Cost], large: Mapping[str, Cost]) -> Iterator[str]:
    """Print the costs of a question, and yield the bounds that it breaks."""
    before, after = small[question.name], large[question.name]
    growth = after.buffers / max(before.buffers, 1)
    whole = sorted(after.whole & LARGE)
    print(
        f"{question.name:<52} {question.kind:<6} {before.buffers:>9,} {after.buffers:>9,} buffers {growth:>6.2f}"
        f" {before.rows:>9,} {after.rows:>9,} rows {' '.join(whole)}"
    )
    if question.budget is not None and after.buffers > question.budget:
        yield f"{question.name}: {after.buffers} buffers, at most {question.budget}"
    if question.kind == "window":
        if after.rows > GROWTH * PARTS * before.rows + NOISE:
            yield f"{question.name}: {after.rows} rows instead of {before.rows}"
        if after.buffers > max(GROWTH * before.buffers + NOISE, BUFFERS_PER_ROW * after.rows):
            yield f"{question.name}: grew {growth:.2f} times"
        if whole:
            yield f"{question.name}: reads all of {', '.join(whole)}"


if __name__ == "__main__":
    main()
