"""One long session whose history is read after each turn: `make bench-long`.

Each turn is sent to `archiver serve` and then read, through the same write path as a worker's readings. Prints what a
turn and a reading cost in processor time (of the receiver or the reader, and of Postgres), the room of
the ledger, and the latency of other sessions beside it. Exits 1 if a bound is broken.
"""

import argparse
import asyncio
import http.client
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psycopg
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database
from archiver.events import Delivery, responses
from archiver.inbound.writing import Outcome, write
from tests.bench.database import migrated, server
from tests.support.payloads import SECRET, WEBHOOK, created
from tests.support.receivers import executing

SESSION = "long"
ROOM = 3.0  # times the transcript
TURN = 5.0  # times the processor time of the first turns
LINEAR = 1.4  # times the growth of the session: for noise
LATENCY = 2.0  # times the undisturbed median

Said = tuple[str, str]


class Costs(msgspec.Struct):
    """Processor seconds of each turn and of each reading."""

    turns: list[float] = []
    readings: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-long BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--turns", type=int, default=2_000, help="each read after it has arrived (default 2,000)")
    parser.add_argument("--size", type=int, default=3_000, help="bytes of each turn (default 3,000)")
    arguments = parser.parse_args()
    with server() as (postgres, _):
        url = migrated(postgres, "long")
        with executing(url) as receiver, receiver:
            bench = Bench(url, receiver.url, receiver.process.pid, postgres.pid, arguments.size)
            broken = [line for line, is_kept in bench.run(arguments.turns) if not is_kept]
            bench.close()
    if broken:
        sys.exit("bench-long: " + "; ".join(broken))


class Bench:
    """The session as upstream has it, and connections to the receiver and to the database."""

    def __init__(self, url: str, receiver: str, receiver_pid: int, postmaster: int, size: int) -> None:
        self._url, self._receiver, self._size = url, receiver, size
        self._pids = receiver_pid, postmaster
        self._words = random.Random(15)  # the same each time
        self._lines: list[str] = []  # messages as JSON
        self._transcript = 0
        self._loop = asyncio.new_event_loop()
        self._engine: AsyncEngine = database.connect_async(database.database_url(url), pool_size=1)
        self._sender = Sender(receiver)

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.dispose())
        self._loop.close()

    def run(self, turns: int) -> Iterator[tuple[str, bool]]:
        """Each bound as a line, which is printed, and whether it is kept."""
        undisturbed = self._others(lambda: time.sleep(0.005), 200)
        costs = Costs()
        for number in range(turns):
            costs.turns.append(self._cost(lambda n=number: self._turn(n), receiver=True))  # type: ignore[misc]
            costs.readings.append(self._cost(self._read, receiver=False))
            if number % 100 == 99:
                print(f"{number + 1:,} turns", flush=True)
        yield self._report_room(turns)
        yield self._report_turns(costs.turns)
        yield from self._report_readings(costs.readings)
        more = iter(range(turns, 2 * turns))

        def go_on() -> None:
            self._turn(next(more))
            self._read()

        disturbed = self._others(go_on, 200)
        ratio = disturbed / undisturbed
        line = (
            f"other sessions: median {1000 * disturbed:.1f} ms beside it, {1000 * undisturbed:.1f} ms alone"
            f" ({ratio:.2f}; at most {LATENCY})"
        )
        print(line)
        yield line, ratio <= LATENCY

    def _report_room(self, turns: int) -> tuple[str, bool]:
        with psycopg.connect(self._url) as connection:
            sizes = "SELECT pg_total_relation_size(%s), pg_total_relation_size(%s), pg_total_relation_size(%s)"
            tables = ("archiver.events", "archiver.pieces", "archiver.messages")
            events, pieces, messages = connection.execute(sizes, tables).fetchone() or (0, 0, 0)
        ratio = (events + pieces) / self._transcript
        line = (
            f"{turns:,} turns, a transcript of {self._transcript / 1e6:.1f} MB: ledger {events / 1e6:.1f} MB, pieces"
            f" {pieces / 1e6:.1f} MB ({ratio:.2f} of it; at most {ROOM}), archive {messages / 1e6:.1f} MB"
        )
        print(line)
        return line, ratio <= ROOM

    def _report_turns(self, turns: Sequence[float]) -> tuple[str, bool]:
        first, last = _ends(turns)
        line = (
            f"a turn: {1000 * first:.2f} ms at first, {1000 * last:.2f} ms at the end ({last / first:.2f}; at most"
            f" {TURN})"
        )
        print(line)
        return line, last <= TURN * first

    def _report_readings(self, readings: Sequence[float]) -> Iterator[tuple[str, bool]]:
        quarter = len(readings) // 4
        early, late = _ends(readings[:quarter])[1], _ends(readings)[1]
        growth = late / early
        line = (
            f"a reading: {1000 * early:.0f} ms after a quarter, {1000 * late:.0f} ms at the end ({growth:.2f}; linear"
            f" is 4, at most {4 * LINEAR:.1f})"
        )
        print(line)
        yield line, growth <= 4 * LINEAR

    def _turn(self, number: int) -> None:
        half = self._size // 2
        texts, answer = (self._words.randbytes(half // 2).hex() for _ in range(2))
        self._transcript += len(texts) + len(answer)
        for role, content in (("user", texts), ("assistant", answer)):
            self._lines.append(json.dumps({"role": role, "content": content}))
        now = datetime.now(UTC).isoformat()
        output = [{"role": "assistant", "content": answer}]
        values: dict[str, Any] = {"input": texts, "output": output, "createdAt": now, "updatedAt": now}
        self._sender.send(created(f"turn-{number}", SESSION, **values))

    def _read(self) -> None:
        now = datetime.now(UTC)
        body = (
            f'{{"message":"ok","session":{{"id":"{SESSION}","updatedAt":"{now.isoformat()}","messages":'
            f"[{','.join(self._lines)}]}}}}"
        ).encode()
        event = responses.parse_history(SESSION, 200, body)
        delivery = Delivery(event, now, None, source=responses.SOURCE)
        (result,) = self._loop.run_until_complete(write(self._engine, [delivery]))
        assert isinstance(result, Outcome), result
        assert result.status == "stored", result

    def _cost(self, work: Callable[[], None], *, receiver: bool) -> float:
        def used() -> float:
            return (_used(self._pids[0]) if receiver else time.process_time()) + _used_by_children_of(self._pids[1])

        before = used()
        work()
        return used() - before

    def _others(self, beside: Callable[[], None], requests: int) -> float:
        """The median latency of other sessions' webhooks, while `beside` is done over and over.

        Another process sends them: in this one they would wait for the interpreter while a history is aligned.
        """
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as senders:
            senders.submit(os.getpid).result()  # it has started
            latencies = senders.submit(_send_others, self._receiver, requests)
            while not latencies.done():
                beside()
            return statistics.median(latencies.result())


def _send_others(receiver: str, requests: int) -> list[float]:
    """Send webhooks of other sessions. Returns the latency of each, in seconds."""
    sender = Sender(receiver)
    latencies: list[float] = []
    for number in range(requests):
        body = created(f"{time.time_ns()}-{number}", f"other-{number % 20}")
        started = time.perf_counter()
        sender.send(body)
        latencies.append(time.perf_counter() - started)
        time.sleep(0.02)
    return latencies


class Sender:
    """Sends webhooks on one connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def send(self, body: bytes) -> None:
        self._connection.request("POST", WEBHOOK, body, {"x-webhook-secret": SECRET})
        answer = self._connection.getresponse()
        result = answer.read()
        assert answer.status == 200, result
        assert b'"stored"' in result, result


def _ends(costs: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and of the last costs; the very first ones warm up."""
    window = max(5, len(costs) // 40)
    return statistics.median(costs[5 : 5 + window]), statistics.median(costs[-window:])


def _used(pid: int) -> float:
    """Processor seconds of a process, to the microsecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _used_by_children_of(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for child in children:
        with suppress(FileNotFoundError):
            total += _used(int(child))
    return total


if __name__ == "__main__":
    main()
