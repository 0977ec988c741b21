"""Findings of an export check."""

import msgspec

MAX_FINDINGS = 10_000  # findings reported per export

DESCRIPTIONS = {
    "more": "further findings of this kind are not listed",
    "missing": "it is missing",
    "extra": "it does not belong to the export",
    "not_a_file": "it is no ordinary file",
    "unreadable": "it cannot be read",
    "damaged": "it is not as an export has it",
    "too_long": "it is longer than any line of an export",
    "digest": "its SHA-256 is not the one in the manifest",
    "size": "it has not as many bytes as the manifest says",
    "rows": "it has not as many rows as the manifest says",
    "counts": "its counts are not those of the files",
    "coverage": "its coverage is not that of the conversations",
    "head": "its newest seal is not the last one of seals.jsonl",
    "manifest_digest": "its SHA-256 is not the one in manifest.sha256",
    "manifest_signature": "it is not signed by the key that it names",
    "unknown_key": "it is signed by a key that was not given",
    "out_of_order": "it does not follow the one before it",
    "body_changed": "its body is not the one that was received",
    "erased_without_record": "its body is missing without an erasure",
    "changed": "it is not as it was sealed",
    "not_sealed": "it is none of those that its seal holds",
    "missing_row": "its row is missing, although the seal lists it",
    "without_act": "the act that ordered it is missing",
    "altered": "what it states is not what its hash says",
    "altered_leaves": "its leaves do not lead to the root that it states",
    "out_of_chain": "it does not follow the seal before it",
    "wrong_signature": "its signature is not by the key that it names",
    "unsigned": "it is not signed, though it should be",
    "not_recorded": "its SHA-256 is not the one that was given",
    "seal_left_out": "a seal that was exported elsewhere holds it or one after it, and none in here does",
    "none_known": "none of its seals is among those that were exported elsewhere",
    "not_the_known_one": "it is not the seal that was exported under this number",
}


class Finding(msgspec.Struct, frozen=True):
    """A difference from what was exported or sealed: file, line and fault."""

    file: str
    fault: str
    line: int | None = None
    what: str | None = None  # such as "event 5"

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        what = "" if self.what is None else f", {self.what}"
        return f"{self.file}{line}{what}: {DESCRIPTIONS[self.fault]}"


class FindingQueue(list[Finding]):
    """Findings to be reported, limited in number so that a corrupt file cannot fill the memory."""

    def append(self, found: Finding) -> None:
        if len(self) <= MAX_FINDINGS:
            super().append(found)

    def drain(self) -> list[Finding]:
        """All that wait, which do so no longer."""
        drain = list(self)
        self.clear()
        return drain
