"""Find and stop the process of a data folder, and run the watchdog that stops it when unused.

Standard library only, and complete in this file: the watchdog runs it by its path, without the package.
"""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SOCKET_NAME = ".s.PGSQL.5432"
SHORT_PREFIX = "callhq-archiver-"
STOP_SECONDS = 60.0
POLL_SECONDS = 0.02  # between two checks of another process, which sends no notification
_PROC = Path("/proc")


@dataclass(frozen=True)
class PidFile:
    """What a postmaster writes to `postmaster.pid`: lines 1, 5 and 8 of it."""

    pid: int
    socket_dir: Path | None
    status: str


def read_pid_file(data: Path) -> PidFile | None:
    """The lock file of a data folder, stale or not; None without one (or while it is still being written)."""
    try:
        lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines()
        pid = abs(int(lines[0]))  # a single-user backend writes it negative
    except (FileNotFoundError, IndexError, ValueError):
        return None
    lines += [""] * 8
    return PidFile(pid=pid, socket_dir=Path(lines[4]) if lines[4] else None, status=lines[7].strip())


def serving(data: Path) -> int | None:
    """The pid of the postmaster of this very data folder.

    A pid alone proves nothing: after a crash or in a new container it may be anybody's. The process must be a
    `postgres` whose folder is this one. Its command line is readable where `/proc/PID/cwd` is not: as root without
    CAP_SYS_PTRACE, which is how containers run.
    """
    result = read_pid_file(data)
    return result.pid if result is not None and _serves(result.pid, data) else None


def _serves(pid: int, data: Path) -> bool:
    arguments = _arguments(pid)
    if Path(arguments[0]).name != "postgres":
        return False
    folders = [f"{_PROC}/{pid}/cwd", *(arguments[2:3] if arguments[1:2] == ["-D"] else [])]
    return any(_same_folder(folder, data) for folder in folders)


def _arguments(pid: int) -> list[str]:
    """The command line of a process; empty strings for one that is dead or a zombie."""
    if (_PROC / "self" / "cmdline").exists():
        try:
            return os.fsdecode((_PROC / str(pid) / "cmdline").read_bytes()).split("\0")
        except OSError:
            return [""]
    shown = subprocess.run(
        ["/bin/ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    program, _, rest = shown.stdout.strip().partition(" -D ")
    return [program, "-D", rest.partition(" -c ")[0]]


def _same_folder(one: str, other: Path) -> bool:
    try:
        return Path(one).is_absolute() and other.samefile(one)
    except OSError:
        return False


def exists(pid: int) -> bool:
    """Whether there is a process with this pid, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie, which is what a container without init leaves, does not."""
    if not exists(pid):
        return False
    try:
        state = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return not (_PROC / "self").exists()
    return state != "Z"


def stop_server(data: Path) -> None:
    """Stops the postmaster of this data folder, rolling open transactions back (what `-m fast` means), and waits.

    Without one it does nothing. `pg_ctl stop` would signal any pid that the lock file names; here only a process
    that is known to serve this folder gets the signal. Raises `TimeoutError` after a minute.
    """
    result = read_pid_file(data)
    if result is None or not _serves(result.pid, data):
        return
    os.kill(result.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    while is_running(result.pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Postgres (pid {result.pid}) is still stopping; its log says why.")
        time.sleep(POLL_SECONDS)  # it need not be our child, so there is nothing to wait on
    remove_sockets(socket_folder(result, data), data)


def socket_folder(found: PidFile | None, data: Path) -> Path:
    """Where the server that wrote a pid file has its socket: a short private folder, else the data folder.

    Any other folder that a pid file may name is not ours to touch.
    """
    folder = found.socket_dir if found is not None else None
    return folder if folder and folder.name.startswith(SHORT_PREFIX) and is_private(folder, data) else data


def remove_sockets(folder: Path, data: Path) -> None:
    """Removes the socket of a dead server and that socket's lock file; their folder too, if it is a short one."""
    (folder / SOCKET_NAME).unlink(missing_ok=True)
    (folder / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)
    if folder != data:
        with suppress(OSError):  # not empty: another file was added; leaving it is harmless
            folder.rmdir()


def is_private(folder: Path, data: Path) -> bool:
    """Return whether a folder is no link, belongs to the owner of the data, and is closed to others."""
    try:
        result = folder.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(result.st_mode) and not result.st_mode & 0o077
    return private and result.st_uid == data.stat().st_uid


def try_lock(file: int) -> bool:
    """Take an exclusive lock if no other process holds one; a shared lock of this descriptor is converted."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_last(users: int) -> bool:
    """Return whether no other process uses the server; requires the start lock.

    Turning a shared lock into an exclusive one lets go of it for an instant, in which the watchdog may get it. It
    then queues for the start lock, and the second try distinguishes the watchdog from other users.
    """
    if try_lock(users):
        return True
    fcntl.flock(users, fcntl.LOCK_SH)
    return try_lock(users)


def watch(data: Path, start_lock: int, users: int, alive_lock: int) -> None:
    """Stops the server when the last process that held `users` is gone, however it went.

    Holds `alive_lock` all the while, so that a start knows whether it must make a new watchdog.
    """
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_UN)  # a start holds start_lock while it asks for users: never hold both ways
        fcntl.flock(start_lock, fcntl.LOCK_EX)
        if try_lock(users):
            stop_server(data)
            os.close(alive_lock)  # before the exit releases start_lock: its next holder must see this process gone
            return
        fcntl.flock(start_lock, fcntl.LOCK_UN)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:5]))
