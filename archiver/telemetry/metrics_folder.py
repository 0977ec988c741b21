"""Share the metrics of the processes of one `serve`, in a folder under ARCHIVER_HOME."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archiver import telemetry
from archiver.errors import SettingsError

FOLDER = "metrics"  # in ARCHIVER_HOME
_LOCK = ".lock"


@contextmanager
def shared_metrics(home: Path, processes: int) -> Iterator[None]:
    """Let several processes share metrics, so that `/metrics` of each reports the sum.

    Removes the folders of killed processes: a folder is in use as long as it is locked. Raises
    `SettingsError` if ARCHIVER_HOME is not writable.
    """
    if processes == 1:
        yield
        return
    parent = home.resolve() / FOLDER
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = parent / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"ARCHIVER_HOME: cannot write to {parent} ({error.strerror or error})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in parent.iterdir():
            if other != folder:
                _remove_unused(other)
        os.environ[telemetry.MULTIPROCESS_FOLDER] = str(folder)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unused(folder: Path) -> None:
    """Remove the folder unless it is locked; skip one without a lock file."""
    with suppress(OSError):
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
