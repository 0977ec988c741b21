"""What an export says of itself: the manifest, and the names of the files that there may be."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

VERSION = "callhq-archiver export v1"
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"  # as sha256sum has it
SIGNATURE = "manifest.sig"  # Ed25519 over the manifest's bytes

CONVERSATIONS = "conversations.jsonl"
EVENTS, ERASURES, ACTS, SEALS = "events.jsonl", "erasures.jsonl", "acts.jsonl", "seals.jsonl"
ALWAYS = (CONVERSATIONS, EVENTS, ERASURES, ACTS, SEALS)
BY_FORMAT: Mapping[str, tuple[str, ...]] = {
    "jsonl": ("chats.jsonl", "messages.jsonl"),
    "csv": ("conversations.csv", "chats.csv", "messages.csv"),
    "openai": ("openai.jsonl",),
}
FORMATS = tuple(BY_FORMAT)


def names(formats: Sequence[str]) -> list[str]:
    """The files of an export in these formats."""
    return [*ALWAYS, *(name for each in formats for name in BY_FORMAT[each])]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file; `rows` are lines, in CSV records without the header."""

    bytes: int
    rows: int
    sha256: str


class Counts(msgspec.Struct, forbid_unknown_fields=True):
    """How much there is. `erased`: events without content; `quarantined`: in the archive, and not exported."""

    conversations: int = 0
    chats: int = 0
    messages: int = 0
    events: int = 0
    erased: int = 0
    unsealed: int = 0
    quarantined: int = 0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest seal."""

    id: int
    hash: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`asked`: what was to be exported. `act`: the id of the act that recorded it. `coverage`: sessions by state."""

    version: str
    archiver: str
    made_at: datetime
    act: int
    actor: str
    reason: str | None
    asked: dict[str, Any]
    formats: list[str]
    settings: dict[str, Any]
    counts: Counts
    coverage: dict[str, int]
    complete_through: datetime
    head: Head | None
    signed_by: str | None
    files: dict[str, File]


def encode(manifest: Manifest) -> bytes:
    """As it stands in its file."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


class Covered(msgspec.Struct):
    """What counts of a line of `conversations.jsonl` for the manifest."""

    coverage: str
