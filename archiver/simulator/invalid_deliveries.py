"""Deliveries that must be rejected: malformed, or without a valid secret."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from archiver.simulator.seeds import identifier

QUARANTINED, UNAUTHENTICATED = 422, 401

Proof = Literal["right", "wrong", "none"]


@dataclass(frozen=True, slots=True)
class InvalidDelivery:
    """An invalid delivery. `status`: the status of the response that it must get."""

    body: bytes
    proof: Proof
    status: int


def invalid_deliveries(seed: int) -> Iterator[InvalidDelivery]:
    """Yield about a dozen different invalid deliveries."""
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
        yield InvalidDelivery(body, "right", QUARANTINED)
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
        yield InvalidDelivery(forged, proof, UNAUTHENTICATED)
