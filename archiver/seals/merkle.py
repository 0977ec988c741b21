"""Merkle trees as RFC 6962, section 2.1, has them: leaf hashes to a root, and proofs that a leaf is in it. Pure."""

from collections.abc import Sequence
from hashlib import sha256

EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf's bytes."""
    return sha256(b"\0" + leaf).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes.

    Level by level from below, which is the RFC's recursion: its split at the largest power of two leaves a last,
    shorter part that goes up unpaired.
    """
    level = list(hashes)
    if not level:
        return EMPTY_ROOT
    while len(level) > 1:
        level = _above(level)
    return level[0]


def _above(level: list[bytes]) -> list[bytes]:
    paired = [sha256(b"\1" + level[n] + level[n + 1]).digest() for n in range(0, len(level) - 1, 2)]
    return paired + level[-1:] if len(level) % 2 else paired


def path(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of the leaf at `index` (section 2.1.1): the hashes that lead from it to the root, in order."""
    level, found = list(hashes), []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            found.append(level[sibling])
        level, index = _above(level), index // 2
    return found


def root_of_path(leaf: bytes, index: int, size: int, audit_path: Sequence[bytes]) -> bytes | None:
    """The root that this path leads to from the leaf hash at `index` of `size`; None for a path of another length."""
    steps, last, hashed = iter(audit_path), size - 1, leaf
    while last > 0:
        if index % 2 or index < last:
            step = next(steps, None)
            if step is None:
                return None
            hashed = _node_hash(step, hashed) if index % 2 else _node_hash(hashed, step)
        index, last = index // 2, last // 2
    return hashed if next(steps, None) is None else None
