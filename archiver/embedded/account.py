"""Choose the operating system account that runs the server.

Postgres refuses to run as root, so root gives the data to an unprivileged account: the owner of the data or of the
home, else `postgres`, else `nobody`.
"""

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archiver.embedded.errors import EmbeddedError

_RUN_SECONDS = 300


@dataclass(frozen=True)
class Account:
    """The unprivileged account that runs Postgres if this process is root."""

    uid: int
    gid: int

    @property
    def name(self) -> str:
        """Return the login name, or the number if the system has no name for it."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


def choose(home: Path) -> Account | None:
    """Return the account for a home folder; None if this process does not run as root."""
    if os.geteuid() != 0:
        return None
    for folder in (home / "postgres", home):
        owner = owner_of(folder)
        if owner is not None:
            return owner
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "Postgres does not run as root, and there is no user `postgres` or `nobody` to run it as: run as an ordinary "
        "user, or set DATABASE_URL to your own Postgres"
    )


def owner_of(folder: Path) -> Account | None:
    """Return the owner of a folder; None if it is missing or belongs to root."""
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return None
    if stat.st_uid == 0:
        return None
    try:
        return Account(stat.st_uid, pwd.getpwuid(stat.st_uid).pw_gid)
    except KeyError:
        return Account(stat.st_uid, stat.st_gid)


def run(
    arguments: Sequence[str | Path], account: Account | None, keep: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with stdout and stderr combined. `keep`: file descriptors that it inherits."""
    return subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=_RUN_SECONDS,
        pass_fds=keep,
        **_surroundings(account),
    )


def spawn(arguments: Sequence[str | Path], account: Account | None, log: int, keep: Sequence[int] = ()) -> int:
    """Start a program that outlives this process, and return its pid; its output goes to `log`.

    It has its own session, so that Ctrl-C does not reach it, and is not a child of this process, so that it leaves no
    zombie. A shell starts it in the background; the arguments never become shell text.
    """
    launched = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        check=True,
        start_new_session=True,
        pass_fds=keep,
        **_surroundings(account),
    )
    return int(launched.stdout)


def can_reach(account: Account, folder: Path) -> bool:
    """Return whether the account may traverse a folder and its parents."""
    return run(["/bin/sh", "-c", 'test -x "$1"', "sh", folder], account).returncode == 0


def _surroundings(account: Account | None) -> dict[str, Any]:
    """Return user, folder and environment for `subprocess.run`, without secrets and PG* variables."""
    preserved = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    surroundings: dict[str, Any] = {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C", **preserved}}
    if account is not None:
        surroundings |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return surroundings
