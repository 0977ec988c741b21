"""A soak: senders at a steady rate while a fault befalls Postgres, the network or the receiver every few seconds.

`make soak`. Prints the seed, each fault, and at the end the audit: every acknowledged event in the ledger once and in
the archive, every other one at most once.
"""

import argparse
import http.client
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from archiver import embedded
from tests.bench.database import migrated, server
from tests.support.load import assert_archived, body_of, rows
from tests.support.proxies import Proxy, proxied
from tests.support.receivers import Receiver, deliver, executing
from tests.support.waiting import until

SENDERS = 16
DRAIN_SECONDS = 120
BROKEN = (http.client.HTTPException, OSError)


class Senders:
    """Deliver at a steady rate; what is not acknowledged is not sent again."""

    def __init__(self, port: Callable[[], int], rate: float) -> None:
        self.answers: list[tuple[int, int, str, float, bool]] = []  # event, code, status, seconds, database away
        self.away = threading.Event()  # the database is, and the receiver is not
        self._port, self._interval = port, SENDERS / rate
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def _send(self, place: int) -> None:
        connection: http.client.HTTPConnection | None = None
        due = time.monotonic() + place * self._interval / SENDERS
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._interval, time.monotonic() - 1)
            with self._lock:
                number = next(self._numbers)
            started, was_away = time.monotonic(), self.away.is_set()
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self._port(), timeout=60)
                code, item = deliver(connection, body_of(number))
            except BROKEN:
                if connection:
                    connection.close()
                connection = None
                code, item = 0, {"status": "broken"}
            seconds = time.monotonic() - started
            self.answers.append((number, code, item["status"], seconds, was_away and self.away.is_set()))


class World:
    """Postgres, a proxy before it, and a receiver that is started again."""

    def __init__(self, postgres: embedded.Postgres, proxy: Proxy, url: str, home: Path, rng: random.Random) -> None:
        self.postgres, self.proxy, self.url, self.home, self.rng = postgres, proxy, url, home, rng
        self.receiver: Receiver
        self._context: Any = None
        self.port = 0

    def start_receiver(self) -> None:
        options = ("--port", str(self.port)) if self.port else ()
        self._context = executing(self.url, *options, ARCHIVER_HOME=str(self.home), ARCHIVER_LOG_LEVEL="info")
        self.receiver = self._context.__enter__()
        self.receiver.__enter__()
        self.port = self.receiver.port

    def stop_receiver(self) -> None:
        self._context.__exit__(None, None, None)

    def kill_receiver(self) -> None:
        self.receiver.kill()
        self.stop_receiver()
        self.start_receiver()

    def stop_postgres(self, how: signal.Signals) -> None:
        pid = self.postgres.pid
        os.kill(pid, how)
        until(lambda: not Path(f"/proc/{pid}").exists(), "Postgres ends", 60)
        self.wait()
        until(lambda: self.postgres.restart_if_ended() or self.postgres.pid != pid, "Postgres starts again", 60)

    def freeze_postgres(self) -> None:
        children = Path(f"/proc/{self.postgres.pid}/task/{self.postgres.pid}/children").read_text().split()
        pids = [self.postgres.pid, *map(int, children)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                self.wait()

    def terminate_backends(self) -> None:
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            for _ in range(20):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'callhq-archiver'"
                )
                time.sleep(0.05)  # paces the fault

    def proxy_does(self, mode: Any) -> None:
        self.proxy.set(mode)
        self.wait()
        if mode == "silent":
            self.proxy.set("cut")
        self.proxy.set("pass")

    def wait(self) -> None:
        """How long a fault lasts."""
        time.sleep(self.rng.uniform(0.5, 5))


def faults(world: World) -> dict[str, tuple[Callable[[], None], bool]]:
    """By name: what is done, and whether only the database is away meanwhile."""
    return {
        "kill -9 of the receiver": (world.kill_receiver, False),
        "kill -9 of the postmaster": (lambda: world.stop_postgres(signal.SIGKILL), True),
        "immediate stop of Postgres": (lambda: world.stop_postgres(signal.SIGQUIT), True),
        "fast restart of Postgres": (lambda: world.stop_postgres(signal.SIGINT), True),
        "Postgres stands still": (world.freeze_postgres, True),
        "backends are terminated": (world.terminate_backends, True),
        "connections are cut": (lambda: world.proxy_does("cut"), True),
        "the network is silent": (lambda: world.proxy_does("silent"), True),
        "answers to COMMIT are lost": (lambda: world.proxy_does("swallow"), True),
    }


@contextmanager
def running(seed: int) -> Iterator[World]:
    with server() as (postgres, folder):
        url = migrated(postgres, "soak")
        with proxied(url) as (proxy, through):
            world = World(postgres, proxy, through, folder / "receiver", random.Random(seed))
            world.start_receiver()
            try:
                yield world
            finally:
                world.stop_receiver()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000 if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak SOAK_ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=int, default=180, help="of faults (default 180)")
    parser.add_argument("--rate", type=float, default=400, help="events a second (default 400)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults (default: any)")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with running(arguments.seed) as world:
        senders = Senders(lambda: world.port, arguments.rate)
        started = time.monotonic()
        happened = 0
        try:
            while (now := time.monotonic() - started) < arguments.seconds:
                name, (befall, is_database) = world.rng.choice(list(faults(world).items()))
                print(f"{now:6.1f} s  {name}", flush=True)
                if is_database:
                    senders.away.set()
                befall()
                senders.away.clear()
                happened += 1
                time.sleep(world.rng.uniform(1, 4))
        finally:
            senders.end()
        seconds = time.monotonic() - started
        until(lambda: world.receiver.metric("archiver_spool_events") == 0, "the spool is empty", DRAIN_SECONDS)
        report(senders, seconds, happened)
        audit(world, senders)


def report(senders: Senders, seconds: float, happened: int) -> None:
    answers = senders.answers
    acknowledged = sum(code == 200 for _, code, *_ in answers)
    away = [code for *_, code, _, _, is_away in answers if is_away]
    print(f"{len(answers):,} events in {seconds:.0f} s ({len(answers) / seconds:.0f}/s), {happened} faults")
    print(f"acknowledged {acknowledged:,}, refused or broken {len(answers) - acknowledged:,}")
    if away:
        print(f"while only the database was away: {sum(code == 200 for code in away) / len(away):.2%} answered 2xx")
    for status in ("stored", "spooled"):
        taken = [seconds for _, _, item, seconds, _ in answers if item == status]
        print(
            f"{status}: {len(taken):,}; p50 {percentile(taken, 0.5):.1f} ms, p90 {percentile(taken, 0.9):.1f} ms,"
            f" p99 {percentile(taken, 0.99):.1f} ms"
        )


def audit(world: World, senders: Senders) -> None:
    acknowledged = {number for number, code, *_ in senders.answers if code == 200}
    assert_archived(world.url, acknowledged)
    ((events,),) = rows(world.url, "SELECT count(*) FROM archiver.events")
    print(f"audit: {len(acknowledged):,} acknowledged, 0 lost, 0 doubled; {events:,} in the ledger and the archive")


if __name__ == "__main__":
    main()
