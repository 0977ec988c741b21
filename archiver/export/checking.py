"""Checking an export without a database: every file against the manifest, every row against its seal."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.export import manifest
from archiver.export.findings import MOST, Finding, Found
from archiver.export.manifest import Counts, Covered, Manifest
from archiver.export.reading import Lines, NoFileError, compare, measured, opened
from archiver.export.sealed import Keys, Known, Rows, SealCheck, SealLine

_MANIFEST_BYTES = 16 * 1024 * 1024
_SMALL = 4096


class Checked(msgspec.Struct):
    """How far a check has come. `digest`: SHA-256 of the manifest. `is_signed`: by one of the keys given.

    `unsealed`: rows that no seal of the export holds, by table.
    """

    digest: str | None = None
    is_signed: bool = False
    told: Manifest | None = None
    events: int = 0
    seals: int = 0
    compared: int = 0  # of the seals, with `heads`
    unsealed: dict[str, int] = {}


def check(
    folder: Path,
    *,
    keys: Keys | None = None,
    heads: Mapping[int, bytes] | None = None,
    through: Mapping[str, int] | None = None,
    digest: str | None = None,
    checked: Checked | None = None,
    on_progress: Callable[[Checked], None] = lambda _: None,
) -> Iterator[Finding]:
    """Everything in this folder that is not as it was exported, or not as it was sealed.

    `keys`: who must have signed the seals, since when. `heads`: hashes of seals by number, as they were exported
    elsewhere; `through`: up to which id the newest of those seals each table. `digest`: SHA-256 of the manifest, as
    somebody else tells it: vouches for it as a signature does.

    Reads in a stream; memory is bounded by the longest line, and by one seal.
    """
    known = Known(dict(heads or {}), through or {})
    checking = _Checking(folder, keys or Keys({}), known, digest, Checked() if checked is None else checked)
    for number, finding in enumerate(checking.run(on_progress)):
        if number == MOST:
            yield Finding(finding.file, "more")
            return
        yield finding


class _Checking:
    def __init__(self, folder: Path, keys: Keys, known: Known, digest: str | None, checked: Checked) -> None:
        self._folder, self._keys, self._known, self._digest, self._checked = folder, keys, known, digest, checked

    def run(self, on_progress: Callable[[Checked], None]) -> Iterator[Finding]:
        try:
            content = _read(self._folder / manifest.MANIFEST, _MANIFEST_BYTES)
        except NoFileError as error:
            yield Finding(manifest.MANIFEST, str(error))
            return
        self._checked.digest = sha256(content).hexdigest()
        yield from self._check_digest(self._checked.digest)
        told = _manifest(content)
        if told is None:
            yield Finding(manifest.MANIFEST, "damaged")
            return
        self._checked.told = told
        yield from self._check_signature(told, content)
        yield from self._check_listing(told)
        yield from self._check_files(told, on_progress)

    def _check_digest(self, digest: str) -> Iterator[Finding]:
        try:
            found = _read(self._folder / manifest.DIGEST, _SMALL)
        except NoFileError as error:
            yield Finding(manifest.DIGEST, str(error))
            return
        if found != f"{digest}  {manifest.MANIFEST}\n".encode():
            yield Finding(manifest.MANIFEST, "manifest_digest")
        if self._digest not in (None, digest):
            yield Finding(manifest.MANIFEST, "not_recorded")

    def _check_signature(self, told: Manifest, content: bytes) -> Iterator[Finding]:
        if told.signed_by is None:
            # Whoever has the folder can take the signature away.
            if self._keys.by_id and self._digest is None:
                yield Finding(manifest.MANIFEST, "unsigned")
            return
        try:
            signature = _read(self._folder / manifest.SIGNATURE, _SMALL)
        except NoFileError as error:
            yield Finding(manifest.SIGNATURE, str(error))
            return
        if not self._keys.by_id:
            return
        key = self._keys.by_id.get(told.signed_by)
        if key is None:
            yield Finding(manifest.MANIFEST, "unknown_key")
        elif not _is_signed(key, signature, content):
            yield Finding(manifest.MANIFEST, "manifest_signature")
        else:
            self._checked.is_signed = True

    def _check_listing(self, told: Manifest) -> Iterator[Finding]:
        known = {*told.files, manifest.MANIFEST, manifest.DIGEST}
        if told.signed_by is not None:
            known.add(manifest.SIGNATURE)
        try:
            found = sorted(each.name for each in self._folder.iterdir())
        except OSError:
            return  # the manifest could be read, and each file tells for itself
        for name in found:
            if name not in known:
                yield Finding(name.encode("utf-8", "replace").decode(), "extra")

    def _check_files(self, told: Manifest, on_progress: Callable[[Checked], None]) -> Iterator[Finding]:
        counts = Counts(told.counts.conversations, told.counts.chats, told.counts.messages)
        counts.quarantined = told.counts.quarantined
        yield from self._check_conversations(told)
        yield from self._check_evidence(told, counts, on_progress)
        for name in sorted(told.files.keys() - set(manifest.ALWAYS)):
            yield from self._check_file(name, told)
        if counts != told.counts:
            yield Finding(manifest.MANIFEST, "counts")
        on_progress(self._checked)

    def _check_conversations(self, told: Manifest) -> Iterator[Finding]:
        findings = Found()
        coverage: Counter[str] = Counter()
        name = manifest.CONVERSATIONS
        for _, record in Lines(self._folder, name, told.files[name], Covered, findings):
            coverage[record.coverage] += 1
        yield from findings.taken()
        if told.counts.conversations != told.files[name].rows:
            yield Finding(manifest.MANIFEST, "counts")
        if dict(coverage) != told.coverage:
            yield Finding(manifest.MANIFEST, "coverage")

    def _check_evidence(
        self, told: Manifest, counts: Counts, on_progress: Callable[[Checked], None]
    ) -> Iterator[Finding]:
        """The ledger's rows against their seals, in one pass over both."""
        checked, findings = self._checked, Found()
        rows = Rows(self._folder, told.files, findings)
        # A manifest that somebody vouches for was made before those seals; another may have lost them.
        is_vouched = checked.is_signed or self._digest == checked.digest
        known = Known(self._known.heads) if is_vouched else self._known
        seals = SealCheck(rows, self._keys, known, findings)
        for number, line in Lines(self._folder, manifest.SEALS, told.files[manifest.SEALS], SealLine, findings):
            seals.check(number, line)
            yield from findings.taken()
            checked.seals, checked.events = seals.seals, rows.events.rows
            on_progress(checked)
        seals.finish()
        yield from findings.taken()
        checked.events = counts.events = rows.events.rows
        checked.compared = seals.compared
        counts.erased, counts.unsealed = rows.erased, seals.unsealed["events"]
        checked.unsealed = seals.unsealed
        if told.head != seals.head:
            yield Finding(manifest.MANIFEST, "head")

    def _check_file(self, name: str, told: Manifest) -> Iterator[Finding]:
        try:
            found = measured(self._folder / name)
        except NoFileError as error:
            yield Finding(name, str(error))
            return
        yield from compare(name, told.files[name], found)
        count = msgspec.structs.asdict(told.counts).get(name.partition(".")[0])
        if count is not None and count != told.files[name].rows:
            yield Finding(manifest.MANIFEST, "counts")


def _read(path: Path, most: int) -> bytes:
    with opened(path) as file:
        try:
            content = file.read(most + 1)
        except OSError:
            raise NoFileError("unreadable") from None
    if len(content) > most:
        raise NoFileError("damaged")
    return content


def _manifest(content: bytes) -> Manifest | None:
    try:
        told = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    are_formats = set(told.formats) <= set(manifest.FORMATS) and len(set(told.formats)) == len(told.formats)
    if not are_formats or told.version != manifest.VERSION:
        return None
    return told if set(told.files) == set(manifest.names(told.formats)) else None


def _is_signed(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True
