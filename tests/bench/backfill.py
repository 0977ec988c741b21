"""Backfill against a simulated CallHQ whose histories take 50 ms: `make bench-backfill`.

Prints sessions/s, what 50 ms and so many calls in flight allow at best, the processor time of each part, and the
memory of the backfill at its peak with a tenth of the sessions and with all.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

from tests.bench.database import migrated, server
from tests.support.upstreams import API_KEY

LATENCY = 0.05

_PLATFORM = """
import sys
from tests.upstreams import simulated
sessions, latency = int(sys.argv[1]), float(sys.argv[2])
with simulated(history_latency=latency) as callhq:
    ids = [callhq.session(f"s{n}", "ok", "ok", "thanks").id for n in range(sessions)]
    print(callhq.url, *ids, sep="\\n", flush=True)
    sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-backfill BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000, help="to read (default 10,000)")
    parser.add_argument("--concurrency", type=int, default=32, help="calls in flight (default 32)")
    arguments = parser.parse_args()
    with server() as (postgres, home):
        for number, sessions in enumerate((arguments.sessions // 10, arguments.sessions)):
            url = migrated(postgres, f"backfill_{number}")
            report(url, postgres.pid, sessions, arguments.concurrency, home)


def report(url: str, postmaster: int, sessions: int, concurrency: int, home: Path) -> None:
    command = [sys.executable, "-c", _PLATFORM, str(sessions), str(LATENCY)]
    platform = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert platform.stdout
    api = platform.stdout.readline().strip()
    ids = home / "ids"
    ids.write_text("".join(platform.stdout.readline() for _ in range(sessions)))
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "CALLHQ_API_URL": f"{api}/api",
        "CALLHQ_API_KEY": API_KEY,
    }
    before = used(platform.pid), used_by_children_of(postmaster)
    started, own = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    backfill = [sys.executable, "-m", "archiver", "backfill", "--file", str(ids), "--json"]
    ended = subprocess.run(
        [*backfill, "--concurrency", str(concurrency)], env=environment, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures: dict[str, Any] = json.loads(ended.stdout)
    assert figures["outcomes"] == {"read": sessions}, figures
    verify(url, sessions)
    ideal = concurrency / LATENCY
    rate = sessions / figures["seconds"]
    cpu = usage.ru_utime + usage.ru_stime - own.ru_utime - own.ru_stime
    print(
        f"{sessions:,} sessions, {concurrency} in flight: {rate:,.0f} sessions/s, {rate / ideal:.2f} of the ideal"
        f" {ideal:,.0f}/s ({seconds:.1f} s with the start)"
    )
    print(
        f"  processor seconds: backfill {cpu:.1f}, platform {used(platform.pid) - before[0]:.1f}, Postgres"
        f" {used_by_children_of(postmaster) - before[1]:.1f}, on {os.cpu_count()} cores;"
        f" backfill's memory at its peak {usage.ru_maxrss / 1024:,.0f} MiB",
        flush=True,
    )
    platform.communicate()


def verify(url: str, sessions: int) -> None:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT count(*), count(*) FILTER (WHERE state = 'repaired'), sum(repaired_messages)"
            " FROM analytics.coverage"
        ).fetchone()
    assert rows, "no answer"
    assert rows[:2] == (sessions, sessions), rows


def used(pid: int) -> float:
    """Processor seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_by_children_of(pid: int) -> float:
    """Processor seconds of a server's processes, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    seconds = ended
    for child in children:
        with suppress(FileNotFoundError):  # ended in between: too late to be counted with those that had
            seconds += used(int(child))
    return seconds


if __name__ == "__main__":
    main()
