"""Merkle trees as RFC 6962, section 2.1, defines them: leaf hashes to a root, and inclusion proofs. Pure."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import sha256

EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """Return the hash of a leaf's bytes."""
    return sha256(b"\0" + leaf).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """Return the root over leaf hashes.

    Works level by level from below, which is equivalent to the RFC's recursion: its split at the largest power of two
    leaves a last, shorter part that moves up unpaired.
    """
    level = list(hashes)
    if not level:
        return EMPTY_ROOT
    while len(level) > 1:
        level = _above(level)
    return level[0]


def _above(level: list[bytes]) -> list[bytes]:
    each, begin, paired = iter(level), sha256(b"\1").copy, []  # a copy is cheaper than a new hash
    for left, right in zip(each, each, strict=False):
        node = begin()
        node.update(left + right)
        paired.append(node.digest())
    return paired + level[-1:] if len(level) % 2 else paired


def path(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """Return the audit path of the leaf at `index` (section 2.1.1): the hashes that lead from it to the root."""
    level, item = list(hashes), []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            item.append(level[sibling])
        level, index = _above(level), index // 2
    return item


def root_of_path(leaf: bytes, index: int, size: int, audit_path: Sequence[bytes]) -> bytes | None:
    """Return the root to which this path leads from the leaf at `index` of `size`; None if its length is wrong."""
    steps, last, hashed = iter(audit_path), size - 1, leaf
    while last > 0:
        if index % 2 or index < last:
            step = next(steps, None)
            if step is None:
                return None
            hashed = _node_hash(step, hashed) if index % 2 else _node_hash(hashed, step)
        index, last = index // 2, last // 2
    return hashed if next(steps, None) is None else None


def cover(hashes: Sequence[bytes], selected: Sequence[int]) -> list[bytes]:
    """Return the fewest hashes, left to right, that lead from the leaves at these indices, ascending, to the root.

    A range without selected leaves contributes its root; a range of only selected leaves contributes nothing; any
    other range is split into its two halves (RFC 6962, section 2.1). If all leaves are selected, nothing is hashed.
    """
    return list(_cover(hashes, selected, 0, len(hashes)))


def _cover(hashes: Sequence[bytes], selected: Sequence[int], start: int, end: int) -> Iterator[bytes]:
    count = bisect_left(selected, end) - bisect_left(selected, start)
    if count == 0:
        yield root(hashes[start:end])
    elif count < end - start:
        middle = start + _split(end - start)
        yield from _cover(hashes, selected, start, middle)
        yield from _cover(hashes, selected, middle, end)


def root_of_cover(
    leaves: Sequence[bytes], selected: Sequence[int], size: int, covering: Sequence[bytes]
) -> bytes | None:
    """Return the root of `size` leaves, those at `selected` with these hashes; None if the cover does not fit."""
    rest = iter(covering)
    result = _root_of_cover(leaves, selected, rest, 0, size)
    return result if next(rest, None) is None else None


def _root_of_cover(
    leaves: Sequence[bytes], selected: Sequence[int], covering: Iterator[bytes], start: int, end: int
) -> bytes | None:
    first, last = bisect_left(selected, start), bisect_left(selected, end)
    if first == last:
        return next(covering, None)
    if last - first == end - start:
        return root(leaves[first:last])
    middle = start + _split(end - start)
    left = _root_of_cover(leaves, selected, covering, start, middle)
    right = _root_of_cover(leaves, selected, covering, middle, end)
    return None if left is None or right is None else _node_hash(left, right)


def _split(size: int) -> int:
    """Return the largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1
