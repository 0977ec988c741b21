"""Replace files of a folder so that a kill at any time leaves it readable, and the next run completes it.

New files are written to the folder `.new`. When all are complete, the new manifest is written next to them,
which commits the change. Then the files are moved into place, the manifest last. A run that finds a `.new` without a
manifest removes it. A run that finds a `.new` with a manifest first moves its remaining files.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from archiver.compliance.export import manifest
from archiver.compliance.export.folder import FolderError, write_small
from archiver.compliance.export.manifest import Manifest
from archiver.durable import sync_folder

_NEW = ".new"


@contextmanager
def opened(output: Path) -> Iterator["Staging"]:
    """Yield the folder, locked, and created if necessary. Without a call of `commit`, it stays as it was.

    Raises `FolderError` if another export is writing to it, or if it contains anything but an export in Parquet.
    """
    target = output.resolve()
    try:
        is_created = not target.exists()
        target.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, target)
            staging = Staging(target)
            try:
                yield staging
            finally:
                staging.discard()
                if is_created:
                    with suppress(OSError):  # not empty, because the export is complete
                        target.rmdir()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FolderError(_explain(error, target)) from error


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderError(f"another export is writing to {target}; wait until it is complete") from None
    except OSError:
        pass  # the file system does not support locks


def _explain(error: OSError, target: Path) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return f"No space for the export in {target} ({error.strerror}). The next run completes it."
    if error.errno == errno.ENOENT:
        return f"folder {target.parent} does not exist; create it first"
    return f"Cannot write {target}: {error.strerror or error}. Choose a folder that you can write."


class Staging:
    """A locked folder. `former`: its manifest; None if it is empty."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._new = target / _NEW
        self.former = self._read_former()
        if (committed := _read(self._new / manifest.MANIFEST)) is not None:
            self._install(committed)
        self.discard()

    def _read_former(self) -> Manifest | None:
        result = _read(self.target / manifest.MANIFEST)
        is_empty = not any(each.name != _NEW for each in self.target.iterdir())
        # A first run that was killed while it moved its files has no manifest outside of `.new`.
        if result is None and (is_empty or _read(self._new / manifest.MANIFEST) is not None):
            return None
        if result is None:
            raise FolderError(f"{self.target} is not an export in Parquet; choose another --output")
        return result

    def path(self, name: str) -> Path:
        """Return the path at which to write the new content of this file."""
        result = self._new / name
        result.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return result

    def commit(self, new: Manifest, key: Ed25519PrivateKey | None) -> str:
        """Replace the files and the manifest, which lists the kept files too. Return the manifest's SHA-256."""
        encoded = manifest.encode(new)
        digest = sha256(encoded).hexdigest()
        write_small(self.path(manifest.DIGEST), f"{digest}  {manifest.MANIFEST}\n".encode())
        if key is not None:
            write_small(self.path(manifest.SIGNATURE), key.sign(encoded))
        for each in [self._new, *self._new.rglob("*")]:
            if each.is_dir():
                sync_folder(each)
        write_small(self.path(manifest.MANIFEST), encoded)
        sync_folder(self._new)
        self._install(new)
        return digest

    def discard(self) -> None:
        """Remove the new files that were not moved."""
        shutil.rmtree(self._new, ignore_errors=True)

    def _install(self, new: Manifest) -> None:
        """Move the files into place. A step that a killed run has already done has no effect."""
        changed = {self.target}
        for name in new.files:
            if (self._new / name).exists():
                (self.target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                (self._new / name).replace(self.target / name)
                changed |= {(self.target / name).parent, (self.target / name).parent.parent}
        for name in set() if self.former is None else self.former.files.keys() - new.files.keys():
            (self.target / name).unlink(missing_ok=True)
            with suppress(OSError):  # the folder contains another file
                (self.target / name).parent.rmdir()
            changed.add((self.target / name).parent.parent)
        for each in sorted(filter(Path.exists, changed)):
            sync_folder(each)
        if new.signed_by is None:
            (self.target / manifest.SIGNATURE).unlink(missing_ok=True)
        for name in (manifest.SIGNATURE, manifest.DIGEST, manifest.MANIFEST):
            if (self._new / name).exists():
                (self._new / name).replace(self.target / name)
        sync_folder(self.target)
        self.former = new


def _read(path: Path) -> Manifest | None:
    """Return the manifest at this path; None if there is none, or it is not that of an export in Parquet."""
    try:
        result = manifest.decode(path.read_bytes())
    except OSError:
        return None
    return None if result is None or result.parquet is None else result
