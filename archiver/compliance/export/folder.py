"""Create the output folder completely or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from archiver.compliance.export.manifest import File
from archiver.compliance.export.partial_folder import held, remove_left
from archiver.durable import sync_folder
from archiver.errors import ArchiverError

BUFFER = 256 * 1024  # bytes hashed and written at a time


class FolderError(ArchiverError):
    """The export cannot be written; the message names the remedy."""


@contextmanager
def made(output: Path) -> Iterator[Path]:
    """Yield a folder that becomes `output` at the end of the block; on an error it is removed.

    Also removes the partial folders of killed exports. Raises `FolderError`.
    """
    target = output.resolve()
    check(target)
    remove_left(target.parent)
    try:
        with held(target) as partial:
            try:
                yield partial
                sync_folder(partial)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        sync_folder(target.parent)
    except OSError as error:
        raise FolderError(_explain(error, target)) from error


def check(output: Path) -> None:
    """Raise `FolderError` unless this path is free for an export: an empty folder, or a new name in a folder."""
    target = output.resolve()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FolderError(f"{target} exists and is not an empty folder; choose another --output")
        if not target.parent.is_dir():
            raise FolderError(f"folder {target.parent} does not exist; create it first")
    except OSError as error:
        raise FolderError(_explain(error, target)) from error


def _explain(error: OSError, target: Path) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return f"No space for the export in {target.parent} ({error.strerror}). Nothing was left there."
    if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
        return f"{target} was created by another process: choose another --output."
    return f"Cannot write {target}: {error.strerror or error}. Its parent must be writable: choose another folder."


class Sink:
    """A file written line by line, hashed while it is written, and synced when it is closed."""

    def __init__(self, path: Path) -> None:
        self._opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._hash = sha256()
        self._waiting: list[bytes | memoryview] = []
        self._size = 0
        self.bytes = 0
        self.rows = 0

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self._opened)
        finally:
            os.close(self._opened)

    def write(self, *pieces: bytes | memoryview) -> None:
        """Write one row."""
        self._waiting += pieces
        self._size += sum(map(len, pieces))
        self.rows += 1
        if self._size >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Hash and write the buffered bytes."""
        block = b"".join(self._waiting)
        self._waiting.clear()
        self._size = 0
        self._hash.update(block)
        self.bytes += len(block)
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self._opened, rest) :]

    def description(self) -> File:
        """Return the manifest entry of the file."""
        return File(self.bytes, self.rows, self._hash.hexdigest())


def write_small(path: Path, content: bytes) -> None:
    """Write a file as a whole and sync it."""
    with Sink(path) as sink:
        sink.write(content)
