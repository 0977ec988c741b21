"""Findings of a verification."""

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it was sealed: a row of `table` (a seal is one of `seals`), and what is wrong.

    `through`: the same is wrong with all from `id` up to this one. `hold`: the legal hold that it broke.
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
    "inserted": "its row was put among those that were sealed already",
    "body_changed": "its body is not the one that was received",
    "not_restorable": "the pieces that stand for its body do not make the bytes that were received",
    "counters_changed": "its counters were changed by other than a delivery",
    "erased_without_record": "its body is missing without an erasure",
    "altered": "what it states is not what its hash says",
    "altered_leaves": "its list of leaves is not the one that it states the root of",
    "out_of_chain": "it does not follow the seal before it",
    "wrong_signature": "its signature is not by the key that it names",
    "unknown_key": "it is signed by a key that was not given",
    "unsigned": "it is not signed, though it should be",
    "went_back": "it counts less than the one before it",
    "without_act": "the audit trail has no act that ordered it",
    "not_removed": "its event is still there",
    "out_of_bounds": "it reaches further than the rows that it lists: archiver seal did not make it",
    "held": "the hold was in force and covers its session",
    "differs_from_log": "its row is not what the audit log says that was placed",
    "released_without_act": "its row says that it was released, and the audit log has no release",
    "not_released": "the audit log has its release, and its row says that it is in force",
    "not_placed": "the audit log releases a hold that it never placed",
    "not_the_one_served": "the database is not the one served before, or it went back: archiver doctor says why",
    "not_the_known_one": "it is not the seal that was exported under this number",
}
