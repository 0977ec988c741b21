"""Debian's PgBouncer in transaction mode, in front of a server of the tests."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from tests.support import servers
from tests.support.ports import free_port
from tests.support.waiting import until

# Where it is installed; Debian's package puts it beside the programs of an administrator.
PROGRAMS = [path for path in (shutil.which("pgbouncer"), "/usr/sbin/pgbouncer") if path and Path(path).exists()][:1]
USERS = ("postgres", servers.WRITER)


@contextmanager
def pooling(program: str, url: str, *settings: str) -> Iterator[str]:
    """The same database through a PgBouncer, which hands out a server connection for each transaction."""
    target = conninfo_to_dict(url)
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as name:
        folder = Path(name)
        port = free_port()
        (folder / "users.txt").write_text("".join(f'"{user}" "{target.get("password", "")}"\n' for user in USERS))
        (folder / "pgbouncer.ini").write_text(
            "\n".join(
                (
                    f"[databases]\n* = host={target['host']} port={target.get('port', 5432)}",
                    f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =",
                    f"auth_type = trust\nauth_file = {folder}/users.txt\npool_mode = transaction",
                    *settings,
                )
            )
        )
        user = servers.unprivileged()
        if user is not None:
            for path in (folder, *folder.iterdir()):
                os.chown(path, user, -1)
        with (folder / "log").open("wb") as log:
            command = [program, "-q", str(folder / "pgbouncer.ini")]
            process = subprocess.Popen(command, stdout=log, stderr=log, user=user, extra_groups=[] if user else None)
        try:
            until(lambda: _listens(port), "PgBouncer listens")
            yield f"postgresql://postgres@127.0.0.1:{port}/{target['dbname']}"
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
