"""Servers of Postgres that a test sets up by itself, where the embedded one will not do: in pairs, or with TLS."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from archiver import embedded
from tests.support import servers
from tests.support.ports import free_port
from tests.support.waiting import until


class Server:
    """One cluster, and the programs that run it, as a user who may."""

    def __init__(self, folder: Path, programs: Path, user: int | None) -> None:
        self.data, self.port = folder / "data", free_port()
        self._folder, self._programs, self._user = folder, programs, user

    def run(self, program: str, *arguments: str | Path) -> None:
        with (self._folder / "said").open("ab") as texts:  # no pipe: the server would hold it open
            ended = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=texts,
                stderr=texts,
                check=False,
                cwd=self._folder,
                user=self._user,
                group=None if self._user is None else pwd.getpwuid(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
            )
        assert ended.returncode == 0, "".join(path.read_text() for path in self._folder.iterdir() if path.is_file())

    def start(self, **settings: str) -> None:
        values = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""} | settings
        options = " ".join(f"-c {name}='{value}'" for name, value in values.items())
        self.run("pg_ctl", "-D", self.data, "-l", self._folder / "log", "-o", options, "-w", "start")

    def kill(self) -> None:
        """As with its machine: nobody of it says good-bye."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [pid, *map(int, children)]:
            with suppress(ProcessLookupError):  # they end by themselves once the first has
                os.kill(each, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


def programs_of(postgres: embedded.Postgres) -> Path:
    """Of the embedded Postgres where it has them all, else of the system's."""
    for programs in (postgres.bin, servers.SYSTEM_15):
        if (programs / "pg_basebackup").exists():
            return programs
    pytest.skip("there is no pg_basebackup, neither with the embedded Postgres nor in /usr/lib/postgresql/15")


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
