"""Create a data folder and start its server; requires the start lock."""

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from archiver.durable import sync_folder
from archiver.embedded import account as accounts
from archiver.embedded import binaries, paths, postmaster
from archiver.embedded.account import Account
from archiver.embedded.errors import EmbeddedError
from archiver.embedded.postmaster import POLL_SECONDS

START_SECONDS = 120.0  # crash recovery may have a gigabyte to replay
CLIENTS_SECONDS = 3.0  # for clients to disconnect during a smart shutdown
LOG_BYTES = 8 * 1024 * 1024
SUPERUSER = "postgres"
DATABASE = "archiver"

_DEFAULTS = {
    "max_connections": "100",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    # The log must not contain content of conversations: no failing rows, no statements.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}
_FIXED = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "logging_collector": "off",
    "log_destination": "stderr",
}


@dataclass(frozen=True)
class Cluster:
    """A data folder, the programs that serve it and the account that runs them."""

    home: Path
    data: Path
    programs: Path
    account: Account | None

    @property
    def log(self) -> Path:
        """Return the path of the server's log."""
        return self.home / "postgres.log"


def database_url(socket_dir: Path, name: str) -> str:
    """Return a URL for libpq and SQLAlchemy.

    It is percent-encoded, because they interpret `+` differently; its port overrides PGPORT.
    """
    folder = quote(os.fsencode(socket_dir), safe="/")
    return f"postgresql://{SUPERUSER}@/{quote(name, safe='')}?host={folder}&port=5432"


def open_cluster(home: Path, start_lock: int) -> Cluster:
    """Return the cluster of a home folder; create it if there is none."""
    account = accounts.choose(home)
    data = paths.locate(home, account)
    if data.exists() and account is not None:
        account = accounts.owner_of(data) or account
    programs = binaries.find(account)
    cluster = Cluster(home, data, programs, account)
    _remove_unfinished(data)
    if data.exists():
        _check_owner(cluster)
    if not data.exists() or not any(data.iterdir()):
        _initialise(cluster, start_lock)
    paths.link(home, data)
    _check_version(data)
    if account is not None and data.stat().st_uid == 0:
        _change_owner(data, account)
    return cluster


def _remove_unfinished(data: Path) -> None:
    for leftover in data.parent.glob(f"{data.name}.new-*"):
        shutil.rmtree(leftover)


def _initialise(cluster: Cluster, start_lock: int) -> None:
    """Run initdb in a temporary folder and rename it, so that a data folder is complete or absent.

    initdb inherits the start lock, so its folder is not removed while it is still writing, even if this process is
    killed.
    """
    with ExitStack() as undo:
        fresh = Path(tempfile.mkdtemp(prefix=f"{cluster.data.name}.new-", dir=cluster.data.parent))
        undo.callback(shutil.rmtree, fresh, ignore_errors=True)  # the next start removes the rest
        if cluster.account is not None:
            os.chown(fresh, cluster.account.uid, cluster.account.gid, follow_symlinks=False)
        done = accounts.run(
            [
                *(cluster.programs / "initdb", "--pgdata", fresh, "--username", SUPERUSER, "--encoding=UTF8"),
                *("--locale-provider=builtin", "--locale=C.UTF-8"),
                *("--auth-local=trust", "--auth-host=reject", "--no-instructions"),
            ],
            cluster.account,
            keep=[start_lock],
        )
        if done.returncode != 0:
            raise EmbeddedError(
                f"initdb failed; set ARCHIVER_HOME to another folder, or DATABASE_URL:\n{_tail(done.stdout)}"
            )
        fresh.rename(cluster.data)
        undo.pop_all()
    sync_folder(cluster.data.parent)


def _check_owner(cluster: Cluster) -> None:
    owner = cluster.data.stat().st_uid
    if os.geteuid() not in (0, owner):  # root uses the owner's account, and changes the owner of its own data
        raise EmbeddedError(
            f"{cluster.data} belongs to the user {Account(owner, 0).name}: run as that user, or set ARCHIVER_HOME to "
            "another folder"
        )


def _check_version(data: Path) -> None:
    try:
        major = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        raise EmbeddedError(f"{data} is not a Postgres data folder: set ARCHIVER_HOME to another folder") from None
    own = binaries.installed_version().partition(".")[0]
    if major != own:
        raise EmbeddedError(
            f"{data} was created by Postgres {major}, not {own}: move the data with pg_dump, or set "
            "ARCHIVER_HOME to another folder"
        )


def _change_owner(data: Path, account: Account) -> None:
    """Change the owner of data that root copied; the folder last, so that an interrupted change is repeated."""
    for folder, _, files in os.walk(data, topdown=False):
        for path in (*(Path(folder, name) for name in files), Path(folder)):
            os.chown(path, account.uid, account.gid, follow_symlinks=False)


def ensure_watchdog(cluster: Cluster) -> None:
    """Start a watchdog unless one is running; it inherits its lock, which this process has acquired for it."""
    files = [paths.open_file(cluster.home / f"postgres.{name}") for name in ("lock", "users", "watch")]
    log_file = paths.open_file(cluster.log)
    try:
        if postmaster.try_lock(files[2]):
            # -I: modules are not searched in a folder that the caller controls.
            numbers = [str(file) for file in files]
            script: list[str | Path] = [sys.executable, "-I", postmaster.__file__, cluster.data, *numbers]
            accounts.spawn(script, None, log_file, keep=files)
    finally:
        for file in (*files, log_file):
            os.close(file)


def ensure_server(cluster: Cluster, options: Mapping[str, str]) -> postmaster.PidFile:
    """Start the server unless it is running; return its pid file.

    The server then accepts connections and has the database `archiver`. Raises `EmbeddedError` if it cannot be used.
    """
    deadline = time.monotonic() + START_SECONDS
    client_deadline = None
    while True:
        result = postmaster.read_pid_file(cluster.data)
        if postmaster.serving(cluster.data) is None:
            _launch(cluster, options, deadline)
        elif result is not None and result.status == "stopping" and _is_smart_shutdown(cluster):
            client_deadline = client_deadline or time.monotonic() + CLIENTS_SECONDS
            if time.monotonic() > client_deadline:
                raise EmbeddedError(_STOPPING.format(data=cluster.data, pid=result.pid))
        elif result is not None and result.status == "ready" and _answers(cluster, result):
            return result
        if time.monotonic() > deadline:
            raise _failed(cluster, f"Postgres was not ready within {START_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)  # its state is visible only in a file


_STOPPING = (
    "The Postgres of {data} (pid {pid}) is shutting down; it accepts no connections and waits until the open ones"
    " are closed. Stop the programs that use it, such as `archiver serve`, or disconnect them:"
    " kill -INT {pid}. Then try again."
)


def _is_smart_shutdown(cluster: Cluster) -> bool:
    """Return whether a smart shutdown is under way, which waits for all clients."""
    _, _, requested = _log_since_start(cluster.log).rpartition("LOG:  received ")
    return requested.startswith("smart shutdown request")


def _answers(cluster: Cluster, found: postmaster.PidFile) -> bool:
    """Return whether the server accepts a connection; create the database if it is missing.

    Raises `EmbeddedError` if the connection fails although the pid file has not changed.
    """
    folder = found.socket_dir or cluster.data
    paths.check_socket_folder(folder, cluster.data)
    try:
        with psycopg.connect(database_url(folder, "postgres"), autocommit=True, connect_timeout=10) as connection:
            known = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(known, [DATABASE]).fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    except psycopg.Error as error:
        if postmaster.read_pid_file(cluster.data) == found:
            raise _failed(cluster, f"Postgres is running but refuses the connection ({error})") from error
        return False
    return True


def _launch(cluster: Cluster, options: Mapping[str, str], deadline: float) -> None:
    """Start the server and wait until it is ready.

    After a kill -9, old backends may still hold the shared memory, and Postgres refuses to start; the start is
    repeated until they have exited.
    """
    _clear_stale(cluster)
    socket_dir = paths.make_socket_folder(cluster.home, cluster.data, cluster.account)
    settings = _DEFAULTS | dict(options) | _FIXED | {"unix_socket_directories": str(socket_dir)}
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    server: list[str | Path] = [cluster.programs / "postgres", "-D", cluster.data, *arguments]
    file = paths.open_file(cluster.log)
    try:
        if os.fstat(file).st_size > LOG_BYTES:
            os.ftruncate(file, 0)
        while True:
            began = os.fstat(file).st_size
            pid = accounts.spawn(server, cluster.account, file)
            if _becomes_ready(cluster, pid, deadline):
                return
            output = os.pread(file, LOG_BYTES, began).decode(errors="replace")
            if "pre-existing shared memory block" not in output or time.monotonic() > deadline:
                postmaster.remove_sockets(socket_dir, cluster.data)
                raise _failed(cluster, "Postgres did not start", output)
            time.sleep(POLL_SECONDS * 5)  # the kernel frees the memory when the last backend has exited
    finally:
        os.close(file)


def _becomes_ready(cluster: Cluster, pid: int, deadline: float) -> bool:
    while postmaster.is_running(pid) and time.monotonic() < deadline:
        result = postmaster.read_pid_file(cluster.data)
        if result is not None and result.pid == pid and result.status == "ready":
            return True
        time.sleep(POLL_SECONDS)  # its state is visible only in a file
    return False


def _clear_stale(cluster: Cluster) -> None:
    """Remove files of an exited server that would prevent a start.

    These are its socket, and a pid file that a power failure emptied or whose id now belongs to another process. A
    pid file with the id of an exited process is kept, because Postgres checks the shared memory that it names.
    """
    result = postmaster.read_pid_file(cluster.data)
    folder = postmaster.socket_folder(result, cluster.data)
    if _listens(folder / postmaster.SOCKET_NAME):
        raise EmbeddedError(
            f"another Postgres, perhaps in another container, serves {cluster.data}: stop it, or set ARCHIVER_HOME "
            "to another folder"
        )
    postmaster.remove_sockets(folder, cluster.data)
    if result is None or postmaster.exists(result.pid):
        (cluster.data / "postmaster.pid").unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(os.fsencode(path))
        except OSError:
            return False
    return True


def _failed(cluster: Cluster, what: str, output: str | None = None) -> EmbeddedError:
    text = _log_since_start(cluster.log) if output is None else output
    return EmbeddedError(
        f"{what}. Set ARCHIVER_HOME to another folder, or DATABASE_URL to another Postgres. "
        f"The end of {cluster.log}:\n{_tail(text)}"
    )


def _log_since_start(path: Path) -> str:
    """Return the server's log since its latest start; empty if there is no log."""
    text = path.read_text(errors="replace") if path.exists() else ""
    before, start, since = text.rpartition("LOG:  starting PostgreSQL")
    return before.rpartition("\n")[2] + start + since


def _tail(text: str) -> str:
    """Return the last 15 lines of the text."""
    return "\n".join(text.strip().splitlines()[-15:])
