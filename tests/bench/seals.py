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
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine

from archiver import copying, database, embedded, seals, telemetry
from archiver.cli.seals import MOST_JOBS
from tests.bench.database import migrated, server
from tests.bench.ledgers import fill
from tests.payloads import SECRET, WEBHOOK
from tests.receivers import serving

HERE = Path(__file__).parent
WARM_SECONDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-seals BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="in the ledger (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement in turn; the median counts")
    parser.add_argument("--beside", action="store_true", help="measure sealing beside full-rate ingest instead")
    parser.add_argument("--seconds", type=int, default=16, help="of load for each round of --beside (default 16)")
    arguments = parser.parse_args()
    telemetry.configure_logs("warning", "text")
    with server() as (postgres, _):
        if arguments.beside:
            if shutil.which("wrk") is None:
                sys.exit("bench: wrk is missing; on Debian: apt-get install wrk")
            beside(postgres, arguments.rounds, arguments.seconds)
        else:
            alone(postgres, arguments.events, arguments.rounds)


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
        for row in copying.rows(connection, query):
            sha256(row).digest()
            count += 1
    return count


def verify(engine: Engine) -> int:
    checked = seals.Checked()
    with database.snapshot(engine, statement_seconds=3600) as connection:
        effort = seals.Effort(min(seals.processors(), MOST_JOBS))  # as the command has it
        assert not list(seals.verify(connection, checked=checked, effort=effort))
    return checked.events


def beside(postgres: embedded.Postgres, rounds: int, seconds: int) -> None:
    """Each round compares two loads, in turn the one or the other first: what disturbs a machine drifts."""
    ratios: list[float] = []
    for number in range(rounds):
        rates: dict[str, float] = {}
        for every in ("86400", "5")[:: -1 if number % 2 else 1]:
            url = migrated(postgres, f"beside_{every}_{number}")
            with serving(url, "--worker", ARCHIVER_SEAL_EVERY=every) as receiver:
                receiver.post(b"{}")  # the first seal is made at once: not beside the load
                load(receiver.url + WEBHOOK, WARM_SECONDS, f"{every}-{number}w")
                rates[every] = load(receiver.url + WEBHOOK, seconds, f"{every}-{number}")
            with psycopg.connect(url) as connection:
                (count,) = connection.execute("SELECT count(*) FROM archiver.seals").fetchone() or (0,)
            print(f"  round {number + 1}, a seal each {every:>5} s: {rates[every]:8,.0f} events/s, {count} seals")
        ratios.append(rates["5"] / rates["86400"])
    print(f"with sealing / without {statistics.median(ratios):.3f} (median of {rounds} rounds)")


def load(url: str, seconds: int, prefix: str) -> float:
    command = ["wrk", "-t1", "-c64", f"-d{seconds}s", "-s", str(HERE / "events.lua"), url]
    environment = os.environ | {"BENCH_PREFIX": prefix, "ARCHIVER_WEBHOOK_SECRETS": SECRET}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(told.split("Requests/sec:")[1].split()[0])


if __name__ == "__main__":  # not in the processes that verify
    main()
