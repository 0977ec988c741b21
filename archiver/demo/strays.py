"""Deliveries that are not webhooks of the platform: broken ones with the right secret, and ones without it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from archiver.demo.seeds import identifier

QUARANTINED, UNAUTHENTICATED = 422, 401

Proof = Literal["right", "wrong", "none"]


@dataclass(frozen=True, slots=True)
class Stray:
    """One such delivery; `status` is what the receiver must answer."""

    body: bytes
    proof: Proof
    status: int


def strays(seed: int) -> Iterator[Stray]:
    """A dozen, all different."""
    number = identifier(seed, "stray")
    broken = (
        b"",
        b"{" + number.encode(),
        b"\xff\xfe\x00" + number.encode(),
        b'{"message": {"type": "chat.created", "chat": {"id": "' + number.encode() + b'", "input": "\xff"}}}',
        json.dumps([number]).encode(),
        json.dumps({"message": {"chat": {"id": number}}}).encode(),
        json.dumps({"message": {"type": "chat.created", "chat": {"sessionId": number}}}).encode(),
        json.dumps({"message": {"type": "chat.deleted", "chat": {"id": number + "\x00"}}}).encode(),
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    )
    for body in broken:
        yield Stray(body, "right", QUARANTINED)
    chat = {
        "id": number,
        "sessionId": number,
        "input": "Let me in",
        "output": [],
        "createdAt": "2026-01-01T00:00:00Z",
    }
    forged = json.dumps({"message": {"type": "chat.created", "chat": chat}}).encode()
    proofs: tuple[Proof, ...] = ("none", "wrong", "none", "wrong")
    for proof in proofs:
        yield Stray(forged, proof, UNAUTHENTICATED)
