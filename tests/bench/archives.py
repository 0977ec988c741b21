"""Archives of two sizes whose newest 90 days are the same, for benchmarks that compare what is read in them."""

import argparse
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import psycopg

from archiver import database
from tests.bench.database import migrated, server
from tests.support.analysts import MESSAGES_PER_SESSION, fill

RECENT = 10  # one in so many conversations of the smaller archive began within the newest 90 days


class Sizes(msgspec.Struct, frozen=True):
    """The number of messages of the smaller archive, and how many times larger the other one is."""

    messages: int
    times: int
    is_repeated: bool

    @property
    def sessions(self) -> int:
        return self.messages // MESSAGES_PER_SESSION


def parse_sizes(program: str, description: str | None) -> Sizes:
    """Return the sizes that the command line names."""
    parser = argparse.ArgumentParser(prog=f"make {program} BENCH_ARGS=…", description=description)
    parser.add_argument("--messages", type=int, default=100_000, help="in the smaller archive (default 100,000)")
    parser.add_argument("--times", type=int, default=10, help="how many times larger the other one is (default 10)")
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="fill the larger one in minutes: SQL repeats the older sessions of the smaller one",
    )
    arguments = parser.parse_args()
    return Sizes(arguments.messages, arguments.times, arguments.repeat)


def archives(sizes: Sizes) -> Iterator[str]:
    """Yield the URL of the smaller archive, then that of the larger one, each once it is filled."""
    now, recent = datetime.now(UTC), sizes.sessions // RECENT
    recorded = sizes.sessions if sizes.is_repeated else sizes.sessions * sizes.times
    # So that the older sessions, repeated, and the recent ones are as many as in an archive that was recorded.
    repeated = round((sizes.times - 1) / (1 - 1 / RECENT)) if sizes.is_repeated else 0
    with server() as (postgres, _):
        hasten(postgres.url)
        for name, sessions, copies in (("small", sizes.sessions, 0), ("large", recorded, repeated)):
            url, started = migrated(postgres, f"bench_{name}"), time.monotonic()
            engine = database.connect(database.database_url(url))
            fill(engine, sessions, recent, now, copies)
            engine.dispose()
            with psycopg.connect(url) as connection:
                (number,) = connection.execute("SELECT count(*) FROM archiver.messages").fetchone() or (0,)
            seconds = time.monotonic() - started
            how = "recorded, published and repeated" if copies else "recorded and published"
            print(f"{number:,} messages {how} in {seconds:.0f} s", flush=True)
            yield url


def hasten(url: str) -> None:
    """Let Postgres not wait for the disk, and not reorder rows at a random time: `fill` vacuums at its end."""
    settings = ("fsync = off", "autovacuum = off", "max_wal_size = '16GB'", "maintenance_work_mem = '512MB'")
    with psycopg.connect(url, autocommit=True) as connection:
        for setting in settings:
            connection.execute(f"ALTER SYSTEM SET {setting}")
        connection.execute("SELECT pg_reload_conf()")
