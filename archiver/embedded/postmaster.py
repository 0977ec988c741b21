"""Find and stop the server of a data folder, and run the watchdog that stops it when no process uses it.

This file uses only the standard library, because the watchdog runs it by its path, without the package.
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
    """The process id, socket folder and status in `postmaster.pid` (lines 1, 5 and 8)."""

    pid: int
    socket_dir: Path | None
    status: str


def read_pid_file(data: Path) -> PidFile | None:
    """Return the pid file of a data folder, even if it is stale; None if it is missing or incomplete."""
    try:
        lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines()
        pid = abs(int(lines[0]))  # a single-user backend writes it negative
    except (FileNotFoundError, IndexError, ValueError):
        return None
    lines += [""] * 8
    return PidFile(pid=pid, socket_dir=Path(lines[4]) if lines[4] else None, status=lines[7].strip())


def serving(data: Path) -> int | None:
    """Return the pid of the postmaster of this data folder; None if none is running.

    A pid alone is not sufficient: after a crash or in a new container it may belong to another process. The process
    must be a `postgres` with this folder. Its command line is readable even if `/proc/PID/cwd` is not, as for root
    without CAP_SYS_PTRACE in containers.
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
    """Return the command line of a process; empty strings for a dead process or a zombie."""
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
    """Return whether a process with this pid exists, even as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def is_running(pid: int) -> bool:
    """Return whether a process is running; False for a zombie, which remains in containers without init."""
    if not exists(pid):
        return False
    try:
        state = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return not (_PROC / "self").exists()
    return state != "Z"


def stop_server(data: Path) -> None:
    """Stop the postmaster of this data folder in fast mode, which rolls back open transactions; wait for its exit.

    Does nothing if none is running. `pg_ctl stop` would signal any pid in the pid file; this function signals only a
    process that serves this folder. Raises `TimeoutError` after a minute.
    """
    result = read_pid_file(data)
    if result is None or not _serves(result.pid, data):
        return
    os.kill(result.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    while is_running(result.pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Postgres (pid {result.pid}) is still stopping; see its log")
        time.sleep(POLL_SECONDS)  # it may not be a child of this process, so it cannot be waited for
    remove_sockets(socket_folder(result, data), data)


def socket_folder(found: PidFile | None, data: Path) -> Path:
    """Return the socket folder of a server from its pid file: a short private folder, or the data folder.

    Any other folder that a pid file names must not be touched.
    """
    folder = found.socket_dir if found is not None else None
    return folder if folder and folder.name.startswith(SHORT_PREFIX) and is_private(folder, data) else data


def remove_sockets(folder: Path, data: Path) -> None:
    """Remove the socket and its lock file after the server has exited, and their folder if it is a short one."""
    (folder / SOCKET_NAME).unlink(missing_ok=True)
    (folder / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)
    if folder != data:
        with suppress(OSError):  # not empty: another file was added; leaving it is harmless
            folder.rmdir()


def is_private(folder: Path, data: Path) -> bool:
    """Return whether a folder is not a link, belongs to the owner of the data, and is closed to others."""
    try:
        result = folder.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(result.st_mode) and not result.st_mode & 0o077
    return private and result.st_uid == data.stat().st_uid


def try_lock(file: int) -> bool:
    """Try to lock a file exclusively, without waiting; return whether that succeeded. A shared lock is converted."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_last(users: int) -> bool:
    """Return whether no other process uses the server; requires the start lock.

    The conversion of a shared lock into an exclusive one releases it for an instant, in which the watchdog may
    acquire it. The watchdog then releases it and waits for the start lock, so a second attempt fails only if another
    process uses the server.
    """
    if try_lock(users):
        return True
    fcntl.flock(users, fcntl.LOCK_SH)
    return try_lock(users)


def watch(data: Path, start_lock: int, users: int, alive_lock: int) -> None:
    """Stop the server when no process holds the lock `users` any longer, however the last one exited.

    Holds `alive_lock` until then, so that a start knows whether it needs a new watchdog.
    """
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_UN)  # a start takes start_lock, then users: never hold both in the other order
        fcntl.flock(start_lock, fcntl.LOCK_EX)
        if try_lock(users):
            stop_server(data)
            os.close(alive_lock)  # before the exit releases start_lock, so that its next holder sees no watchdog
            return
        fcntl.flock(start_lock, fcntl.LOCK_UN)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:5]))
