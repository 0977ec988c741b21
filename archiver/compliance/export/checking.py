"""Check an export without a database: files against the manifest, rows against their seals."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.compliance.export import manifest, parquet
from archiver.compliance.export.findings import MAX_FINDINGS, Finding, FindingQueue
from archiver.compliance.export.manifest import Counts, Covered, Manifest
from archiver.compliance.export.reading import Lines, NoFileError, compare, measured, opened
from archiver.compliance.export.sealed import Keys, KnownSeals, Rows, SealCheck, UnparsedSealRecord

_MANIFEST_BYTES = 16 * 1024 * 1024
_SMALL = 4096


class Checked(msgspec.Struct):
    """The progress of a check. `digest`: SHA-256 of the manifest. `is_signed`: by one of the given keys.

    `unsealed`: by table, the number of rows that no seal of the export covers.
    """

    digest: str | None = None
    is_signed: bool = False
    manifest: Manifest | None = None
    events: int = 0
    seals: int = 0
    compared: int = 0  # seals compared with `heads`
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
    """Yield every difference from the exported or sealed state.

    `keys`: the keys that must have signed the seals, and the first seal that must be signed. `heads`: hashes of
    seals by number from an earlier export; `through`: the last id of each table that the newest of those seals
    covers. `digest`: SHA-256 of the manifest, obtained from another source; it vouches for the export as a
    signature does.

    Reads files as streams; memory is bounded by the longest line and by one seal.
    """
    known = KnownSeals(dict(heads or {}), through or {})
    checking = _Checking(folder, keys or Keys({}), known, digest, Checked() if checked is None else checked)
    for number, finding in enumerate(checking.run(on_progress)):
        if number == MAX_FINDINGS:
            yield Finding(finding.file, "more")
            return
        yield finding


class _Checking:
    def __init__(self, folder: Path, keys: Keys, known: KnownSeals, digest: str | None, checked: Checked) -> None:
        self._folder, self._keys, self._known, self._digest, self._checked = folder, keys, known, digest, checked

    def run(self, on_progress: Callable[[Checked], None]) -> Iterator[Finding]:
        try:
            content = _read(self._folder / manifest.MANIFEST, _MANIFEST_BYTES)
        except NoFileError as error:
            yield Finding(manifest.MANIFEST, str(error))
            return
        self._checked.digest = sha256(content).hexdigest()
        yield from self._check_digest(self._checked.digest)
        manifest_record = manifest.decode(content)
        if manifest_record is None:
            yield Finding(manifest.MANIFEST, "damaged")
            return
        self._checked.manifest = manifest_record
        yield from self._check_signature(manifest_record, content)
        if manifest_record.parquet is not None:
            yield from parquet.check_files(self._folder, manifest_record)
            return
        yield from self._check_listing(manifest_record)
        yield from self._check_files(manifest_record, on_progress)

    def _check_digest(self, digest: str) -> Iterator[Finding]:
        try:
            result = _read(self._folder / manifest.DIGEST, _SMALL)
        except NoFileError as error:
            yield Finding(manifest.DIGEST, str(error))
            return
        if result != f"{digest}  {manifest.MANIFEST}\n".encode():
            yield Finding(manifest.MANIFEST, "manifest_digest")
        if self._digest not in (None, digest):
            yield Finding(manifest.MANIFEST, "not_recorded")

    def _check_signature(self, manifest_record: Manifest, content: bytes) -> Iterator[Finding]:
        if manifest_record.signed_by is None:
            # Anyone with write access to the folder can delete the signature.
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
        key = self._keys.by_id.get(manifest_record.signed_by)
        if key is None:
            yield Finding(manifest.MANIFEST, "unknown_key")
        elif not _is_signed(key, signature, content):
            yield Finding(manifest.MANIFEST, "manifest_signature")
        else:
            self._checked.is_signed = True

    def _check_listing(self, manifest_record: Manifest) -> Iterator[Finding]:
        known = {*manifest_record.files, manifest.MANIFEST, manifest.DIGEST}
        if manifest_record.signed_by is not None:
            known.add(manifest.SIGNATURE)
        try:
            result = sorted(each.name for each in self._folder.iterdir())
        except OSError:
            return  # the manifest was readable, and each file is checked separately
        for name in result:
            if name not in known:
                yield Finding(name.encode("utf-8", "replace").decode(), "extra")

    def _check_files(self, manifest_record: Manifest, on_progress: Callable[[Checked], None]) -> Iterator[Finding]:
        counts = Counts(
            manifest_record.counts.conversations, manifest_record.counts.chats, manifest_record.counts.messages
        )
        counts.quarantined = manifest_record.counts.quarantined
        yield from self._check_conversations(manifest_record)
        yield from self._check_evidence(manifest_record, counts, on_progress)
        for name in sorted(manifest_record.files.keys() - set(manifest.ALWAYS)):
            yield from self._check_file(name, manifest_record)
        if counts != manifest_record.counts:
            yield Finding(manifest.MANIFEST, "counts")
        on_progress(self._checked)

    def _check_conversations(self, manifest_record: Manifest) -> Iterator[Finding]:
        findings = FindingQueue()
        coverage: Counter[str] = Counter()
        name = manifest.CONVERSATIONS
        for _, record in Lines(self._folder, name, manifest_record.files[name], Covered, findings):
            coverage[record.coverage] += 1
        yield from findings.drain()
        if manifest_record.counts.conversations != manifest_record.files[name].rows:
            yield Finding(manifest.MANIFEST, "counts")
        if dict(coverage) != manifest_record.coverage:
            yield Finding(manifest.MANIFEST, "coverage")

    def _check_evidence(
        self, manifest_record: Manifest, counts: Counts, on_progress: Callable[[Checked], None]
    ) -> Iterator[Finding]:
        """Check the rows of the ledger against their seals, in one pass over both."""
        checked, findings = self._checked, FindingQueue()
        rows = Rows(self._folder, manifest_record.files, findings)
        # Seals that a vouched export lacks are newer than it. In any other export, they may have been removed.
        is_vouched = checked.is_signed or self._digest == checked.digest
        known = KnownSeals(self._known.heads) if is_vouched else self._known
        seals = SealCheck(rows, self._keys, known, findings)
        for number, line in Lines(
            self._folder, manifest.SEALS, manifest_record.files[manifest.SEALS], UnparsedSealRecord, findings
        ):
            seals.check(number, line)
            yield from findings.drain()
            checked.seals, checked.events = seals.seals, rows.events.rows
            on_progress(checked)
        seals.finish()
        yield from findings.drain()
        checked.events = counts.events = rows.events.rows
        checked.compared = seals.compared
        counts.erased, counts.unsealed = rows.erased, seals.unsealed["events"]
        checked.unsealed = seals.unsealed
        if manifest_record.head != seals.head:
            yield Finding(manifest.MANIFEST, "head")

    def _check_file(self, name: str, manifest_record: Manifest) -> Iterator[Finding]:
        try:
            result = measured(self._folder / name)
        except NoFileError as error:
            yield Finding(name, str(error))
            return
        yield from compare(name, manifest_record.files[name], result)
        count = msgspec.structs.asdict(manifest_record.counts).get(name.partition(".")[0])
        if count is not None and count != manifest_record.files[name].rows:
            yield Finding(manifest.MANIFEST, "counts")


def _read(path: Path, limit: int) -> bytes:
    with opened(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError:
            raise NoFileError("unreadable") from None
    if len(content) > limit:
        raise NoFileError("damaged")
    return content


def _is_signed(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True
