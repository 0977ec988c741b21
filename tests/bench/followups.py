"""What follow-ups cost, and what one receiver costs another: `make bench-followups` (needs wrk).

(a) ingest alone, and with three subscriptions that match everything, in turns: events/s and their ratio;
(b) the delay from commit to receipt of a healthy receiver, alone and beside one that hangs and one that answers 500;
(c) 5,000 events while workers, a receiver that fails 20 %, and Postgres are killed: what was told, and what changed.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine

from archiver import database, embedded
from tests.bench.database import migrated, server
from tests.support.erasures import record
from tests.support.followups import Receiver, receiving, subscribe
from tests.support.payloads import SECRET, WEBHOOK, created
from tests.support.receivers import executing
from tests.support.recordings import recording, running_worker, survive
from tests.support.rows import rows
from tests.support.waiting import until

HERE = Path(__file__).parent
CONNECTIONS = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-followups BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="of load for each round of (a) (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of (a) in turns; the median counts (default 3)")
    parser.add_argument("--delays", type=int, default=200, help="changes measured in each part of (b) (default 200)")
    parser.add_argument("--events", type=int, default=5_000, help="of (c) (default 5,000; 0: leave it out)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of (c) (default: any)")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; on Debian: apt-get install wrk")
    with server() as (postgres, home):
        beside_ingest(postgres, home, arguments.seconds, arguments.rounds)
        beside_others(postgres, arguments.delays)
        if arguments.events:
            beside_faults(postgres, home, arguments.events, arguments.seed)


@contextmanager
def connected(url: str) -> Iterator[Engine]:
    engine = database.connect(database.database_url(url), pool_size=5)
    try:
        yield engine
    finally:
        engine.dispose()


def beside_ingest(postgres: embedded.Postgres, home: Path, seconds: int, rounds: int) -> None:
    """Each case on a database of its own, with a worker beside the receiver in both."""
    rates: dict[str, list[float]] = {"alone": [], "three subscriptions": []}
    for number in range(rounds):
        for name, measured in rates.items():
            url = migrated(postgres, f"ingest_{number}_{len(measured)}_{name[:5]}")
            with ExitStack() as stack, connected(url) as engine:
                folder = home / f"{number}{name[:5]}"
                folder.mkdir()
                recorder = stack.enter_context(recording(folder, share=0.0)) if name != "alone" else None
                for _ in range(3 if recorder else 0):
                    subscribe(engine, recorder.url if recorder else "")
                serve = executing(url, "--worker", ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE="true")
                receiver = stack.enter_context(stack.enter_context(serve))
                assert receiver.post(created("first", "first")).status_code == 200
                until(lambda: rows(engine, "SELECT 1 FROM archiver.changes"), "the worker publishes", 60)
                until(lambda: not recorder or len(recorder.lines) >= 3, "and sends", 60)  # noqa: B023
                measured.append(load(receiver.url, seconds, f"{number}{name[0]}"))
                sent = len(recorder.lines) if recorder else 0
                print(
                    f"  round {number + 1}, {name}: {measured[-1]:,.0f} events/s; {sent:,} follow-ups sent",
                    flush=True,
                )
    bare, item = (statistics.median(each) for each in rates.values())
    print(f"(a) ingest alone {bare:,.0f} events/s, with three matching subscriptions {item:,.0f}: {item / bare:.2f}")


def load(url: str, seconds: int, prefix: str) -> float:
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(HERE / "events.lua")]
    environment = os.environ | {"BENCH_PREFIX": prefix, "ARCHIVER_WEBHOOK_SECRETS": SECRET}
    output = subprocess.run([*command, url + WEBHOOK], env=environment, check=True, capture_output=True, text=True)
    if "Non-2xx" in output.stdout or "Socket errors" in output.stdout:
        sys.exit(f"bench: not every request was answered 2xx:\n{output.stdout}")
    match = re.search(r"Requests/sec:\s+([\d.]+)", output.stdout)
    assert match
    return float(match.group(1))


def beside_others(postgres: embedded.Postgres, count: int) -> None:
    """The same, first alone, then beside the two others, then alone: the mean of the first and the last counts."""
    medians = []
    with receiving() as healthy, receiving() as hanging, receiving() as failing:
        hanging.hangs = True
        failing.always(500)
        for number, others in enumerate(([], [hanging, failing], [])):
            url = migrated(postgres, f"delays_{number}")
            with connected(url) as engine, running_worker(url, ARCHIVER_FOLLOWUPS_RATE="200"):
                for each in (healthy, *others):
                    subscribe(engine, each.url, "chat.created")
                medians.append(delay(engine, healthy, count, number))
    alone = (medians[0] + medians[2]) / 2
    print(
        f"(b) delay from commit to receipt, median: alone {medians[0]:.0f} and {medians[2]:.0f} ms, beside one that"
        f" hangs and one that fails {medians[1]:.0f} ms: {medians[1] / alone:.2f}"
    )


def delay(engine: Engine, receiver: Receiver, count: int, place: int) -> float:
    """Milliseconds, at about 20 changes a second; the first ones, while the worker starts, do not count."""
    receiver.got.clear()
    came: dict[str, float] = {}
    ending = threading.Event()

    def watch() -> None:
        while not ending.wait(0.002):
            for each in receiver.got[len(came) :]:
                came[each.data["chat_id"]] = time.time()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    record(engine, created(f"first{place}", f"s{place}"))
    until(lambda: came, "the worker has started", 60)
    for number in range(count):
        record(engine, created(f"c{place}-{number}", f"s{place}-{number}"))
        time.sleep(random.uniform(0.02, 0.08))  # so that they do not keep step with anything
    until(lambda: len(came) > count, "all are told", 60)
    ending.set()
    watching.join()
    changed = dict(rows(engine, "SELECT chat_id, changed_at FROM archiver.changes"))
    delays = [at - _seconds(changed[chat_id]) for chat_id, at in came.items() if not chat_id.startswith("first")]
    return statistics.median(delays) * 1000


def _seconds(moment: datetime) -> float:
    return moment.timestamp()


def beside_faults(postgres: embedded.Postgres, home: Path, events: int, seed: int) -> None:
    url = migrated(postgres, "faults")
    started = time.perf_counter()
    with connected(url) as engine:
        result = survive(postgres, engine, url, home, events=events, rng=random.Random(seed))
    seconds = time.perf_counter() - started
    print(f"(c) {events:,} events, seed {seed}, in {seconds:.0f} s: {result}; none is missing, and there is no other")


if __name__ == "__main__":
    main()
