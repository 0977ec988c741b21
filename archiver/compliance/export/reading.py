"""Read files of an unverified export in bounded memory."""

import os
import stat
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import msgspec

from archiver.compliance.export.findings import Finding, FindingQueue
from archiver.compliance.export.manifest import File
from archiver.compliance.export.records import is_plain
from archiver.errors import ArchiverError

T = TypeVar("T")

MAX_LINE_BYTES = 512 * 1024 * 1024  # bytes of a line: the largest accepted body with every byte escaped
BLOCK = 1024 * 1024


class NoFileError(ArchiverError):
    """The file cannot be read; the message is the fault code."""


def opened(path: Path) -> BinaryIO:
    """Open a regular file that is not a link. Raises `NoFileError`."""
    try:
        # Non-blocking, so that opening a pipe does not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NoFileError("missing") from None
    except OSError:
        raise NoFileError("not_a_file" if path.is_symlink() else "unreadable") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoFileError("not_a_file")
    return os.fdopen(descriptor, "rb", buffering=BLOCK)


class Lines(Generic[T]):
    """The lines of a file as records. Iteration compares the file with the manifest.

    Differences are added to `findings`.
    """

    def __init__(self, folder: Path, name: str, file: File, kind: type[T], findings: FindingQueue) -> None:
        self._path, self.name, self._file = folder / name, name, file
        self._decode = msgspec.json.Decoder(kind).decode
        self._is_strict = issubclass(kind, msgspec.Struct) and kind.__struct_config__.forbid_unknown_fields
        self._findings = findings
        self.rows = 0

    def __iter__(self) -> Iterator[tuple[int, T]]:
        """Yield each record with its line number; a line that cannot be parsed is a finding and is skipped."""
        try:
            with opened(self._path) as file:
                yield from self._read(file)
        except NoFileError as error:
            self._findings.append(Finding(self.name, str(error)))
        except OSError:
            self._findings.append(Finding(self.name, "unreadable"))

    def _read(self, file: BinaryIO) -> Iterator[tuple[int, T]]:
        hashed, size = sha256(), 0
        while line := file.readline(MAX_LINE_BYTES):
            hashed.update(line)
            size += len(line)
            self.rows += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                self._found("too_long")
                while (line := file.readline(BLOCK)) and not line.endswith(b"\n"):
                    hashed.update(line)
                    size += len(line)
                hashed.update(line)
                size += len(line)
                continue
            try:
                record = self._decode(line)
                is_whole = not self._is_strict or is_plain(line, record)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                is_whole = False
            if not is_whole:
                self._found("damaged")
            else:
                yield self.rows, record
        for each in compare(self.name, self._file, File(size, self.rows, hashed.hexdigest())):
            self._findings.append(each)

    def _found(self, fault: str) -> None:
        self._findings.append(Finding(self.name, fault, self.rows))


def compare(name: str, expected: File, found: File) -> Iterator[Finding]:
    """Yield the differences between a file and its entry in the manifest."""
    if expected.sha256 != found.sha256:
        yield Finding(name, "digest")
    if expected.bytes != found.bytes:
        yield Finding(name, "size")
    if expected.rows != found.rows:
        yield Finding(name, "rows")


def measured(path: Path) -> File:
    """Return the manifest entry of a file whose content is not checked further. Raises `NoFileError`."""
    hashed, size, rows, is_quoted = sha256(), 0, 0, False
    is_csv = path.suffix == ".csv"
    with opened(path) as file:
        try:
            while piece := file.readline(BLOCK):
                hashed.update(piece)
                size += len(piece)
                if is_csv and piece.count(b'"') % 2:
                    is_quoted = not is_quoted
                rows += piece.endswith(b"\n") and not is_quoted
        except OSError:
            raise NoFileError("unreadable") from None
    return File(size, rows - is_csv, hashed.hexdigest())
