"""Runs the cases in turn, several rounds, prints rates, ratios and lags, and audits what was acknowledged."""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psycopg
from sqlalchemy import event

from archiver import database, embedded, events, ledger
from archiver.events import Delivery
from tests.bench.database import migrated, server
from tests.support.payloads import SECRET, WEBHOOK, created

HERE = Path(__file__).parent
CONNECTIONS = 64
WARM_SECONDS = 3
LAG_SECONDS = 0.25  # between two looks at the lag of the feed
CATCH_UP_SECONDS = 300  # at most, after the load
AUDITED = 2_000  # events of which each single acknowledgement is checked

NAMES = {
    "a": "no-op Starlette endpoint",
    "b": "plain receiver, one transaction an event",
    "c": "archiver",
    "d": "the database alone, fed the archiver's batches",
    "e": "archiver without summaries, rollups, search",
}


class Load(NamedTuple):
    """One case in one round. Latencies in milliseconds; None where there are no requests."""

    rate: float
    p50: float | None = None
    p99: float | None = None
    acknowledged: int = 0


class Lag(NamedTuple):
    """How far `analytics.sessions` was behind during the load, and how long it took to catch up. In seconds."""

    median: float
    most: float
    catch_up: float


class BenchError(Exception):
    """The audit found something, or the run cannot be had."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="of load for each case and round (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of all cases in turn; the median counts (default 3)")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; on Debian: apt-get install wrk")
    try:
        with server() as (postgres, home):
            run(postgres, home, arguments.seconds, arguments.rounds)
    except BenchError as failure:
        sys.exit(f"bench: {failure}")


def run(postgres: embedded.Postgres, home: Path, seconds: int, rounds: int) -> None:
    urls = {case: migrated(postgres, f"bench_{case}") for case in "bcde"}
    with psycopg.connect(postgres.url) as connection:
        (version,) = connection.execute("SELECT version()").fetchone() or ("?",)
        (fsync,) = connection.execute("SHOW fsync").fetchone() or ("?",)
    print(f"{version.split(' on ')[0]}, fsync {fsync}, {CONNECTIONS} connections, {os.cpu_count()} cores")
    print(f"{rounds} rounds of {seconds} s a case, after {WARM_SECONDS} s to warm up; medians, also of ratios;")
    print("every event of b, c and d is durable when it is counted")
    results: dict[str, list[Load]] = {case: [] for case in NAMES}
    lags: dict[str, list[Lag]] = {"c": [], "e": []}
    acknowledged = 0
    batch = 1.0
    for number in range(rounds):
        for case in "abce":
            with serving(case, urls.get(case, postgres.url), home) as base:
                # A process that has just started imports, connects and plans; so does the worker beside the archiver.
                warm = measure(base, WARM_SECONDS, prefix=f"{case}w{number}")
                loading = partial(measure, base, seconds, prefix=f"{case}{number}")
                if case in lags:
                    load, lag = measure_lag(urls[case], loading)
                    lags[case].append(lag)
                else:
                    load = loading()
                if case == "c":
                    acknowledged += warm.acknowledged + load.acknowledged
                    batch = mean_batch(base)
            results[case].append(load)
            print(f"  round {number + 1} {case}: {load.rate:8,.0f} events/s", flush=True)
        results["d"].append(feed(urls["d"], round(batch), seconds, prefix=f"d{number}"))
        print(f"  round {number + 1} d: {results['d'][-1].rate:8,.0f} events/s", flush=True)
    report(results, batch)
    report_lags(lags)
    audit_derived(urls)
    audit(urls["c"], acknowledged, rounds * 2)
    with serving("c", urls["c"], home) as base:
        audit_each(base, urls["c"])


@contextmanager
def serving(case: str, url: str, home: Path) -> Iterator[str]:
    """The server of a case in a process of its own; all three under the same uvicorn settings."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if case in "ce":
        command = ["-m", "archiver" if case == "c" else "tests.bench.underived", "serve", "--port", str(port)]
    else:
        app = "noop" if case == "a" else "plain"
        command = ["-m", "uvicorn", f"tests.bench.baselines:{app}", "--factory", "--port", str(port)]
        command += ["--no-access-log", "--log-level", "warning", "--no-server-header", "--backlog", "2048"]
    environment = os.environ | {
        "DATABASE_URL": url,
        "ARCHIVER_WEBHOOK_SECRETS": SECRET,
        "ARCHIVER_LOG_LEVEL": "warning",
        "ARCHIVER_HOME": str(home),
        "ARCHIVER_SEARCH": "off" if case == "e" else "on",
    }
    process = subprocess.Popen([sys.executable, *command], env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(base, process)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_it_answers(base: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(base + "/healthz", timeout=1).close()
        except urllib.error.HTTPError:
            return  # 404 is an answer
        except OSError:
            time.sleep(0.05)  # between two looks at a port that nobody listens on yet
        else:
            return
    raise BenchError("a server did not start")


def measure(base: str, seconds: int, prefix: str) -> Load:
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(HERE / "events.lua")]
    environment = os.environ | {"BENCH_PREFIX": prefix, "ARCHIVER_WEBHOOK_SECRETS": SECRET}
    output = subprocess.run(
        [*command, base + WEBHOOK], env=environment, check=True, capture_output=True, text=True
    ).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise BenchError(f"not every request was answered 2xx:\n{output}")
    matched = {name: re.search(pattern, output) for name, pattern in _PATTERNS.items()}
    rate, count, p50, p99 = (match.group(1) if (match := matched[name]) else "0" for name in _PATTERNS)
    return Load(float(rate), milliseconds(p50), milliseconds(p99), int(count))


def measure_lag(url: str, loading: Callable[[], Load]) -> tuple[Load, Lag]:
    """Measure a load, and how far the feed and `analytics.sessions`, which it keeps, are behind."""
    lags, ended = [0.0], threading.Event()

    def watch() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not ended.wait(LAG_SECONDS):
                lags.append(feed_lag(connection))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        load = loading()
    finally:
        ended.set()
        watcher.join()
    started = time.monotonic()
    with psycopg.connect(url, autocommit=True) as connection:
        while feed_lag(connection):
            if time.monotonic() - started > CATCH_UP_SECONDS:
                raise BenchError(f"the feed has not caught up in {CATCH_UP_SECONDS} s")
            time.sleep(LAG_SECONDS)
    return load, Lag(statistics.median(lags), max(lags), time.monotonic() - started)


def feed_lag(connection: psycopg.Connection) -> float:
    (seconds,) = connection.execute("SELECT feed_lag_seconds FROM analytics.health").fetchone() or (0.0,)
    return float(seconds)


_PATTERNS = {
    "rate": r"Requests/sec:\s+([\d.]+)",
    "count": r"(\d+) requests in",
    "p50": r"50%\s+([\d.]+\w+)",
    "p99": r"99%\s+([\d.]+\w+)",
}


def milliseconds(text: str) -> float:
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def mean_batch(base: str) -> float:
    with urllib.request.urlopen(base + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    total, count = (
        float(re.findall(rf"archiver_batch_events_{name} ([\d.]+)", text)[0]) for name in ("sum", "count")
    )
    return total / count


def feed(url: str, batch: int, seconds: int, prefix: str) -> Load:
    """(d): the very statements that the archiver sends, taken down beforehand, with nothing else around them."""
    engine = database.connect(database.database_url(url), pool_size=1)
    script: list[tuple[str, Any]] = []
    event.listen(engine, "connect", lambda opened, _: record(opened, script))
    number, spent, done = 0, 0.0, 0
    with psycopg.connect(url, cursor_factory=psycopg.RawCursor) as connection:
        while spent < seconds:
            transactions = []
            for _ in range(20):
                script.clear()
                take_down(engine, [body(prefix, number + n) for n in range(batch)])
                transactions.append(list(script))
                number += batch
            started = time.perf_counter()
            for statements in transactions:
                for statement, parameters in statements:
                    connection.execute(statement, parameters)
                connection.commit()
            spent += time.perf_counter() - started
            done += batch * len(transactions)
    engine.dispose()
    return Load(done / spent)


def record(opened: psycopg.Connection, script: list[tuple[str, Any]]) -> None:
    class Recording(psycopg.RawCursor):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
            if query != ";":  # which the pool asks, and not the archiver
                script.append((query, params))
            return super().execute(query, params, **options)

    opened.cursor_factory = Recording


def take_down(engine: Any, bodies: Sequence[bytes]) -> None:
    observations = []
    for raw in bodies:
        parsed = events.parse(raw)
        assert isinstance(parsed, events.Event)
        observations.append(Delivery(parsed, datetime.now(UTC), "key"))
    with database.transaction(engine) as connection:
        ledger.record(connection, observations)
        connection.rollback()


def body(prefix: str, number: int) -> bytes:
    """As events.lua makes them."""
    text = "A sentence of the usual length that a customer writes. " * 5
    return created(
        f"{prefix}-{number}",
        f"{prefix}-s{number // 4}",
        1_705_311_000_000 + number,
        externalChatId=f"x{number}",
        input=f"{number}: {text}",
        output=[{"role": "assistant", "content": text}],
    )


def report(results: dict[str, list[Load]], batch: float) -> None:
    rates = {case: statistics.median(load.rate for load in loads) for case, loads in results.items()}
    print(f"\n{'':3}{'':48}{'events/s':>10}{'p50 ms':>9}{'p99 ms':>9}")
    for case, loads in results.items():
        latencies = [
            f"{statistics.median(values):9.1f}"
            if (values := [v for load in loads if (v := getattr(load, name))])
            else ""
            for name in ("p50", "p99")
        ]
        print(f"{case:3}{NAMES[case]:48}{rates[case]:10,.0f}{''.join(latencies)}")
    # Of each round, for what disturbs a machine lasts longer than a case.
    of_a, of_b, of_d, of_e = (
        statistics.median(c.rate / other.rate for c, other in zip(results["c"], results[case], strict=True))
        for case in "abde"
    )
    print(f"\nc/a {of_a:.2f}   c/b {of_b:.1f}   c/d {of_d:.2f}   c/e {of_e:.2f}")
    print(f"mean batch of c: {batch:.0f} events")


def report_lags(lags: dict[str, list[Lag]]) -> None:
    for case, measured in lags.items():
        median, most, catch_up = (statistics.median(each[n] for each in measured) for n in range(3))
        print(
            f"lag of the feed{' and of analytics.sessions' if case == 'c' else ''} in {case}: median {median:.1f} s,"
            f" at most {most:.1f} s, caught up {catch_up:.1f} s after the load"
        )


def audit_derived(urls: dict[str, str]) -> None:
    """Only the archiver of case c keeps rows for analysts."""
    for case, is_on in (("c", True), ("e", False)):
        with psycopg.connect(urls[case]) as connection:
            found = connection.execute("SELECT FROM archiver.summaries LIMIT 1").fetchone()
        if (found is not None) is not is_on:
            raise BenchError(f"case {case} has {'no ' if is_on else ''}summaries")


def audit(url: str, acknowledged: int, rounds: int) -> None:
    """Requests that were under way when the load stopped may be stored without having been counted."""
    with psycopg.connect(url) as connection:
        stored, doubled, chats, messages = connection.execute(
            "SELECT count(*), count(*) - count(DISTINCT chat_id), (SELECT count(*) FROM analytics.chats),"
            " (SELECT count(*) FROM archiver.messages) FROM archiver.events"
        ).fetchone() or (0, 0, 0, 0)
    if not acknowledged <= stored <= acknowledged + CONNECTIONS * rounds or doubled:
        raise BenchError(f"{acknowledged} events were acknowledged, {stored} are in the ledger, {doubled} doubled")
    if chats != stored or messages != 2 * stored:
        raise BenchError(f"of {stored} events the archive has {chats} chats and {messages} messages")
    print(f"audit: {acknowledged:,} acknowledged, all in the ledger once, with their chats and messages")


def audit_each(base: str, url: str) -> None:
    """The same for single events: which were answered 200, and with which row."""

    async def send() -> dict[str, int]:
        limits = httpx2.Limits(max_connections=CONNECTIONS)
        async with httpx2.AsyncClient(limits=limits, headers={"x-webhook-secret": SECRET}, timeout=60) as client:
            answers = await asyncio.gather(
                *(client.post(base + WEBHOOK, content=body("e", n)) for n in range(AUDITED))
            )
        return {
            f"e-{n}": json.loads(answer.content)["id"]
            for n, answer in enumerate(answers)
            if answer.status_code == 200
        }

    answered = asyncio.run(send())
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT e.chat_id, e.id FROM archiver.events e JOIN archiver.chats USING (session_id, chat_id)"
            " WHERE e.chat_id LIKE 'e-%' AND e.delivery_count = 1"
        ).fetchall()
    if sorted(rows) != sorted(answered.items()) or len(answered) != AUDITED:
        raise BenchError(f"{len(answered)} events were acknowledged one by one, {len(rows)} found")
    print(f"audit: {len(rows):,} more, each found under the id that its answer gave")


main()
