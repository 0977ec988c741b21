"""Findings of a verification."""

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """A difference from the sealed state: a row of `table` (a seal is a row of `seals`) and its fault.

    `through`: the fault applies to all rows from `id` to this one. `hold`: the legal hold that was violated.
    """

    table: str
    id: int
    fault: str
    seal: int | None = None
    through: int | None = None
    hold: int | None = None

    def __str__(self) -> str:
        if self.through is not None:
            return f"{_NOUNS[self.table]}s {self.id} to {self.through}: {_DESCRIPTIONS[self.fault]}"
        sealed = "" if self.seal is None else f", sealed by {self.seal}"
        sealed += "" if self.hold is None else f", legal hold {self.hold}"
        return f"{_NOUNS[self.table]} {self.id}{sealed}: {_DESCRIPTIONS[self.fault]}"


_NOUNS = {
    "events": "event",
    "recounts": "recount",
    "acts": "act",
    "erasures": "erasure",
    "removals": "removal",
    "seals": "seal",
    "holds": "hold",
    "epochs": "epoch",
}
_DESCRIPTIONS = {
    "changed": "its row was changed after it was sealed",
    "missing": "its row is missing",
    "inserted": "its row was inserted among rows that were already sealed",
    "body_changed": "its body differs from the received one",
    "not_restorable": "the stored pieces of its body do not reproduce the received bytes",
    "counters_changed": "its counters were changed without a delivery",
    "erased_without_record": "its body is missing without an erasure",
    "altered": "its statement does not match its hash",
    "altered_leaves": "its list of leaves does not lead to its stated root",
    "out_of_chain": "it does not follow the previous seal",
    "wrong_signature": "its signature is not by the key that it names",
    "unknown_key": "it is signed by a key that was not given",
    "unsigned": "it is not signed, although it must be",
    "went_back": "its counters are lower than the previous ones",
    "without_act": "the audit log has no entry that ordered it",
    "not_removed": "its event still exists",
    "out_of_bounds": "it claims ids beyond its listed rows, so `archiver seal` did not make it",
    "held": "the hold was in force and covers its session",
    "differs_from_log": "its row differs from the audit log",
    "released_without_act": "its row is marked as released, but the audit log has no release",
    "not_released": "the audit log has its release, but its row is not marked as released",
    "not_placed": "the audit log releases a hold that it never placed",
    "not_the_one_served": "the database is not the one served before, or it lost rows; see `archiver doctor`",
    "not_the_known_one": "it differs from the seal exported earlier under this number",
}
