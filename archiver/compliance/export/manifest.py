"""Define the manifest of an export and the names of its files."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

VERSION = "callhq-archiver export v1"
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"  # in the format of sha256sum
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
PARQUET = "parquet"  # never combined with another format; later runs update the export
_PARQUET_FILE = re.compile(r"(conversations|chats|messages)/day=[0-9]{4}-[0-9]{2}-[0-9]{2}/\1\.parquet")


Whole = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
CsvCells = Literal["neutralised", "raw"]
KeyId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]  # restricted, because it is printed


def names(formats: Sequence[str]) -> list[str]:
    """Return the names of the files of an export in these formats."""
    return [*ALWAYS, *(name for each in formats for name in BY_FORMAT[each])]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of an export. `rows`: lines; in CSV, records without the header."""

    bytes: Whole
    rows: Whole
    sha256: str


class Counts(msgspec.Struct, forbid_unknown_fields=True):
    """The counts of an export. `erased`: events without content; `quarantined`: deliveries that are not exported."""

    conversations: Whole = 0
    chats: Whole = 0
    messages: Whole = 0
    events: Whole = 0
    erased: Whole = 0
    unsealed: Whole = 0
    quarantined: Whole = 0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest seal of an export."""

    id: Whole
    hash: str


class Parquet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state of an export in Parquet, and its latest run.

    `cursor`, `epoch`: the newest change of the feed that the files contain. `since`: the cursor after which the run
    read changes; null if it wrote all days, for the reason `why`. `written`: the days that it wrote. `erased`: those
    that contained rows of conversations with erased content. `columns`: by table and name, the Arrow types.
    """

    cursor: Whole
    epoch: str | None
    since: Whole | None
    why: str | None
    written: list[str]
    erased: list[str]
    columns: dict[str, dict[str, str]]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest of an export. `asked`: the request. `act`: id of its audit entry. `coverage`: sessions by state.

    `csv`: whether the cells of CSV files were neutralised for spreadsheets; null without CSV files, and in exports of
    earlier versions.
    """

    version: str
    archiver: str
    made_at: datetime
    act: Whole
    actor: str
    reason: str | None
    asked: dict[str, Any]
    formats: list[str]
    settings: dict[str, Any]
    counts: Counts
    coverage: dict[str, Whole]
    complete_through: datetime
    head: Head | None
    signed_by: KeyId | None
    files: dict[str, File]
    csv: CsvCells | None = None
    parquet: Parquet | None = None


def encode(manifest: Manifest) -> bytes:
    """Return the content of the manifest file."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(content: bytes) -> Manifest | None:
    """Return the manifest; None unless it has the form of this version and lists the files of its formats."""
    try:
        result = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    formats = set(result.formats)
    if not formats <= {*FORMATS, PARQUET} or len(formats) != len(result.formats) or result.version != VERSION:
        return None
    return result if _lists_its_files(result) else None


def _lists_its_files(manifest: Manifest) -> bool:
    if manifest.parquet is None:
        return PARQUET not in manifest.formats and set(manifest.files) == set(names(manifest.formats))
    return manifest.formats == [PARQUET] and all(map(_PARQUET_FILE.fullmatch, manifest.files))


class Covered(msgspec.Struct):
    """The fields of a line of `conversations.jsonl` that the manifest counts."""

    coverage: str
