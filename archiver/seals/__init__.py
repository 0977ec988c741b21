"""Seals: a Merkle tree over settled rows, each seal chained to the previous one."""

from archiver.seals.bounds import BoundsError
from archiver.seals.chain import (
    KeyFileError,
    Seal,
    key_id,
    private_key,
    public_key,
    select_newest,
    select_seal,
    select_seals,
)
from archiver.seals.comparing import Checked
from archiver.seals.findings import Finding
from archiver.seals.parallel import MAX_JOBS, HelperLostError, usual_jobs
from archiver.seals.proofs import NotSealedError, Proof, prove
from archiver.seals.sealing import LedgerBusyError, seal
from archiver.seals.settling import Settling
from archiver.seals.verifying import Parallelism, verify

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
    "Settling",
    "key_id",
    "private_key",
    "prove",
    "public_key",
    "seal",
    "select_newest",
    "select_seal",
    "select_seals",
    "usual_jobs",
    "verify",
]
