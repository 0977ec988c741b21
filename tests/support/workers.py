"""`archiver worker` as a process, and sessions that are due."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg

from tests.support import processes
from tests.support.processes import AnyProcess
from tests.support.servers import as_writer
from tests.support.upstreams import CallHQ

SOON = {"ARCHIVER_RECONCILE_AFTER": "1"}


@contextmanager
def running_worker(url: str, callhq: CallHQ, *, log: Any | None = None, **settings: str) -> Iterator[AnyProcess]:
    """`archiver worker`; what is left of it in the end is killed."""
    with running_worker_with({}, url, callhq, log=log, **settings) as process:
        yield process


@contextmanager
def running_worker_with(
    constants: Mapping[str, float], url: str, callhq: CallHQ, *, log: Any | None = None, **settings: str
) -> Iterator[AnyProcess]:
    """As `running_worker`, with other values of constants: see `processes.start`."""
    with tempfile.NamedTemporaryFile() as unread:
        environment = {**os.environ, "DATABASE_URL": as_writer(url), **callhq.settings, **SOON, **settings}
        path = (log or unread).name
        process = processes.start(["worker"], environment, stdout=path, stderr=path, constants=constants)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def execute(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def make_due(url: str, callhq: CallHQ, sessions: int) -> None:
    """Sessions known to the archive, due at once."""
    ids = [callhq.session(f"s{number}", "ok", "ok").id for number in range(sessions)]
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO archiver.events (session_id, dedupe_key, type, source, received_at, last_received_at,"
            " delivery_count, body, salt, body_digest) VALUES (%(id)s, 'r', 'session.registered', 'application',"
            " now() - interval '1 hour', now(), 1, %(body)s, '', '')",
            [{"id": each, "body": json.dumps({"id": each}).encode()} for each in ids],
        )
        cursor.executemany(
            "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, read_by, reconcile_at) VALUES"
            " (%s, now() - interval '1 hour', now() - interval '1 hour', now() + interval '1 day', now())",
            [[each] for each in ids],
        )


def read(url: str) -> int:
    ((count,),) = execute(url, "SELECT count(*) FROM archiver.sessions WHERE reconciled_at IS NOT NULL")
    return int(count)
