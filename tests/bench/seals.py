"""Sealing and verification of a large ledger against a plain SHA-256 of the same bytes: `make bench-seals`.

With --beside: what sealing costs a receiver at full rate (needs wrk).
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine

from archiver import database, embedded, telemetry
from archiver.compliance import seals
from archiver.database import copy_out
from tests.bench.database import migrated, server
from tests.bench.ledgers import fill
from tests.support.payloads import SECRET, WEBHOOK
from tests.support.receivers import executing

HERE = Path(__file__).parent
WARM_SECONDS = 5
SPARE_SECONDS = 60  # of load, for windows that take longer than told


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-seals BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="in the ledger (default 1,000,000)")
    parser.add_argument("--rounds", type=int, help="of each measurement in turn (default 3; 20 pairs of --beside)")
    parser.add_argument("--beside", action="store_true", help="measure sealing beside full-rate ingest instead")
    parser.add_argument("--seconds", type=int, default=3, help="of each window of --beside (default 3)")
    arguments = parser.parse_args()
    telemetry.configure_logs("warning", "text")
    with server() as (postgres, _):
        if arguments.beside:
            if shutil.which("wrk") is None:
                sys.exit("bench: wrk is missing; on Debian: apt-get install wrk")
            beside(postgres, arguments.rounds or 20, arguments.seconds)
        else:
            alone(postgres, arguments.events, arguments.rounds or 3)


def alone(postgres: embedded.Postgres, events: int, rounds: int) -> None:
    url = migrated(postgres, "sealed")
    fill(url, events)
    engine = database.connect(database.database_url(url), pool_size=1)
    started = time.perf_counter()
    made_seals = seals.seal(engine)
    rate = events / (time.perf_counter() - started)
    print(f"{events:,} events; sealing: {rate:,.0f} events/s, {len(made_seals)} seals")
    measures: dict[str, Callable[[], int]] = {
        "plain SHA-256 of the bodies": partial(plain, engine, _BODIES),
        "plain SHA-256 of the rows": partial(plain, engine, _ROWS),
        "archiver verify": partial(verify, engine),
    }
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            started = time.perf_counter()
            assert measure() == events
            rates[name].append(events / (time.perf_counter() - started))
    for name, measured in rates.items():
        print(f"{name:30}{statistics.median(measured):12,.0f} events/s")
    of_bodies, of_rows, checked = (statistics.median(measured) for measured in rates.values())
    print(f"verify / plain of what it reads {checked / of_rows:.2f}, of the bodies alone {checked / of_bodies:.2f}")
    print(
        f"memory of this process at its highest: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB"
    )
    engine.dispose()


_BODIES = "body"
_ROWS = "id, received_at, body_digest, occurred_at, type, source, session_id, chat_id, key_id, dedupe_key, salt, body"


def plain(engine: Engine, columns: str) -> int:
    """The same bytes, streamed and hashed row by row, and nothing else."""
    count = 0
    query = sql.SQL(f"COPY (SELECT {columns} FROM archiver.events ORDER BY id) TO STDOUT (FORMAT BINARY)")
    with database.snapshot(engine, statement_seconds=3600) as connection:
        for row in copy_out.rows(connection, query):
            sha256(row).digest()
            count += 1
    return count


def verify(engine: Engine) -> int:
    checked = seals.Checked()
    with database.snapshot(engine, statement_seconds=3600) as connection:
        effort = seals.Parallelism(seals.usual_jobs())  # as the command has it
        assert not list(seals.verify(connection, checked=checked, effort=effort))
    return checked.events


def beside(postgres: embedded.Postgres, rounds: int, seconds: int) -> None:
    """One load, in windows by turns: with a seal of all that came since the last, and without.

    What disturbs a machine lasts longer than a window; each seal bears the cost of two.
    """
    url = migrated(postgres, "beside")
    engine = database.connect(database.database_url(url), pool_size=1)
    ratios: list[float] = []
    with (
        executing(url, "--worker", ARCHIVER_SEAL_EVERY="86400") as receiver,
        receiver,
        loading(receiver.url + WEBHOOK, WARM_SECONDS + 2 * rounds * seconds + SPARE_SECONDS),
        psycopg.connect(url, autocommit=True) as connection,
    ):
        time.sleep(WARM_SECONDS)  # the load goes on beside
        for _ in range(rounds):
            with_seal = window(connection, seconds, lambda: seal(engine))
            ratios.append(with_seal / window(connection, seconds, lambda: None))
            print(f"  with a seal {with_seal:8,.0f} events/s, of that without {ratios[-1]:.2f}", flush=True)
    engine.dispose()
    ratio = statistics.median(ratios)
    print(f"windows with a seal / without: {ratio:.3f} (median of {rounds} pairs of {seconds} s)")
    print(f"each seal bears the cost of both windows of its pair, so the load as a whole keeps {(ratio + 1) / 2:.3f}")


def seal(engine: Engine) -> None:
    """As a worker does: where a vacuum is in the way it tries again."""
    while True:
        try:
            seals.seal(engine)
        except seals.LedgerBusyError:
            continue
        return


def window(connection: psycopg.Connection, seconds: int, work: Callable[[], object]) -> float:
    """Events a second of a window that begins with some work."""
    began, before = time.perf_counter(), stored(connection)
    work()
    time.sleep(max(0.0, began + seconds - time.perf_counter()))  # the load goes on beside
    return (stored(connection) - before) / (time.perf_counter() - began)


def stored(connection: psycopg.Connection) -> int:
    (last,) = connection.execute("SELECT last_value FROM archiver.events_id_seq").fetchone() or (0,)
    return int(last)


@contextmanager
def loading(url: str, seconds: int) -> Iterator[None]:
    command = ["wrk", "-t1", "-c64", f"-d{seconds}s", "-s", str(HERE / "events.lua"), url]
    environment = os.environ | {"BENCH_PREFIX": "beside", "ARCHIVER_WEBHOOK_SECRETS": SECRET}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":  # not in the processes that verify
    main()
