"""Export of a large archive, against the same rows streamed through a plain SHA-256: `make bench-export`.

The baseline has the rows and columns of each file of the export, in the same order, by the same queries: copied by
the same Postgres in its binary format through one SHA-256, and neither formatted nor written. Both run in turn.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine

from archiver import database, embedded, telemetry
from archiver.compliance import export, seals
from archiver.compliance.export import ExportRequest, Selection, queries
from archiver.database import copy_out
from tests.bench.database import migrated, server
from tests.bench.ledgers import fill

ALL = Selection(is_all=True)
_DERIVE = (
    "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, coverage, reason)"
    " SELECT session_id, min(received_at), max(received_at), 'complete', 'agreed' FROM archiver.events GROUP BY 1",
    "INSERT INTO archiver.chats (session_id, chat_id, assistant_id, status, cost, variables, created_at, updated_at,"
    " occurred_at, first_received_at, source) SELECT session_id, chat_id, 'assistant', 'completed', 0.0125,"
    """ '{"customerTier": "Premium"}', received_at, received_at, received_at, received_at, 'webhook'"""
    " FROM archiver.events",
    "INSERT INTO archiver.messages (session_id, chat_id, ordinal, role, content, source, place, in_history)"
    " SELECT session_id, chat_id, n, CASE n WHEN 0 THEN 'user' ELSE 'assistant' END,"
    " repeat(md5(chat_id || n) || ' ', 9), 'webhook', (id % 4) * 2 + n + 1, true"
    " FROM archiver.events, generate_series(0, 1) AS n",
    "VACUUM (ANALYZE)",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-export BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="in the ledger (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement in turn; the median counts")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # of the process whose memory is measured
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    telemetry.configure_logs("warning", "text")
    if arguments.url:
        exporting(arguments.url, arguments.output)
        return
    with server() as (postgres, home):
        measure(postgres, home, arguments.events, arguments.rounds)


def exporting(url: str, output: Path) -> None:
    """One export in a process of its own, which tells its seconds and its memory at its highest."""
    engine = database.connect(database.database_url(url), pool_size=1)
    started = time.perf_counter()
    export.make(engine, output, ExportRequest(ALL, ["jsonl"], "bench"))
    seconds = time.perf_counter() - started
    engine.dispose()
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(postgres: embedded.Postgres, home: Path, events: int, rounds: int) -> None:
    url = migrated(postgres, "exported")
    fill(url, events)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in _DERIVE:
            connection.execute(statement.encode())
    engine = database.connect(database.database_url(url), pool_size=1)
    seals.seal(engine)
    output = home / "out"
    measured: dict[str, list[float]] = {"plain": [], "export": [], "plain events": [], "check": []}
    memory = 0.0
    for _ in range(rounds):
        measured["plain"].append(timed(lambda: plain(engine, everything())))
        measured["plain events"].append(timed(lambda: plain(engine, [queries.ledger(ALL)])))
        command = [sys.executable, "-m", "tests.bench.export", "--url", url, "--output", str(output)]
        process = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        measured["export"].append(float(process[0]))
        memory = max(memory, float(process[1]))
        measured["check"].append(timed(lambda: checked(output, events)))
        size = sum(each.stat().st_size for each in output.iterdir())
        shutil.rmtree(output)
    seconds = {name: statistics.median(each) for name, each in measured.items()}
    print(f"{events:,} events; the export has {size / 1e6:,.0f} MB")
    print(f"{'plain SHA-256 of the same rows':34}{events / seconds['plain']:10,.0f} events/s")
    print(f"{'archiver export':34}{events / seconds['export']:10,.0f} events/s")
    print(f"{'archiver export --check':34}{events / seconds['check']:10,.0f} events/s")
    print(f"{'(plain SHA-256 of the ledger alone':34}{events / seconds['plain events']:10,.0f} events/s)")
    print(f"export / plain {seconds['plain'] / seconds['export']:.2f}")
    print(f"memory of the exporting process at its highest: {memory:,.0f} MiB")
    engine.dispose()


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def everything() -> list[sql.Composable]:
    """What an export as JSON lines reads."""
    transcripts = [each for name in queries.TRANSCRIPTS for each in queries.rows_of(ALL, name, sql.SQL("v.*"))]
    others = ["acts", "erasures", "seals"]
    return [*transcripts, queries.ledger(ALL), *(sql.SQL(f"SELECT * FROM archiver.{name}") for name in others)]


def plain(engine: Engine, wanted: list[sql.Composable]) -> None:
    """The same rows, streamed and hashed, and nothing else."""
    hashed = sha256()
    with database.snapshot(engine, statement_seconds=3600) as connection:
        for query in wanted:
            for row in copy_out.rows(connection, sql.SQL("COPY ({}) TO STDOUT (FORMAT BINARY)").format(query)):
                hashed.update(row)


def checked(output: Path, events: int) -> None:
    result = export.Checked()
    assert not list(export.check(output, checked=result))
    assert result.events == events


main()
