"""An archive with something of everything, exports of it, and what may be done to them."""

import json
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine

from archiver.compliance import export, seals
from archiver.compliance.erasure import Target
from archiver.compliance.export import CompletedExport, ExportRequest, Finding, Selection
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.inbound.writing import store
from tests.support.erasures import NOW, TIMING, erase, read, record, said
from tests.support.payloads import created, deleted, event
from tests.support.rows import execute

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NASTY = 'line\nbreak\r\n"quoted", =1+1 \\ back\u2028slash \u0000 \U0001f600 \x7f\t\x01 é </script>'
ALL = Selection(is_all=True)


def fill(engine: Engine) -> None:
    """Sessions s1 (nasty, read), s2 (a turn erased), s3 (erased), s4; a stray of s1; a turn without a session."""
    record(engine, created("c1", "s1", input=NASTY, output=NASTY), created("c2", "s1"))
    record(engine, deleted("c2", session_id=None), minute=1)
    read(engine, "s1", 5, ("user", NASTY.replace("\0", "")), ("user", "only history knows"))
    seals.seal(engine, KEY)
    record(engine, created("c3", "s2"), created("c4", "s2", input="long " * 20_000), minute=2)
    record(engine, created("c5", "s3"), created("lost", session_id=None), minute=3)
    read(engine, "s2", 6, *said("c3", "c4"))
    unread(engine, "s4", b'\xff\xfe not UTF-8 "\x00\n')
    seals.seal(engine, KEY)
    record(engine, created("c3", "s2", at=1_600_000_000_000), minute=9)
    erase(engine, Target("s2", "c3"))
    erase(engine, Target("s3"))
    record(engine, created("c6", "s4", createdAt="2024-03-01T00:00:00.123456Z"), minute=10)
    # The row of an event that retention removed.
    execute(
        engine,
        "INSERT INTO archiver.removals (event_id, act_id) SELECT id, 1 FROM archiver.events WHERE chat_id = 'c5'",
        "DELETE FROM archiver.events WHERE chat_id = 'c5'",
    )
    seals.seal(engine, KEY)
    record(engine, created("late", "s4"), event("x.unknown", 1_705_311_000_000, {"id": "u", "sessionId": "s9"}))


def unread(engine: Engine, session_id: str, answer: bytes) -> None:
    """A history answer that nobody can read."""
    delivery = Delivery(responses.parse_history(session_id, 200, answer), NOW, None, source=responses.SOURCE)
    with transaction(engine) as connection:
        store(connection, [delivery], TIMING)


def make(engine: Engine, output: Path, selection: Selection = ALL, **options: Any) -> CompletedExport:
    key = options.pop("key", None)
    formats = options.pop("formats", export.FORMATS)
    return export.make(engine, output, ExportRequest(selection, formats, "anna@desk", "case 7", **options), key)


def check(folder: Path, *, is_keyed: bool = False, **options: Any) -> list[Finding]:
    public = KEY.public_key()
    keys = export.Keys({seals.key_id(public): public}) if is_keyed else None
    if is_keyed and (folder / "manifest.json").exists():  # as the audit trail would have it
        options.setdefault("digest", sha256((folder / "manifest.json").read_bytes()).hexdigest())
    return list(export.check(folder, keys=keys, **options))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().split(b"\n")[:-1]]


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to, symlinks=True))


def rewrite(folder: Path, name: str, changed: Sequence[bytes]) -> None:
    (folder / name).write_bytes(b"".join(changed))


def reforge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """The manifest made anew over the files as they are: what whoever has only the folder can do."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, item in manifest["files"].items():
        content = (folder / name).read_bytes()
        item["bytes"], item["sha256"] = len(content), sha256(content).hexdigest()
        if name.endswith(".jsonl"):
            item["rows"] = content.count(b"\n")
    change(manifest)
    encoded = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(encoded)
    (folder / "manifest.sha256").write_text(f"{sha256(encoded).hexdigest()}  manifest.json\n")
