"""Seal settled rows with a Merkle tree; each seal is chained to the previous one."""

from archiver.compliance.seals.bounds import BoundsError, SequenceError
from archiver.compliance.seals.chain import (
    KeyFileError,
    Seal,
    key_id,
    private_key,
    public_key,
    select_newest,
    select_seal,
    select_seals,
    signing_key,
)
from archiver.compliance.seals.comparing import Checked
from archiver.compliance.seals.findings import Finding
from archiver.compliance.seals.parallel import MAX_JOBS, HelperLostError, usual_jobs
from archiver.compliance.seals.proofs import NotSealedError, Proof, prove
from archiver.compliance.seals.sealing import LedgerBusyError, seal
from archiver.compliance.seals.settling import Settling
from archiver.compliance.seals.verifying import Parallelism, verify

__all__ = [
    "MAX_JOBS",
    "BoundsError",
    "Checked",
    "Finding",
    "HelperLostError",
    "KeyFileError",
    "LedgerBusyError",
    "NotSealedError",
    "Parallelism",
    "Proof",
    "Seal",
    "SequenceError",
    "Settling",
    "key_id",
    "private_key",
    "prove",
    "public_key",
    "seal",
    "select_newest",
    "select_seal",
    "select_seals",
    "signing_key",
    "usual_jobs",
    "verify",
]
