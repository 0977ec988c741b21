"""Manage the home folder, lock files, data folder and socket folder.

In home: `postgres` (the data folder, or a symbolic link to it), `postgres.log`, and three empty files for
locks: `postgres.lock` (held while starting or stopping), `postgres.users` (shared by every process that uses the
server) and `postgres.watch` (held by the watchdog). If the path is too long for a socket, `postgres.socket` is a
link to a short folder that contains it.
"""

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archiver.embedded.account import Account, can_reach
from archiver.embedded.errors import EmbeddedError
from archiver.embedded.postmaster import (
    POLL_SECONDS,
    SHORT_PREFIX,
    SOCKET_NAME,
    is_private,
    try_lock,
)

LOCK_SECONDS = 240.0
_ROOT_FOLDER = Path("/var/lib/callhq-archiver")
_SOCKET_PATH_BYTES = 90  # the lowest limit of operating systems is 104


def open_home(home: Path) -> Path:
    """Return the resolved home folder; create it if it is missing.

    A new folder is private. If this process is root, others may traverse it (not list it), because the server's
    account must reach the data.
    """
    home = home.resolve()
    if not home.is_dir():
        home.mkdir(parents=True)
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)
    return home


def open_file(path: Path) -> int:
    """Return the descriptor of a private file for locks or logs; create the file if it is missing.

    Symbolic links are not followed, and the descriptor is not inheritable. Root gives a new file to the owner of its
    folder, who may run the server without root next time.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(file, owner.st_uid, owner.st_gid)
    return file


@contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Lock a file for the block; yield its descriptor. Raises `EmbeddedError` after waiting `LOCK_SECONDS`."""
    file = open_file(path)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file):
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"another process has been starting or stopping Postgres for too long: end it, as it locks {path}"
                )
            time.sleep(POLL_SECONDS)  # flock has no timeout
        yield file
    finally:
        os.close(file)


def join_users(home: Path) -> int:
    """Register this process as a user of the server, until the returned file descriptor is closed."""
    file = open_file(home / "postgres.users")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def locate(home: Path, account: Account | None) -> Path:
    """Return the path of the data folder of a home, even if it does not exist yet.

    It is `home/postgres`. If root's account cannot traverse the parents of the home, whose permissions must not be
    changed, the data is under /var/lib/callhq-archiver, in a folder named after the home, and `home/postgres` is a
    link to it. The name depends only on the home, so that every start finds the same data.
    """
    inside = home / "postgres"
    if inside.is_symlink():
        target = inside.resolve()
        if not target.is_dir():
            raise EmbeddedError(
                f"{inside} is a link to {target}, which does not exist: restore it, or remove the link to start with"
                " an empty database"
            )
        return target
    if account is None or can_reach(account, home):
        return inside
    if inside.exists():
        raise EmbeddedError(
            f"the user {account.name}, who owns {inside}, cannot pass through the folders above it: open them "
            "(chmod o+x), or set ARCHIVER_HOME to another folder"
        )
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return root_owned(root_folder() / digest) / "postgres"


def link(home: Path, data: Path) -> None:
    """Create the symbolic link `postgres` in the home if the data is elsewhere."""
    inside = home / "postgres"
    if data != inside and not inside.is_symlink():
        inside.symlink_to(data)


def root_folder() -> Path:
    """Return root's folder for files that other users must reach."""
    return root_owned(_ROOT_FOLDER)


def root_owned(folder: Path) -> Path:
    """Return this folder; create it if it is missing. Raises `EmbeddedError` unless only root can write to it."""
    folder.mkdir(mode=0o711, exist_ok=True)
    result = folder.lstat()
    if not stat.S_ISDIR(result.st_mode) or result.st_uid != 0 or result.st_mode & 0o022:
        raise EmbeddedError(f"{folder} is not a folder that only root can write to: remove it, or set ARCHIVER_HOME")
    folder.chmod(0o711)
    return folder


def make_socket_folder(home: Path, data: Path, account: Account | None) -> Path:
    """Return the folder for the socket: the private data folder, or a short folder if its path is unsuitable.

    A path is unsuitable if it is too long for the kernel, or contains a comma, which separates hosts for libpq. A
    restarted server uses the same folder, because the processes that use it know its path.
    """
    if len(os.fsencode(data / SOCKET_NAME)) < _SOCKET_PATH_BYTES and "," not in str(data):
        return data
    known = home / "postgres.socket"
    folder = _reuse_linked(known, data) or Path(tempfile.mkdtemp(prefix=SHORT_PREFIX, dir=_short_temporary(account)))
    if account is not None:
        os.chown(folder, account.uid, account.gid, follow_symlinks=False)
    if not known.is_symlink():
        known.symlink_to(folder)
    return folder


def _reuse_linked(known: Path, data: Path) -> Path | None:
    """Return the short folder that the link names, or None; remove a link to a folder of another user."""
    if not known.is_symlink():
        return None
    folder = known.readlink()
    if folder.is_absolute() and folder.name.startswith(SHORT_PREFIX):
        with suppress(OSError):
            folder.mkdir(mode=0o700)
            return folder
        if is_private(folder, data):
            return folder
    known.unlink()
    return None


def _short_temporary(account: Account | None) -> Path:
    """Return the system's temporary folder; /tmp if that is too long or not accessible to the account."""
    folder = Path(tempfile.gettempdir())
    path_bytes = len(os.fsencode(folder / f"{SHORT_PREFIX}12345678" / SOCKET_NAME))
    fits = path_bytes < _SOCKET_PATH_BYTES and "," not in str(folder)
    return folder if fits and (account is None or can_reach(account, folder)) else Path("/tmp")  # noqa: S108 - mkdtemp makes a private folder in it


def check_socket_folder(folder: Path, data: Path) -> None:
    """Raise `EmbeddedError` unless the folder is private to the owner of the data.

    /tmp is writable by all users: if a cleaner removed the folder, another user may have created one of the same
    name.
    """
    if not is_private(folder, data):
        raise EmbeddedError(
            f"{folder} should contain the socket of Postgres, but is not private to the owner of the data; another "
            "user may be intercepting connections. Stop every process that uses this database, then start again, or "
            "set DATABASE_URL."
        )
