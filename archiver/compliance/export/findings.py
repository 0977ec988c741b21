"""Findings of an export check."""

import msgspec

MAX_FINDINGS = 10_000  # findings reported per export

DESCRIPTIONS = {
    "more": "further findings are not listed",
    "missing": "it is missing",
    "extra": "it does not belong to the export",
    "not_a_file": "it is not a regular file",
    "unreadable": "it cannot be read",
    "damaged": "it does not have the format of an export",
    "too_long": "it is longer than any line of an export",
    "digest": "its SHA-256 is not the one in the manifest",
    "size": "its size differs from the manifest",
    "rows": "its number of rows differs from the manifest",
    "counts": "its counts differ from the files",
    "coverage": "its coverage differs from the conversations",
    "head": "its newest seal is not the last one in seals.jsonl",
    "manifest_digest": "its SHA-256 is not the one in manifest.sha256",
    "manifest_signature": "it is not signed by the key that it names",
    "unknown_key": "it is signed by a key that was not given",
    "out_of_order": "it does not follow the previous one",
    "body_changed": "its body differs from the received one",
    "erased_without_record": "its body is missing without an erasure",
    "changed": "it differs from its sealed state",
    "not_sealed": "it is not among the rows of its seal",
    "missing_row": "its row is missing, although the seal lists it",
    "without_act": "the audit entry that ordered it is missing",
    "altered": "its statement does not match its hash",
    "altered_leaves": "its leaves do not lead to its stated root",
    "out_of_chain": "it does not follow the previous seal",
    "wrong_signature": "its signature is not by the key that it names",
    "unsigned": "it is not signed, although it must be",
    "not_recorded": "its SHA-256 differs from the given one",
    "seal_left_out": "a seal exported earlier covers it or a later row, but no seal of this export covers it",
    "none_known": "none of its seals is among the seals exported earlier",
    "not_the_known_one": "it differs from the seal exported earlier under this number",
}


class Finding(msgspec.Struct, frozen=True):
    """A difference from the exported or sealed state: file, line and fault."""

    file: str
    fault: str
    line: int | None = None
    what: str | None = None  # such as "event 5"

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        what = "" if self.what is None else f", {self.what}"
        return f"{self.file}{line}{what}: {DESCRIPTIONS[self.fault]}"


class FindingQueue(list[Finding]):
    """A list of findings, limited in length so that a corrupt file cannot exhaust memory."""

    def append(self, found: Finding) -> None:
        if len(self) <= MAX_FINDINGS:
            super().append(found)

    def drain(self) -> list[Finding]:
        """Return the collected findings and clear the list."""
        drain = list(self)
        self.clear()
        return drain
