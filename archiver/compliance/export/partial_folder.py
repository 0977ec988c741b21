"""Manage the working folders of exports: locked while in use; the next export removes abandoned ones."""

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archiver.compliance.export import manifest

_IS_PARTIAL_FOLDER = re.compile(r"\..+\.partial-[a-z0-9_]{8}", re.DOTALL)
_FILES = frozenset(
    {*manifest.names(manifest.FORMATS), manifest.MANIFEST, manifest.DIGEST, manifest.SIGNATURE},
)


@contextmanager
def held(target: Path) -> Iterator[Path]:
    """Yield a new folder next to the target; only its owner can read it, and no other export removes it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        opened = _lock(folder, fcntl.LOCK_EX)
        try:
            if opened is None or _is_same(folder, opened):
                yield folder
                return
        finally:
            if opened is not None:
                os.close(opened)
        # Another export removed it as abandoned before it was locked.


def remove_left(parent: Path) -> None:
    """Remove the partial folders that killed exports left here, except those that contain other files."""
    with suppress(OSError):
        for each in sorted(parent.iterdir()):
            if _IS_PARTIAL_FOLDER.fullmatch(each.name):
                _remove_left(each)


def _remove_left(folder: Path) -> None:
    opened = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if opened is None:
        return
    try:
        if os.fstat(opened).st_uid == os.geteuid() and all(map(_is_exported, folder.iterdir())):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return
    finally:
        os.close(opened)


def _is_exported(path: Path) -> bool:
    return path.name in _FILES and stat.S_ISREG(path.lstat().st_mode)


def _lock(folder: Path, how: int) -> int | None:
    """Lock a folder and return its descriptor, which holds the lock while it is open.

    Return None if another process holds the lock, or the file system does not support locks.
    """
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(opened, how)
    except OSError:
        os.close(opened)
        return None
    return opened


def _is_same(folder: Path, opened: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False
