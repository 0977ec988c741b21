"""Exports: transcripts, with proofs of their origin that verify offline."""

from archiver.export.checking import Checked, check
from archiver.export.findings import Finding
from archiver.export.folder import FolderError
from archiver.export.manifest import FORMATS, Manifest
from archiver.export.sealed import Keys
from archiver.export.selection import Selection, UnknownError, count
from archiver.export.writing import CompletedExport, ExportRequest, make

__all__ = [
    "FORMATS",
    "Checked",
    "CompletedExport",
    "ExportRequest",
    "Finding",
    "FolderError",
    "Keys",
    "Manifest",
    "Selection",
    "UnknownError",
    "check",
    "count",
    "make",
]
