"""What analysts' questions cost: `make bench-analytics`.

Fills archives of two sizes through the ledger, whose newest 90 days are the same, and asks thirty questions as
`archiver_reader`. Prints buffers and rows read, and how they grow. Exits 1 if a question about some days or one thing
reads more than 1.5 times as many buffers in the larger archive, or reads a large table whole, or if a question
exceeds its budget. The queries of docs/analytics.md have the same bounds. Questions about the whole archive
are listed separately.
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
from tests.support.analysts import (
    MESSAGES_PER_SESSION,
    QUESTIONS,
    Cost,
    Question,
    asked,
    fill,
    measure,
    worked_queries,
)

GROWTH = 1.5
NOISE = 10  # buffers: each index may have one level more in the larger archive
GROWING = {"Conversations of a customer"}  # worked queries whose results grow with the archive
RECENT = 10  # one in so many conversations of the smaller archive began within the newest 90 days


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-analytics BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="in the smaller archive (default 100,000)")
    parser.add_argument("--times", type=int, default=10, help="how many times larger the other one is (default 10)")
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="fill the larger one in minutes: SQL repeats the sessions of the smaller one",
    )
    arguments = parser.parse_args()
    recent = arguments.messages // MESSAGES_PER_SESSION // RECENT
    now = datetime.now(UTC)
    recorded = arguments.messages if arguments.repeat else arguments.messages * arguments.times
    # So that the older sessions, repeated, and the recent ones are as many as in an archive that was recorded.
    repeated = round((arguments.times - 1) / (1 - 1 / RECENT)) if arguments.repeat else 0
    with server() as (postgres, _):
        hasten(postgres.url)
        small = costs(migrated(postgres, "bench_small"), arguments.messages, recent, now)
        large = costs(migrated(postgres, "bench_large"), recorded, recent, now, repeated)
    print("About some days, or one thing:")
    broken = [line for question in QUESTIONS if question.kind != "all" for line in report(question, small, large)]
    print("About the whole archive:")
    broken += [line for question in QUESTIONS if question.kind == "all" for line in report(question, small, large)]
    print("Worked queries of docs/analytics.md:")
    worked = [name for name in large if name not in {each.name for each in QUESTIONS}]
    for name in worked:
        broken += report(Question(name, "all" if name in GROWING else "window", ""), small, large)
    if broken:
        sys.exit("bench-analytics: " + "; ".join(broken))


def hasten(url: str) -> None:
    """Fill without waiting for the disk, which changes no figure."""
    with psycopg.connect(url, autocommit=True) as connection:
        for setting in ("fsync = off", "max_wal_size = '16GB'", "maintenance_work_mem = '512MB'"):
            connection.execute(f"ALTER SYSTEM SET {setting}")
        connection.execute("SELECT pg_reload_conf()")


def costs(url: str, messages: int, recent: int, now: datetime, repeated: int = 0) -> Mapping[str, Cost]:
    """What each question costs in a new archive of so many recorded messages; see `fill`."""
    engine, started = database.connect(database.database_url(url)), time.monotonic()
    fill(engine, messages // MESSAGES_PER_SESSION, recent, now, repeated)
    engine.dispose()
    with psycopg.connect(url) as connection:
        (number,) = connection.execute("SELECT count(*) FROM archiver.messages").fetchone() or (0,)
        print(f"{number:,} messages recorded and published in {time.monotonic() - started:.0f} s", flush=True)
        queries = {each.name: asked(connection, each) for each in QUESTIONS} | worked_queries(connection)
        connection.execute(f"SET ROLE {roles.READER}")
        return {name: measure(connection, query) for name, query in queries.items()}


def report(question: Question, small: Mapping[str, Cost], large: Mapping[str, Cost]) -> Iterator[str]:
    """Print the costs of a question, and yield the bounds that it breaks."""
    before, after = small[question.name], large[question.name]
    growth = after.buffers / max(before.buffers, 1)
    print(
        f"{question.name:<52} {question.kind:<6} {before.buffers:>9,} {after.buffers:>9,} buffers {growth:>6.2f}"
        f" {before.rows:>9,} {after.rows:>9,} rows {' '.join(sorted(after.whole))}"
    )
    if question.budget is not None and after.buffers > question.budget:
        yield f"{question.name}: {after.buffers} buffers, at most {question.budget}"
    if question.kind != "all":
        if after.buffers > GROWTH * before.buffers + NOISE:
            yield f"{question.name}: grew {growth:.2f} times"
        if after.whole:
            yield f"{question.name}: reads all of {', '.join(sorted(after.whole))}"


if __name__ == "__main__":
    main()
