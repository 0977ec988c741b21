"""`archiver serve` under load after kill, signals and lost connections, and beside other receivers."""

import http.client
import itertools
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from archiver.database import database_url as parse_url
from tests.conftest import Cluster
from tests.support import servers
from tests.support.load import Load, assert_archived, body_of, rows
from tests.support.receivers import Receiver, answer, begin, deliver, has_read_all, serving, starting
from tests.support.waiting import until

# What ends here is the receiver: one version of Postgres is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


@contextmanager
def ledger_locked(url: str) -> Iterator[Callable[[], None]]:
    """Nobody writes the ledger until the function that this gives is called."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE archiver.events IN EXCLUSIVE MODE")
        yield connection.rollback


def children(receiver: Receiver) -> set[int]:
    """The receiving processes of `serve --workers`; multiprocessing has one more child, which only watches."""
    result = Path(f"/proc/{receiver.process.pid}/task/{receiver.process.pid}/children").read_text().split()
    return {int(pid) for pid in result if b"spawn_main" in command_line(int(pid))}


def command_line(pid: int) -> bytes:
    """Empty where the process has ended, be it that nobody asked about its end yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def sockets(pid: int) -> int:
    return sum(link.is_socket() for link in Path(f"/proc/{pid}/fd").iterdir())


def is_gone(pid: int) -> bool:
    """Whether it ended."""
    return not command_line(pid)


def test_i1_kill_9_under_load_loses_and_doubles_nothing_that_was_acknowledged(database_url: str) -> None:
    rng = random.Random(1)
    acknowledged: set[int] = set()
    again: list[int] = []  # what was not acknowledged, the platform sends again
    fresh = itertools.count()
    for _ in range(10):
        with serving(database_url) as receiver:
            enough = rng.randint(50, 300)
            load = Load([receiver.port], 8, itertools.chain(again, fresh))
            until(lambda load=load, enough=enough: len(load.answers) >= enough, "some are acknowledged")  # type: ignore[misc]  # bound on purpose
            receiver.kill()
            load.join()
        assert {code for _, code, _ in load.answers} == {200}
        assert load.broken
        acknowledged |= load.acknowledged
        again = load.broken
    assert len(acknowledged) > 500
    assert_archived(database_url, acknowledged)


def test_i3_two_receivers_store_each_of_three_deliveries_once(database_url: str) -> None:
    numbers = [number for number in range(150) for _ in range(3)]
    random.Random(2).shuffle(numbers)
    with serving(database_url) as one, serving(database_url) as other:
        load = Load([one.port, other.port], 50, numbers)
        load.join()
        assert not load.broken
        counted = Counter((number, status) for number, _, status in load.answers)
        assert counted == Counter(
            {(n, status): times for n in range(150) for status, times in (("stored", 1), ("duplicate", 2))}
        )
        duplicates = "archiver_duplicates_total"
        assert one.metric(duplicates) + other.metric(duplicates) == 300
    assert_archived(database_url, set(range(150)))
    assert rows(database_url, "SELECT DISTINCT delivery_count FROM archiver.events") == [(3,)]


def test_workers_share_the_port_the_ledger_and_the_metrics(database_url: str) -> None:
    with serving(database_url, "--workers", "2") as receiver:
        until(lambda: len(children(receiver)) == 2, "both have begun")
        workers = children(receiver)
        until(lambda: all(sockets(pid) for pid in workers), "both listen")
        idle = {pid: sockets(pid) for pid in workers}
        connections = []

        def both_have_some() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
            connections.append(connection)
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            return all(sockets(pid) >= idle[pid] + 5 for pid in workers)

        until(both_have_some, "both took connections")
        result = Counter(
            deliver(connection, body_of(n % 10))[1]["status"] for n, connection in enumerate(connections * 2)
        )
        assert result == {"stored": 10, "duplicate": len(connections) * 2 - 10}
        for _ in range(5):
            receiver._client.close()
            fresh = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
            fresh.request("GET", "/metrics")
            text = fresh.getresponse().read().decode()
            fresh.close()
            assert 'archiver_received_total{reason="",status="stored"} 10.0' in text
            assert f"archiver_duplicates_total {len(connections) * 2 - 10}.0" in text
            assert "archiver_queue_events 0.0" in text
        for connection in connections:
            connection.close()
        assert receiver.stop() == 0
        for pid in workers:
            until(lambda pid=pid: is_gone(pid), "its children ended with it")  # type: ignore[misc]  # bound on purpose
    assert_archived(database_url, set(range(10)))
    ((deliveries,),) = rows(database_url, "SELECT sum(delivery_count) FROM archiver.events")
    assert deliveries == len(connections) * 2


def test_i1_a_killed_worker_is_replaced_and_what_was_acknowledged_stays(database_url: str) -> None:
    with serving(database_url, "--workers", "2") as receiver:
        before = children(receiver)
        acknowledged: set[int] = set()
        numbers = itertools.count()
        load = Load([receiver.port], 8, numbers)
        until(lambda: len(load.answers) > 100, "some are acknowledged")
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(children(receiver) - before) == 1, "another worker takes its place")
        receiver.stop()
        load.join()
        acknowledged |= load.acknowledged
    assert_archived(database_url, acknowledged)


def test_workers_whose_parent_was_killed_end_by_themselves(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, "--workers", "2", TMPDIR=str(tmp_path)) as receiver:
        until(lambda: len(children(receiver)) == 2, "both have begun")
        workers = children(receiver)
        until(lambda: all(sockets(pid) for pid in workers), "both listen")
        receiver.kill()
        for pid in workers:
            until(lambda pid=pid: is_gone(pid), "it ended after its parent")  # type: ignore[misc]  # bound on purpose
        assert is_refused(receiver.port)
        assert "Traceback" not in receiver.stderr()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_under_load_answers_every_accepted_request(
    number: signal.Signals, workers: str, database_url: str
) -> None:
    """Accepted is what reached the ledger: nobody whose event is there may have been left without an answer."""
    with serving(database_url, "--workers", workers) as receiver:
        load = Load([receiver.port], 16, itertools.count())
        until(lambda: len(load.answers) > 100, "some are acknowledged")
        receiver.signal(number)
        assert receiver.wait() == 0
        load.join()
        assert "Traceback" not in receiver.stderr()
    assert {code for _, code, _ in load.answers} <= {200, 503}
    assert_archived(database_url, load.acknowledged)
    archived = {row[0] for row in rows(database_url, "SELECT chat_id FROM archiver.events")}
    assert archived == {f"chat-{n}" for n in load.acknowledged}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_database_and_answers_who_waits(number: signal.Signals, database_url: str) -> None:
    with serving(database_url) as receiver:
        with ledger_locked(database_url) as release:
            connections = [begin(receiver.port, body_of(n)) for n in range(20)]
            until(lambda: has_read_all(receiver.port, 20), "all wait")
            receiver.signal(number)
            until(lambda: is_refused(receiver.port), "it takes no more connections")
            with pytest.raises(subprocess.TimeoutExpired):
                receiver.wait(1)
            release()
        answers = [answer(connection) for connection in connections]
        assert [(code, item["status"]) for code, item in answers] == [(200, "stored")] * 20
        assert receiver.wait() == 0
        for connection in connections:
            connection.close()
    assert_archived(database_url, set(range(20)))


def send_once(port: int, number: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    code, item = deliver(connection, body_of(number))
    connection.close()
    return code, item["status"]


def is_refused(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.connect()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it was waiting to be accepted when the port was closed
        return False
    finally:
        connection.close()
    return False


def test_i1_i3_lost_connections_under_load_lose_and_double_nothing(cluster: Cluster, database_url: str) -> None:
    name = parse_url(database_url).database
    terminate = (
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = '{name}' AND application_name = 'callhq-archiver'"
    )
    with serving(database_url, ARCHIVER_SPOOL="off") as receiver:
        stop = threading.Event()
        numbers = itertools.takewhile(lambda _: not stop.is_set(), itertools.count())
        load = Load([receiver.port], 8, numbers)
        for seen in range(50, 501, 50):
            until(lambda seen=seen: len(load.acknowledged) >= seen, "more are acknowledged")  # type: ignore[misc]  # bound on purpose
            cluster.execute(terminate)
        until(lambda: len(load.acknowledged) >= 600, "it goes on after the last")
        stop.set()
        load.join()
        assert not load.broken
        # Mostly 200 alone: a batch whose connection is lost before it commits is written on another one.
        assert {200} <= {code for _, code, _ in load.answers} <= {200, 503}
        refused = {number for number, code, _ in load.answers if code == 503}
        for number in refused:  # as the platform does
            assert send_once(receiver.port, number)[0] == 200
    assert_archived(database_url, load.acknowledged | refused)
    # A commit whose answer got lost is told 503, and its second delivery counts as one.
    acknowledged = ", ".join(f"'chat-{number}'" for number in load.acknowledged)
    once = f"SELECT DISTINCT delivery_count FROM archiver.events WHERE chat_id IN ({acknowledged})"
    assert rows(database_url, once) == [(1,)]


def imports(receiver: Receiver) -> bool:
    return "psycopg" in Path(f"/proc/{receiver.process.pid}/maps").read_text()


def catches_signals(receiver: Receiver) -> bool:
    """Whether SIGTERM meets a handler."""
    caught = Path(f"/proc/{receiver.process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("moment", "codes"), [(imports, {0, -signal.SIGTERM}), (catches_signals, {0})])
def test_a_signal_before_anything_is_received_ends_it_quietly(
    moment: Callable[[Receiver], bool], codes: set[int], database_url: str
) -> None:
    with starting(database_url) as receiver:
        until(lambda: moment(receiver), "the moment")
        receiver.signal(signal.SIGTERM)
        assert receiver.wait() in codes
        assert "Traceback" not in receiver.stderr()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_the_schema_ends_it_quietly(number: signal.Signals, database_url: str) -> None:
    waits = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'archiver.schema_version'::regclass"
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE archiver.schema_version IN ACCESS EXCLUSIVE MODE")
        with starting(database_url) as receiver:
            until(lambda: rows(database_url, waits), "it waits")
            receiver.signal(number)
            assert receiver.wait() == 0
            assert "Traceback" not in receiver.stderr()
            assert '"receiver started"' not in receiver.stderr()
