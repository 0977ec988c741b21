"""Follow-ups compared with the changes of the archive, while processes are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from archiver import embedded
from archiver.outbound.followups.deliveries import message_id
from tests.support import processes
from tests.support.erasures import record
from tests.support.followups import SECRET, let_time_pass, states, subscribe
from tests.support.outages import stopped
from tests.support.payloads import created, deleted
from tests.support.ports import free_port
from tests.support.processes import AnyProcess
from tests.support.rows import rows
from tests.support.servers import as_writer
from tests.support.waiting import until

FAILS = 0.2


class Recorder:
    """`tests.support.recorder`, which can be killed and started again."""

    def __init__(self, file: Path, share: float = FAILS) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._file, self._share = file, share
        self.start()

    def start(self) -> None:
        result = [str(self.port), str(self._file), str(self._share), SECRET]
        self.process = subprocess.Popen([sys.executable, "-m", "tests.support.recorder", *result])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def lines(self) -> list[dict[str, object]]:
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text().split("\n")[:-1]]


@contextmanager
def recording(folder: Path, share: float = FAILS) -> Iterator[Recorder]:
    recorder = Recorder(folder / "recorded", share)
    try:
        yield recorder
    finally:
        recorder.kill()


@contextmanager
def running_worker(url: str, **settings: str) -> Iterator[AnyProcess]:
    """`archiver worker`, which sends as fast as it can."""
    values = {"ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": "true", "ARCHIVER_FOLLOWUPS_RATE": "0"}
    with tempfile.NamedTemporaryFile() as log:
        environment = {**os.environ, "DATABASE_URL": as_writer(url), **values, **settings}
        process = processes.start(["worker"], environment, stdout=log.name, stderr=log.name)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def write(engine: Engine, count: int, rng: random.Random, ending: threading.Event) -> None:
    """So many turns, some told twice, changed or deleted, in transactions of any size; each until it is committed."""
    number = 0
    while number < count and not ending.is_set():
        size = rng.randint(1, 20)
        bodies = []
        for each in range(number, min(number + size, count)):
            bodies.append(created(f"c{each}", f"s{each // 4}"))
            if rng.random() < 0.1:
                bodies.append(deleted(f"c{rng.randint(0, each)}", f"s{each // 4}"))
            if rng.random() < 0.1:
                bodies.append(created(f"c{each}", f"s{each // 4}"))
        while not ending.is_set():
            try:
                record(engine, *bodies)
                break
            except SQLAlchemyError:
                ending.wait(0.05)
        number += size


def survive(
    postgres: embedded.Postgres, engine: Engine, url: str, folder: Path, *, events: int, rng: random.Random
) -> str:
    """Events, while everything is killed in turn, and the comparison; answers its figures."""
    ending = threading.Event()
    with recording(folder) as recorder, ExitStack() as workers:
        subscribe(engine, recorder.url, "chat.created", "chat.deleted", concurrency=8)
        running = [workers.enter_context(running_worker(url)) for _ in range(2)]
        writing = threading.Thread(target=write, args=(engine, events, rng, ending))
        writing.start()
        try:
            for fault in (signal.SIGKILL, None, signal.SIGINT):
                seen = len(recorder.lines)
                until(lambda seen=seen: _goes_on(engine, recorder, seen), "it goes on")  # type: ignore[misc]  # bound
                running[0].kill()
                running = [*running[1:], workers.enter_context(running_worker(url))]
                recorder.kill()
                if fault is not None:
                    with stopped(postgres, fault):
                        pass
                recorder.start()
            writing.join(240)
            assert not writing.is_alive()
            until(lambda: _is_done(engine), "all are told")
        finally:
            ending.set()
            writing.join()
    return compare(engine, recorder)


def _goes_on(engine: Engine, recorder: Recorder, seen: int) -> bool:
    with suppress(SQLAlchemyError):
        let_time_pass(engine)
    return len(recorder.lines) >= seen + 30


def _is_done(engine: Engine) -> bool:
    with suppress(SQLAlchemyError):
        let_time_pass(engine)
        ((outbox, behind),) = rows(
            engine,
            "SELECT (SELECT count(*) FROM archiver.outbox),"
            " (SELECT max(cursor) FROM archiver.changes) - (SELECT cursor FROM archiver.subscriptions)",
        )
        return outbox == behind == 0 and states(engine).keys() == {"delivered"}
    return False


def compare(engine: Engine, recorder: Recorder) -> str:
    changes = rows(
        engine,
        "SELECT cursor, changed_at, session_id, chat_id, type FROM archiver.changes"
        " WHERE type IN ('chat.created', 'chat.deleted')",
    )
    lines = recorder.lines
    expected = {message_id(1, cursor, changed_at): cursor for cursor, changed_at, *_ in changes}
    assert {line["id"] for line in lines if line["taken"]} == expected.keys()
    ids_of = defaultdict(set)
    for line in lines:
        ids_of[line["cursor"]].add(line["id"])
    assert all(len(ids) == 1 for ids in ids_of.values())
    assert {line["id"] for line in lines} == expected.keys()
    # And the feed is the archive.
    made = {(session_id, chat_id) for _, _, session_id, chat_id, kind in changes if kind == "chat.created"}
    deleted = rows(engine, "SELECT session_id, chat_id FROM analytics.chats WHERE deleted_at IS NOT NULL")
    assert made | set(deleted) == set(rows(engine, "SELECT session_id, chat_id FROM analytics.chats"))
    taken = sum(bool(line["taken"]) for line in lines)
    return f"{len(expected):,} changes told, {len(lines):,} requests, {taken - len(expected):,} of them taken again"
