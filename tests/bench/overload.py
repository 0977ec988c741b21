"""More senders than the receiver can serve, for a minute: `make bench-overload` (needs wrk).

Prints throughput before, during and after, what was refused and how quickly, and the receiver's memory.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from tests.bench.database import migrated, server
from tests.support.payloads import SECRET, WEBHOOK
from tests.support.receivers import Receiver, executing

HERE = Path(__file__).parent
USUAL = 64  # connections
QUEUE = 256  # events that may wait; each connection has one under way


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-overload BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of overload (default 60)")
    parser.add_argument("--times", type=int, default=4, help="as many senders as may wait (default 4)")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; on Debian: apt-get install wrk")
    with server() as (postgres, _):
        url = migrated(postgres, "overload")
        with executing(url, ARCHIVER_QUEUE_EVENTS=str(QUEUE)) as receiver, receiver:
            load(receiver, "warm", 3, USUAL)
            before = load(receiver, "before", 10, USUAL)
            during = load(receiver, "during", arguments.seconds, arguments.times * QUEUE)
            after = load(receiver, "after", 10, USUAL)
    print(f"afterwards {after / before:.2f} of the throughput before; under overload {during / before:.2f}")


def load(receiver: Receiver, name: str, seconds: int, connections: int) -> float:
    """Events a second that were stored."""
    environment = os.environ | {"BENCH_PREFIX": name, "ARCHIVER_WEBHOOK_SECRETS": SECRET}
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(HERE / "events.lua")]
    peak, ending = [0.0], threading.Event()

    def watch() -> None:
        while not ending.wait(0.25):
            peak[0] = max(peak[0], resident(receiver.process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    before = stored(receiver)
    output = subprocess.run(
        [*command, receiver.url + WEBHOOK], env=environment, capture_output=True, text=True, check=True
    ).stdout
    ending.set()
    watching.join()
    rate = (stored(receiver) - before) / seconds
    hit = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    p50, p99 = (match.group(1) if (match := re.search(rf"{share}%\s+(\S+)", output)) else "?" for share in (50, 99))
    print(
        f"{name:8} {connections:5} senders: {rate:7,.0f} stored/s, {int(hit.group(1)) if hit else 0:9,} refused"
        f" (503); answers p50 {p50}, p99 {p99}; receiver's memory at its peak {peak[0]:.0f} MiB",
        flush=True,
    )
    return rate


def stored(receiver: Receiver) -> float:
    return receiver.metric('archiver_received_total{reason="",status="stored"}')


def resident(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    main()
