"""Find deliveries by their checksums in the bytes of a damaged file. Pure.

SQLite reaches a row only through intact parent pages, and a frame of the write-ahead log only after intact frames.
But a row contains everything needed: a header of column types, the columns, and the number of the page with the rest.
Source: https://www.sqlite.org/fileformat2.html, sections 1.6, 2.1 and 4.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from archiver.inbound.spool.files import PAGE_BYTES, Row, checksum

_FRAME_HEADER, _WAL_HEADER = 24, 32
_MAX_LOCAL = PAGE_BYTES - 35
_MIN_LOCAL = (PAGE_BYTES - 12) * 32 // 255 - 23
_MAX_VERSIONS = 8  # versions of a page in the write-ahead log that are tried
_MAX_PAYLOAD = 2**30
_COLUMNS = 9
# The length of a header, the null for the number of the row, and a string with the length of a time.
_HEADER = re.compile(rb"[\x0a-\x40]\x00[\x3f\x4d]", re.DOTALL)
_BLOB = 12  # the lowest type number of a blob or text
_CONTINUES = 0x80  # the bit that marks a continued number
_CONSTANTS = {8: 0, 9: 1}  # values by type
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # bytes by type


def scan(database: bytes, wal: bytes = b"") -> Iterator[Row]:
    """Yield each distinct row with a correct checksum, without its number and checksum."""
    pages = _Pages(database, wal)
    result: set[Row] = set()
    for page in pages.all:
        for match in _HEADER.finditer(page):
            row = _row(page, match.start(), pages)
            if row is not None and row not in result:
                result.add(row)
                yield row


class _Pages:
    """The pages of a file and of its write-ahead log; the versions of a page are newest first."""

    def __init__(self, database: bytes, wal: bytes) -> None:
        self.all = [database[start : start + PAGE_BYTES] for start in range(0, len(database), PAGE_BYTES)]
        self._numbered: dict[int, list[bytes]] = defaultdict(list)
        frames = []
        for start in range(_WAL_HEADER, len(wal), _FRAME_HEADER + PAGE_BYTES):
            frame = wal[start + _FRAME_HEADER : start + _FRAME_HEADER + PAGE_BYTES]
            frames.append(frame)
            self._numbered[int.from_bytes(wal[start : start + 4])].insert(0, frame)
        for number, page in enumerate(self.all, 1):
            self._numbered[number].append(page)
        self.all += frames

    def overflow(self, number: int, size: int) -> Iterator[bytes]:
        """Yield the possible contents of a chain of overflow pages, with the newest version of each page first."""
        for version in range(_MAX_VERSIONS):
            parts, at, left, is_last = [], number, size, True
            while left > 0:
                versions = self._numbered.get(at)
                if not versions:
                    return
                is_last = is_last and version >= len(versions) - 1
                page = versions[min(version, len(versions) - 1)]
                at = int.from_bytes(page[:4])
                parts.append(page[4 : 4 + left])
                left -= PAGE_BYTES - 4
            yield b"".join(parts)
            if is_last:
                return


def _row(page: bytes, start: int, pages: _Pages) -> Row | None:
    types = _types(page, start)
    if types is None:
        return None
    sizes = [_size(each) for each in types]
    payload = page[start] + sum(sizes)
    local = _local(payload)
    here = page[start : start + local]
    if payload > _MAX_PAYLOAD or len(here) < local:
        return None
    if payload == local:
        return _verified(types, sizes, here)
    pointer = page[start + local : start + local + 4]
    for rest in pages.overflow(int.from_bytes(pointer), payload - local):
        row = _verified(types, sizes, here + rest)
        if row is not None:
            return row
    return None


def _local(payload: int) -> int:
    """Return the number of payload bytes in the row's own page."""
    if payload <= _MAX_LOCAL:
        return payload
    local = _MIN_LOCAL + (payload - _MIN_LOCAL) % (PAGE_BYTES - 4)
    return local if local <= _MAX_LOCAL else _MIN_LOCAL


def _types(page: bytes, start: int) -> list[int] | None:
    """Return the types of the columns from the header at `start`; None if there is no valid header."""
    end, at, types = start + page[start], start + 1, []
    while at < end:
        value = 0
        for _ in range(9):
            if at >= len(page):
                return None
            byte = page[at]
            at += 1
            value = value << 7 | byte & 0x7F
            if byte < _CONTINUES:
                break
        types.append(value)
    return types if at == end and len(types) == _COLUMNS else None


def _size(kind: int) -> int:
    return _INTEGERS.get(kind, 0) if kind < _BLOB else (kind - _BLOB) // 2


def _verified(types: Sequence[int], sizes: Sequence[int], payload: bytes) -> Row | None:
    at, values = payload[0], []
    for kind, size in zip(types, sizes, strict=True):
        try:
            values.append(_value(kind, payload[at : at + size]))
        except UnicodeDecodeError:
            return None
        at += size
    _, received_at, source, key_id, body, event_type, session_id, dedupe_key, stored = values
    row = (received_at, source, key_id, event_type, session_id, dedupe_key, body)
    return row if isinstance(body, bytes) and stored == checksum(row) else None


def _value(kind: int, raw: bytes) -> Any:
    if kind == 0:
        return None
    if kind in _INTEGERS:
        return int.from_bytes(raw, signed=True)
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if kind < _BLOB:
        return None  # not a column type of the spool
    return raw if kind % 2 == 0 else raw.decode()
