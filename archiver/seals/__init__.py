"""Seals: what the ledger held, proven. A Merkle tree over what is settled, each seal chained to the one before."""

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
from archiver.seals.parallel import MOST_JOBS, LostError, usual_jobs
from archiver.seals.proofs import NotSealedError, Proof, prove
from archiver.seals.sealing import BusyError, seal
from archiver.seals.settling import Settling
from archiver.seals.verifying import Effort, verify

__all__ = [
    "MOST_JOBS",
    "BoundsError",
    "BusyError",
    "Checked",
    "Effort",
    "Finding",
    "KeyFileError",
    "LostError",
    "NotSealedError",
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
