"""A primary that dies, and the standby that is promoted: what was acknowledged before, then and after is kept."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from archiver import embedded
from tests import servers
from tests.faults.load import Load, assert_archived, rows
from tests.faults.outages import until_drained
from tests.receivers import archiver, serving
from tests.waiting import until


class Server:
    """One cluster, and the programs that run it, as a user who may."""

    def __init__(self, folder: Path, programs: Path, user: int | None) -> None:
        self.data, self.port = folder / "data", free_port()
        self._folder, self._programs, self._user = folder, programs, user

    def run(self, program: str, *arguments: str | Path) -> None:
        with (self._folder / "said").open("ab") as said:  # no pipe: the server would hold it open
            ended = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                check=False,
                cwd=self._folder,
                user=self._user,
                group=None if self._user is None else pwd.getpwuid(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
            )
        assert ended.returncode == 0, "".join(path.read_text() for path in self._folder.iterdir() if path.is_file())

    def start(self, **settings: str) -> None:
        told = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""} | settings
        options = " ".join(f"-c {name}='{value}'" for name, value in told.items())
        self.run("pg_ctl", "-D", self.data, "-l", self._folder / "log", "-o", options, "-w", "start")

    def kill(self) -> None:
        """As with its machine: nobody of it says good-bye."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [pid, *map(int, children)]:
            os.kill(each, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def programs_of(postgres: embedded.Postgres) -> Path:
    """Of the embedded Postgres where it has them all, else of the system's."""
    for programs in (postgres.bin, servers.SYSTEM_15):
        if (programs / "pg_basebackup").exists():
            return programs
    pytest.skip("there is no pg_basebackup, neither with the embedded Postgres nor in /usr/lib/postgresql/15")


@pytest.fixture
def pair(postgres: embedded.Postgres) -> Iterator[tuple[Server, Server]]:
    """A primary with a database `archive`, which commits nothing that its standby has not."""
    programs, user = programs_of(postgres), postgres.data.stat().st_uid if os.getuid() == 0 else None
    with ExitStack() as stack:
        primary, standby = (stack.enter_context(placed(programs, user)) for _ in range(2))
        primary.run("initdb", "-D", primary.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        primary.start(synchronous_standby_names="*")
        with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
            connection.execute("SET synchronous_commit = local")  # there is no standby yet
            connection.execute("CREATE DATABASE archive")
        standby.run(
            "pg_basebackup", "-d", primary.url("postgres"), "-D", standby.data, "-R", "-X", "stream", "-c", "fast"
        )
        standby.start()
        query = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: rows(primary.url("postgres"), query), "the standby follows")
        yield primary, standby


@contextmanager
def placed(programs: Path, user: int | None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="failover-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        server = Server(folder, programs, user)
        try:
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                subprocess.run(
                    [programs / "pg_ctl", "-D", server.data, "-m", "immediate", "stop"],
                    check=False,
                    user=user,
                    cwd=folder,
                    capture_output=True,
                )


def test_i1_everything_acknowledged_survives_the_death_of_the_primary(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    url = (
        f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/archive"
        "?target_session_attrs=read-write"
    )
    told = archiver("migrate", database_url=url)
    assert told.returncode == 0, told.stderr
    with serving(url) as receiver:
        load = Load([receiver.port], 8, range(10**6))
        until(lambda: len(load.answers) > 300, "it is under load")
        assert {status for _, _, status in list(load.answers)} == {"stored"}
        primary.kill()
        until(lambda: "spooled" in {status for *_, status in load.answers[-50:]}, "it takes events all the same")
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 100, "and goes on to")
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        until(lambda: "stored" in {status for *_, status in load.answers[-20:]}, "the standby takes events", 60)
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 300, "it is under load again")
        load.end()
        until_drained(receiver)
    assert not load.broken
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(standby.url("archive"), load.acknowledged)


def test_a_host_that_fell_silent_leaves_time_for_the_next(
    pair: tuple[Server, Server],
) -> None:
    """As after a failover from a machine that has lost its power: nobody refuses a connection to it."""
    primary, _ = pair
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        hosts = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{primary.port}"
        url = f"postgresql://postgres@{hosts}/archive?target_session_attrs=read-write"
        assert archiver("migrate", database_url=primary.url("archive")).returncode == 0
        with serving(url) as receiver:
            load = Load([receiver.port], 4, range(200))
            load.join()
            until_drained(receiver)
            assert receiver.get("/readyz").json()["database"] == "ready"
    assert {code for _, code, _ in load.answers} == {200}
    assert_archived(primary.url("archive"), set(range(200)))
