"""Makes a data folder, and brings up the server that serves it: everything here happens under the start lock."""

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

from archiver.embedded import account as accounts
from archiver.embedded import binaries, log, place, postmaster
from archiver.embedded.account import Account
from archiver.embedded.postmaster import POLL_SECONDS, EmbeddedError

START_SECONDS = 120.0  # crash recovery may have a gigabyte to replay
CLIENTS_SECONDS = 3.0  # for clients to go, where somebody shut the server down in the way that waits for them
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
    # The log must not keep what people wrote: no failing rows, no statements.
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
    """A data folder, the programs that serve it and the account they run as."""

    home: Path
    data: Path
    programs: Path
    account: Account | None

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.home / "postgres.log"


def database_url(socket_dir: Path, name: str) -> str:
    """For libpq and SQLAlchemy alike: percent-encoded, for they differ on `+`; with the port, against PGPORT."""
    folder = quote(os.fsencode(socket_dir), safe="/")
    return f"postgresql://{SUPERUSER}@/{quote(name, safe='')}?host={folder}&port=5432"


def open_cluster(home: Path, start_lock: int) -> Cluster:
    """The cluster of a home folder, made if there is none."""
    account = accounts.choose(home)
    data = place.locate(home, account)
    if data.exists() and account is not None:
        account = accounts.owner_of(data) or account
    programs = binaries.find(account)
    cluster = Cluster(home, data, programs, account)
    _remove_unfinished(data)
    if data.exists():
        _check_owner(cluster)
    if not data.exists() or not any(data.iterdir()):
        _initialise(cluster, start_lock)
    place.link(home, data)
    _check_version(data)
    if account is not None and data.stat().st_uid == 0:
        _hand_over(data, account)
    return cluster


def _remove_unfinished(data: Path) -> None:
    for leftover in data.parent.glob(f"{data.name}.new-*"):
        shutil.rmtree(leftover)


def _initialise(cluster: Cluster, start_lock: int) -> None:
    """Runs initdb beside the final name, then renames: a data folder is complete or absent.

    initdb inherits the start lock, so that if we are killed nobody clears its folder away while it still writes.
    """
    with ExitStack() as undo:
        fresh = Path(tempfile.mkdtemp(prefix=f"{cluster.data.name}.new-", dir=cluster.data.parent))
        undo.callback(shutil.rmtree, fresh, ignore_errors=True)  # the next start clears what is left
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
                f"initdb failed; set ARCHIVER_HOME to another folder, or DATABASE_URL:\n{log.tail(done.stdout)}"
            )
        fresh.rename(cluster.data)
        undo.pop_all()
    _sync_folder(cluster.data.parent)


def _sync_folder(folder: Path) -> None:
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def _check_owner(cluster: Cluster) -> None:
    owner = cluster.data.stat().st_uid
    if os.geteuid() not in (0, owner):  # root takes the owner's account, and takes care of its own
        raise EmbeddedError(
            f"{cluster.data} belongs to the user {Account(owner, 0).name}: run as that user, or set ARCHIVER_HOME to "
            "a folder of your own."
        )


def _check_version(data: Path) -> None:
    try:
        major = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        raise EmbeddedError(f"{data} is not a Postgres data folder: set ARCHIVER_HOME to another folder.") from None
    ours = binaries.installed_version().partition(".")[0]
    if major != ours:
        raise EmbeddedError(
            f"{data} was made by Postgres {major}, this is Postgres {ours}: move the data with pg_dump, or set "
            "ARCHIVER_HOME to another folder."
        )


def _hand_over(data: Path, account: Account) -> None:
    """Data that root copied here becomes the account's; the folder itself last, so that a kill repeats it."""
    for folder, _, files in os.walk(data, topdown=False):
        for path in (*(Path(folder, name) for name in files), Path(folder)):
            os.chown(path, account.uid, account.gid, follow_symlinks=False)


def ensure_watchdog(cluster: Cluster) -> None:
    """Starts a watchdog unless one is alive; it inherits its lock, already held."""
    files = [place.open_file(cluster.home / f"postgres.{name}") for name in ("lock", "users", "watch")]
    told = place.open_file(cluster.log)
    try:
        if postmaster.try_lock(files[2]):
            # -I: no folder of the caller's choosing is searched for modules.
            numbers = [str(file) for file in files]
            script: list[str | Path] = [sys.executable, "-I", postmaster.__file__, cluster.data, *numbers]
            accounts.spawn(script, None, told, keep=files)
    finally:
        for file in (*files, told):
            os.close(file)


def ensure_server(cluster: Cluster, options: Mapping[str, str]) -> postmaster.PidFile:
    """The server of the cluster: the one that runs, else a new one. It accepts connections and has our database."""
    deadline = time.monotonic() + START_SECONDS
    patience = None
    while True:
        found = postmaster.read_pid_file(cluster.data)
        if postmaster.serving(cluster.data) is None:
            _launch(cluster, options, deadline)
        elif found is not None and found.status == "stopping" and _waits_for_clients(cluster):
            patience = patience or time.monotonic() + CLIENTS_SECONDS
            if time.monotonic() > patience:
                raise EmbeddedError(_STOPPING.format(data=cluster.data, pid=found.pid))
        elif found is not None and found.status == "ready" and _answers(cluster, found):
            return found
        if time.monotonic() > deadline:
            raise _failed(cluster, f"Postgres did not get ready within {START_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)  # it tells its state by a file alone


_STOPPING = (
    "The Postgres of {data} (pid {pid}) was told to shut down; it takes no new connection, and waits until those that"
    " it has are closed. End the programs that use it, such as `archiver serve`, or let it cut them off:"
    " kill -INT {pid}. Then try again."
)


def _waits_for_clients(cluster: Cluster) -> bool:
    """Whether the shutdown under way may last for as long as any client stays; only the log tells."""
    _, _, requested = log.since_start(cluster.log).rpartition("LOG:  received ")
    return requested.startswith("smart shutdown request")


def _answers(cluster: Cluster, found: postmaster.PidFile) -> bool:
    """Connects, and makes our database if it is missing; False if the server is going away just now."""
    folder = found.socket_dir or cluster.data
    place.check_socket_folder(folder, cluster.data)
    try:
        with psycopg.connect(database_url(folder, "postgres"), autocommit=True, connect_timeout=10) as connection:
            known = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(known, [DATABASE]).fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    except psycopg.Error as error:
        if postmaster.read_pid_file(cluster.data) == found:
            raise _failed(cluster, f"Postgres runs but refuses us ({error})") from error
        return False
    return True


def _launch(cluster: Cluster, options: Mapping[str, str], deadline: float) -> None:
    """Starts the server and waits until it is ready.

    After a kill -9 its old backends may live on and hold the shared memory; Postgres refuses to start beside them,
    and so it is tried again until they are gone.
    """
    _clear_stale(cluster)
    socket_dir = place.make_socket_folder(cluster.home, cluster.data, cluster.account)
    settings = _DEFAULTS | dict(options) | _FIXED | {"unix_socket_directories": str(socket_dir)}
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    server: list[str | Path] = [cluster.programs / "postgres", "-D", cluster.data, *arguments]
    file = place.open_file(cluster.log)
    try:
        if os.fstat(file).st_size > LOG_BYTES:
            os.ftruncate(file, 0)
        while True:
            began = os.fstat(file).st_size
            pid = accounts.spawn(server, cluster.account, file)
            if _becomes_ready(cluster, pid, deadline):
                return
            said = os.pread(file, LOG_BYTES, began).decode(errors="replace")
            if "pre-existing shared memory block" not in said or time.monotonic() > deadline:
                postmaster.remove_sockets(socket_dir, cluster.data)
                raise _failed(cluster, "Postgres did not start", said)
            time.sleep(POLL_SECONDS * 5)  # the kernel frees the memory when the last backend has gone
    finally:
        os.close(file)


def _becomes_ready(cluster: Cluster, pid: int, deadline: float) -> bool:
    while postmaster.alive(pid) and time.monotonic() < deadline:
        found = postmaster.read_pid_file(cluster.data)
        if found is not None and found.pid == pid and found.status == "ready":
            return True
        time.sleep(POLL_SECONDS)  # it tells its state by a file alone
    return False


def _clear_stale(cluster: Cluster) -> None:
    """Removes what a dead server left: Postgres itself refuses to start when the pid now is somebody else's.

    So it does when a power cut emptied the file. A pid file whose process is gone stays: Postgres checks the shared
    memory that it names.
    """
    found = postmaster.read_pid_file(cluster.data)
    folder = postmaster.socket_folder(found, cluster.data)
    if _listens(folder / postmaster.SOCKET_NAME):
        raise EmbeddedError(
            f"Another Postgres, perhaps in another container, serves {cluster.data}: stop it, or set ARCHIVER_HOME "
            "to another folder."
        )
    postmaster.remove_sockets(folder, cluster.data)
    if found is None or postmaster.exists(found.pid):
        (cluster.data / "postmaster.pid").unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(os.fsencode(path))
        except OSError:
            return False
    return True


def _failed(cluster: Cluster, what: str, said: str | None = None) -> EmbeddedError:
    text = log.since_start(cluster.log) if said is None else said
    return EmbeddedError(
        f"{what}. Set ARCHIVER_HOME to another folder, or DATABASE_URL to a Postgres of your own. "
        f"The end of {cluster.log}:\n{log.tail(text)}"
    )
